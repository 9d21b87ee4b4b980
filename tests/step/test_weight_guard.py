"""Weights that change beside the optimizer's step on released gradients are found before the next step counts."""

import copy
import math

import pytest
import torch
from torch import nn

from hf_dp.errors import ConfigError, ReleaseError, UnsupportedOptionError, UnsupportedParameterError
from hf_dp.per_example.checksums import BLOCK, MANY, by_parts, by_product, checksums
from hf_dp.step.weight_guard import WeightGuard, refuse_foreign_parameters


class Net(nn.Module):
    """A trainable layer, a frozen one, a buffer that is saved and one that is not."""

    def __init__(self):
        super().__init__()
        self.first, self.frozen = nn.Linear(4, 3), nn.Linear(3, 2).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, x):
        return self.frozen(self.first(x))


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def optimizer(net):
    return torch.optim.SGD(net.parameters(), lr=0.1)


@pytest.fixture
def guard(net, optimizer):
    guard = WeightGuard()
    guard.watch(net, optimizer)
    return guard


def release(guard, net):
    """What a trainer does up to its optimizer's step; the gradients are views, as of a flat sum."""
    guard.before_pass()
    flat = torch.randn(sum(p.numel() for p in net.parameters()))
    for p in net.parameters():
        if p.requires_grad:
            p.grad, flat = flat[: p.numel()].view_as(p), flat[p.numel() :]
    guard.released()


def step(guard, net, optimizer):
    release(guard, net)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def average(net):
    for p, q in zip(net.parameters(), copy.deepcopy(net).parameters(), strict=True):
        p.lerp_(q + 1, 0.1)


def second_optimizer(net):
    net(torch.ones(1, 4)).sum().backward()
    torch.optim.Adam(net.first.parameters()).step()


def assigned(net):
    net.frozen.weight = nn.Parameter(torch.zeros(2, 3), requires_grad=False)


TAMPERINGS = {
    "in place": (lambda net: nn.init.zeros_(net.first.weight), "first.weight"),
    "through .data": (lambda net: net.first.bias.data.add_(1e-7), "first.bias"),
    "a frozen weight": (lambda net: net.frozen.weight.data.clamp_(-0.01, 0.01), "frozen.weight"),
    "a saved buffer": (lambda net: net.mean.add_(1), "mean"),
    "another parameter in its place": (assigned, "frozen.weight"),
    "an average written back": (average, "first.bias, first.weight, frozen.bias, frozen.weight"),
    "a second optimizer": (second_optimizer, "first.bias, first.weight"),
}


@pytest.mark.parametrize("name", TAMPERINGS)
@pytest.mark.parametrize("moment", ["between steps", "before the step"])
def test_whatever_else_changes_the_weights_is_named_and_no_step_follows(name, moment, guard, net, optimizer):
    tamper, named = TAMPERINGS[name]
    step(guard, net, optimizer)
    guard.check()
    if moment == "between steps":
        tamper(net)
        with pytest.raises(ReleaseError, match=f"^{named} changed otherwise"):
            guard.before_pass()
        with pytest.raises(ReleaseError, match="changed otherwise"):
            guard.before_evaluation()
    else:
        release(guard, net)
        tamper(net)
        with pytest.raises((ReleaseError, ConfigError), match=r"changed otherwise|gradients of first|not the model's"):
            optimizer.step()
        assert guard.waiting


def test_what_leaves_the_weights_alone_is_let_through(guard, net, optimizer):
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in range(3):
        step(guard, net, optimizer)
        scheduler.step()
        net.cache.add_(1)  # not saved
        net.first.weight.data.copy_(net.first.weight.clone())  # the same bits
        net.eval()
    guard.check()
    guard.leave()
    nn.init.zeros_(net.first.weight)
    guard.check()
    optimizer.step()  # its owner's again


def more_backward(net):
    net(torch.ones(1, 4)).sum().backward()


def frozen_gradient(net):
    net.frozen.bias.grad = torch.ones(2)


def replaced(net):
    net.first.weight.grad = net.first.weight.grad * 2


def taken_away(net):
    net.first.bias.grad = None


