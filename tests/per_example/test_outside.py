"""Hooks on gradients, and trained leaves that the model does not hold, bypass the pass: both are refused by name."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_dp.errors import UnsupportedParameterError
from hf_dp.per_example.batches import MicroBatch
from hf_dp.per_example.inventory import take_inventory
from hf_dp.per_example.outside import refuse_hooks

BATCH = MicroBatch({"x": torch.randn(3, 4), "labels": torch.tensor([0, 1, 2])}, 3)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
        self.extra = None

    def forward(self, x):
        h = self.first(x)
        if self.extra is not None:
            h = self.extra(h)
        return self.second(h)


def losses(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")


HOOKS = {
    "a mask of rows": (lambda n: n.first.weight.register_hook(lambda g: g * 0), r"first\.weight"),
    "a reader": (lambda n: n.second.bias.register_hook(print), r"second\.bias"),
    "after accumulation": (
        lambda n: n.first.bias.register_post_accumulate_grad_hook(lambda p: None),
        r"first\.bias",
    ),
    "of a module": (lambda n: n.second.register_full_backward_hook(lambda *a: None), r"second \(a module\)"),
    "before a module": (lambda n: n.register_full_backward_pre_hook(lambda *a: None), r"Net \(a module\)"),
    "of all modules": (
        lambda n: nn.modules.module.register_module_full_backward_hook(lambda *a: None),
        "all modules",
    ),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_gradients_are_refused_by_name(kind):
    net = Net()
    add, named = HOOKS[kind]
    handle = add(net)
    try:
        with pytest.raises(UnsupportedParameterError, match=f"hooks on gradients of {named}"):
            take_inventory(net, BATCH, losses)
    finally:
        handle.remove()
    take_inventory(net, BATCH, losses)  # the remedy


def test_hooks_that_do_not_touch_gradients_are_let_through():
    net = Net()
    net.first.register_forward_hook(lambda *a: None)
    net.second.register_forward_pre_hook(lambda *a: None)
    frozen = net.second.weight
    handle = frozen.register_hook(lambda g: g)
    frozen.requires_grad_(False)
    refuse_hooks(net)
    handle.remove()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_are_seen_too(reentrant):
    net, layer = Net(), nn.Linear(5, 5)
    net.extra = lambda h: checkpoint(layer, h, use_reentrant=reentrant)
    with pytest.raises(UnsupportedParameterError, match="gradients reach 2 tensors"):
        take_inventory(net, BATCH, losses)
    net.layer = layer
    assert {row.parameter for row in take_inventory(net, BATCH, losses)} >= {"layer.weight", "layer.bias"}


class Experts:
    """Not a module: nothing that it holds is registered."""

    def __init__(self, held):
        self.held = held

    def __call__(self, h):
        for part in self.held.values() if isinstance(self.held, dict) else self.held:
            h = part(h)
        return h


def in_a_list(net):
    net.parts = [nn.Linear(5, 5)]
    net.extra = lambda h: net.parts[0](h)
    return list(net.parts[0].parameters()), r"parts\[0\]\.weight"


def in_a_dict(net):
    net.first.adapters = {"de": nn.Linear(5, 5, bias=False)}
    net.extra = lambda h: net.first.adapters["de"](h)
    return list(net.first.adapters["de"].parameters()), r"first\.adapters\['de'\]\.weight"


def in_an_object(net):
    layer = nn.LayerNorm(5)
    net.extra = Experts([layer])
    return list(layer.parameters()), r"one of shape \[5\]"


def a_tensor(net):
    net.scale = torch.ones(5, requires_grad=True)
    net.extra = lambda h: h * net.scale
    return [net.scale], "scale"


@pytest.mark.parametrize("place", [in_a_list, in_a_dict, in_an_object, a_tensor])
def test_leaves_that_the_model_does_not_hold_are_refused_and_keep_their_gradients(place):
    net = Net()
    leaves, named = place(net)
    leaves[0].grad = kept = torch.ones_like(leaves[0])
    with pytest.raises(UnsupportedParameterError, match=f"gradients reach {len(leaves)} tensors .*{named}"):
        take_inventory(net, BATCH, losses)
    assert leaves[0].grad is kept
    assert bool((kept == 1).all())
    assert all(leaf.grad is None for leaf in leaves[1:])
    for leaf in leaves:
        leaf.requires_grad_(False)
    take_inventory(net, BATCH, losses)


def test_a_losss_own_layer_is_refused_until_it_is_made_part_of_the_model():
    net, head = Net(), nn.Linear(3, 3)

    def own(model, batch):
        return nn.functional.cross_entropy(head(model(batch["x"])), batch["labels"], reduction="none")

    with pytest.raises(UnsupportedParameterError, match=r"one of shape \[3, 3\], one of shape \[3\]"):
        take_inventory(net, BATCH, own)
    net.loss_head = head
    assert {"loss_head.weight", "loss_head.bias"} <= {row.parameter for row in take_inventory(net, BATCH, own)}


def test_a_teacher_that_only_looks_on_is_let_through():
    net, teacher = Net(), Net()

    def distilled(model, batch):
        with torch.no_grad():
            wanted = teacher(batch["x"]).softmax(-1)
        return -(wanted * model(batch["x"]).log_softmax(-1)).sum(-1)

    take_inventory(net, BATCH, distilled)

    def careless(model, batch):
        return -(teacher(batch["x"]).softmax(-1) * model(batch["x"]).log_softmax(-1)).sum(-1)

    with pytest.raises(UnsupportedParameterError, match="gradients reach 4 tensors"):
        take_inventory(net, BATCH, careless)