GRADIENTS = {
    "in place": (lambda net: net.first.weight.grad.mul_(0.5), "first.weight"),
    "through .data": (lambda net: net.first.bias.grad.data.add_(1.0), "first.bias"),
    "clipped again": (lambda net: nn.utils.clip_grad_norm_(net.parameters(), 1e-3), "first.weight, first.bias"),
    "loss.backward()": (more_backward, "first.weight, first.bias"),
    "another tensor": (replaced, "first.weight"),
    "of a frozen parameter": (frozen_gradient, "frozen.bias"),
    "taken away": (taken_away, "first.bias"),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_that_are_not_those_released_are_never_stepped_on(name, guard, net, optimizer):
    step(guard, net, optimizer)
    release(guard, net)
    tamper, named = GRADIENTS[name]
    tamper(net)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ReleaseError, match=f"^the gradients of {named} are not those that were released"):
        optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_each_release_takes_one_step_without_a_closure(guard, net, optimizer):
    with pytest.raises(ReleaseError, match="without a release"):
        optimizer.step()
    release(guard, net)
    with pytest.raises(ReleaseError, match="no closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(ReleaseError, match=r"still without its optimizer\.step"):
        guard.before_pass()
    optimizer.step()
    with pytest.raises(ReleaseError, match="without a release"):
        optimizer.step()


class Centred(torch.optim.SGD):
    """Changes the released gradients itself, then calls the step of its base class: post-processing."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad -= p.grad.mean()
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            p.data.mul_(0.99)


def test_an_optimizer_may_do_what_it_likes_with_what_was_released(net):
    torch.optim.SGD(net.parameters(), lr=0.1)  # whose class now calls hooks too
    guard, optimizer = WeightGuard(), Centred(net.parameters(), lr=0.1)
    guard.watch(net, optimizer)
    for _ in range(3):
        step(guard, net, optimizer)
    guard.check()


class Averaging(torch.optim.SGD):
    """As schedule-free optimizers do: other weights in evaluation than in training, and back only up to rounding."""

    factor = 1.0

    def train(self):
        self.switch(1.0)

    def eval(self):
        self.switch(0.7)

    @torch.no_grad()
    def switch(self, factor):
        for p in self.param_groups[0]["params"]:
            p.mul_(factor / self.factor)
        self.factor = factor


def test_an_optimizers_own_evaluation_mode_is_let_through_at_the_trainers_hands_alone(net):
    guard, optimizer = WeightGuard(), Averaging(net.first.parameters(), lr=0.1)
    guard.watch(net, optimizer)
    for _ in range(3):
        step(guard, net, optimizer)
        guard.before_evaluation()
        assert optimizer.factor == 0.7
        optimizer.eval()  # once more, by the host: nothing changes
        guard.check()
    guard.before_pass()
    assert optimizer.factor == 1.0
    optimizer.switch(0.5)
    with pytest.raises(ReleaseError, match="changed otherwise"):
        guard.before_pass()


class Unhooked(torch.optim.Optimizer):
    """A wrapper that forgets its base class."""

    def __init__(self, inner):
        self.inner = inner


def test_an_optimizer_holds_the_models_parameters_alone_and_can_be_watched(guard, net, optimizer):
    head = nn.Linear(3, 3)
    for held in (head.parameters(), [*net.parameters(), nn.Parameter(torch.zeros(7))], [{"params": head.bias}]):
        with pytest.raises(ConfigError, match="parameters that are not the model's"):
            refuse_foreign_parameters(net, torch.optim.Adam(held))
    for opaque in (Unhooked(optimizer), object(), None):
        with pytest.raises(ConfigError, match="cannot be watched"):
            WeightGuard().watch(net, opaque)
    release(guard, net)
    optimizer.add_param_group({"params": head.parameters()})
    with pytest.raises(ConfigError, match=r"2 parameters .* \[3, 3\], \[3\]"):
        optimizer.step()


def test_the_arithmetic_and_the_hooks_are_asked_again_at_every_step(guard, net, optimizer):
    step(guard, net, optimizer)
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(UnsupportedOptionError, match="changed since training began"):
            guard.before_pass()
    finally:
        torch.set_float32_matmul_precision("highest")
    net.first.weight.register_hook(lambda g: g)
    with pytest.raises(UnsupportedParameterError, match=r"first\.weight"):
        guard.before_pass()


KINDS = {
    "float32": torch.zeros(101),
    "bfloat16": torch.zeros(101, dtype=torch.bfloat16),
    "float64": torch.zeros(7, 5, dtype=torch.float64),
    "int8": torch.zeros(101, dtype=torch.int8),
    "bool": torch.zeros(9, dtype=torch.bool),
    "complex": torch.zeros(5, dtype=torch.complex64),
    "a view": torch.zeros(50)[3:40],
    "strided": torch.zeros(9, 8).t()[1:],
    "a number": torch.zeros(()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.complex64])
@pytest.mark.parametrize("shape", [(3,), (5, 3), (64, 32), (40, 301), (3, 2 * BLOCK)])
def test_values_that_change_places_are_seen(shape, dtype):
    tensor = (torch.arange(math.prod(shape)).reshape(shape) % 113).to(dtype)
    before = checksums({"x": tensor})
    for other in (tensor.flip(0), tensor.roll(1, 0), tensor.flip(-1), tensor.reshape(-1).roll(1)):
        assert checksums({"x": other}) != before


def test_blocks_are_summed_alike_on_every_device():
    blocks = torch.randint(-(2**63), 2**63 - 1, (MANY + 3, BLOCK))
    assert torch.equal(by_parts(blocks), by_product(blocks))


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_any_one_number_is_seen(kind):
    tensor = KINDS[kind].clone(memory_format=torch.preserve_format) if kind != "a view" else KINDS[kind]
    before = checksums({"x": tensor})
    for position in range(tensor.numel()):
        where = torch.zeros(tensor.numel(), dtype=torch.bool)
        where[position] = True
        changed = torch.where(where.view(tensor.shape), torch.ones_like(tensor), tensor)
        assert checksums({"x": changed}) != before
        tensor[tuple(i.item() for i in where.view(tensor.shape).nonzero()[0])] = 1
        assert checksums({"x": tensor}) != before
        tensor.zero_()
    assert checksums({"x": tensor}) == before
    assert checksums({"empty": torch.zeros(0), "elsewhere": torch.zeros(3, device="meta")}) == {
        "empty": 0,
        "elsewhere": 0,
    }
