"""LoRA's pairs by one tap, gradients in stacks and places that are kept: each gives what the general way gives."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from hf_dp.per_example import capture, losses, norms
from hf_dp.per_example import factors as fx
from hf_dp.per_example.batches import MicroBatch
from hf_dp.per_example.borrowing import Places, places_kept
from hf_dp.per_example.capture import clipped_gradient_sum, per_example_factors
from hf_dp.per_example.factors import Dense, Outer
from hf_dp.per_example.forms import Forms
from hf_dp.per_example.inventory import take_inventory
from hf_dp.per_example.stacks import Joined, Stacks, add_weighted_sums, joined
from tests.support import engine, reference
from tests.support import models as M

Batch = dict[str, Tensor]
BUILD = partial(M.with_lora, M.llama, lora_alpha=6)  # s = 1.5


def lm_losses(model: nn.Module, batch: Batch) -> Tensor:
    return losses.causal_lm(model(batch["input_ids"], batch["attention_mask"]), batch["labels"])


def partly_without(model: nn.Module, batch: Batch) -> Tensor:
    """The loss beside that of the model in which the first block has no adapter."""
    layers = [m for m in model.base_model.model.model.layers[0].modules() if isinstance(m, LoraLinear)]
    for layer in layers:
        layer._disable_adapters = True
    without = lm_losses(model, batch)
    for layer in layers:
        layer._disable_adapters = False
    return lm_losses(model, batch) + without


def forms_of(model: nn.Module, batch: Batch, losses_of: Callable[..., Tensor] = lm_losses) -> Forms:
    return take_inventory(model, MicroBatch(batch, 3), losses_of).forms


def both_ways(model: nn.Module, batch: Batch, losses_of: Callable[..., Tensor] = lm_losses) -> list[dict[str, Tensor]]:
    """The gradients of each example, by pairs and by the general way."""
    forms, found = forms_of(model, batch, losses_of), []
    for pairs in (True, False):
        torch.manual_seed(5)
        factors, _ = per_example_factors(model, lambda: losses_of(model, batch), 3, forms=forms, pairs=pairs)
        found.append({name: sum(fx.materialise(f) for f in uses) for name, uses in factors.items()})
    return found


COVERED = {
    "llama": (BUILD, 14),
    "biases in the base": (partial(M.with_lora, M.qwen2, lora_alpha=6), 14),
    "a transposed base": (partial(M.with_lora, M.gpt2, lora_alpha=6), 8),
    "dropout": (partial(M.with_lora, M.llama, lora_alpha=6, lora_dropout=0.5), 14),
    "rank-stabilised": (partial(M.with_lora, M.llama, use_rslora=True), 14),
}


@pytest.mark.parametrize("case", COVERED)
def test_pairs_by_one_tap_have_the_gradients_of_the_general_way(case: str) -> None:
    build, pairs = COVERED[case]
    torch.manual_seed(0)
    model = build().double().train()
    assert len(Places(model).pairs) == pairs
    fast, slow = both_ways(model, M.token_batch())
    assert fast.keys() == slow.keys()
    assert len(fast) == 2 * pairs
    for name, gradient in slow.items():
        torch.testing.assert_close(fast[name], gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 base, float32 adapter", "autocast"])
def test_pairs_in_mixed_precision_are_as_near_as_the_general_way(autocast: bool) -> None:
    torch.manual_seed(0)
    model, batch = BUILD().train(), M.token_batch()
    exact = both_ways(model, batch)[1]
    if not autocast:
        for p in model.parameters():
            p.data = p.data if p.requires_grad else p.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        fast, slow = both_ways(model, batch)
    assert all(gradient.dtype == torch.float32 for gradient in fast.values())
    assert reference.relative_difference(fast, exact) < max(0.02, 1.5 * reference.relative_difference(slow, exact))


def test_nobody_else_meets_the_weights_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = BUILD(), M.token_batch()
    forms = forms_of(model, batch)
    monkeypatch.setattr(capture.Capture, "apply_rule", lambda *a: pytest.fail("the general way"))
    per_example_factors(model, lambda: lm_losses(model, batch), 3, forms=forms)


def test_an_adapter_that_the_loss_switches_off_is_off() -> None:
    model, batch = BUILD().double(), M.token_batch()
    fast, slow = both_ways(model, batch, partly_without)
    for name, gradient in slow.items():
        torch.testing.assert_close(fast[name], gradient, rtol=1e-10, atol=1e-14)


def test_hooks_of_a_loss_see_what_they_hang_on() -> None:
    model, batch = BUILD().double(), M.token_batch()
    layer = model.base_model.model.model.layers[0].mlp.up_proj

    def hooked(model: nn.Module, batch: Batch) -> Tensor:
        """Adds what the base and A compute, which only a hook sees."""
        seen: list[Tensor] = []
        handles = [
            m.register_forward_hook(lambda m, i, o: seen.append(o)) for m in (layer.base_layer, layer.lora_A["default"])
        ]
        found = lm_losses(model, batch)
        for handle in handles:
            handle.remove()
        return found + sum(s.square().flatten(1).sum(1) for s in seen)

    fast, slow = both_ways(model, batch, hooked)
    for name, gradient in slow.items():
        torch.testing.assert_close(fast[name], gradient, rtol=1e-10, atol=1e-14)


def _hooked() -> nn.Module:
    model = BUILD()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.register_forward_hook(lambda m, i, o: 2 * o)
    return model


def _frozen_a() -> nn.Module:
    model = BUILD()
    for name, p in model.named_parameters():
        p.requires_grad = "lora_B" in name
    return model


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(_hooked, id="hooks"),
        pytest.param(_frozen_a, id="A frozen"),
        pytest.param(partial(M.with_lora, M.llama, use_dora=True), id="DoRA"),
        pytest.param(partial(M.with_lora, M.qwen2, lora_bias=True), id="B with bias"),
    ],
)
def test_what_is_more_than_the_formula_goes_the_general_way(build: Callable[[], nn.Module]) -> None:
    assert Places(build()).pairs == []


def test_places_hold_until_something_changes() -> None:
    model = BUILD()
    q, k = (getattr(model.base_model.model.model.layers[0].self_attn, name) for name in ("q_proj", "k_proj"))

    def at_once(change: Callable[[], object], back: Callable[[], object]) -> None:
        places = Places(model)
        places.proxies(capture.Capture(3, Forms()))
        assert places.hold(model)
        change()
        assert not places.hold(model)
        back()

    weight, values = q.lora_A["default"].weight, q.lora_A["default"].weight.data
    at_once(lambda: weight.requires_grad_(False), lambda: weight.requires_grad_(True))
    at_once(lambda: k.base_layer.weight.requires_grad_(True), lambda: k.base_layer.weight.requires_grad_(False))
    at_once(lambda: setattr(weight, "data", values.clone()), lambda: setattr(weight, "data", values))
    at_once(
        lambda: setattr(q.lora_A["default"], "weight", nn.Parameter(values)),
        lambda: setattr(q.lora_A["default"], "weight", weight),
    )
    at_once(lambda: q.add_module("more", nn.Linear(2, 2)), lambda: delattr(q, "more"))
    at_once(lambda: setattr(q, "forward", k.forward), lambda: delattr(q, "forward"))
    handles = []
    at_once(lambda: handles.append(q.base_layer.register_forward_hook(print)), lambda: handles.pop().remove())
    assert not Places(model).hold(BUILD())


def test_places_that_do_not_hold_are_not_taken() -> None:
    """A parameter that was frozen after the places were found is not trained."""
    model, batch = BUILD(), M.token_batch()
    name, weight = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    forms, known = forms_of(model, batch), Places(model)
    weight.requires_grad = False
    with places_kept(model, known):
        factors, _ = per_example_factors(model, lambda: lm_losses(model, batch), 3, forms=forms)
    assert name not in factors
    assert len(factors) == 27


# ---- stacks ----------------------------------------------------------------------------------------------------------


def outers(count: int, r: int, d: int, *, batch: int = 3, positions: int = 6) -> list[Outer]:
    return [Outer(torch.randn(batch, positions, d), torch.randn(batch, positions, r)) for _ in range(count)]


@pytest.mark.parametrize("room", [1, 200, 1 << 24])
def test_stacks_hold_the_products_of_each_parameter(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In as many stacks as there is room for; more uses than parameters too, and a shape that nobody expected."""
    monkeypatch.setattr("hf_dp.per_example.stacks.ROOM_ON_CPU", room)
    stacks = Stacks({torch.Size((2, 5)): 3, torch.Size((7, 4)): 1})
    factors = [*outers(4, 2, 5), *outers(1, 7, 4), *outers(2, 3, 3)]
    found = {str(i): [stacks.product(f, 1.5)] for i, f in enumerate(factors)}
    blocks = joined(found)
    assert sorted(name for block in blocks for name in block.names) == sorted(found)
    for block in blocks:
        for name, gradient in zip(block.names, block.gradients, strict=False):
            expected = 1.5 * fx.materialise(factors[int(name)])
            torch.testing.assert_close(gradient, expected.flatten(1))
            torch.testing.assert_close(found[name][0].gradient, expected)


def test_what_does_not_lie_whole_in_a_stack_is_left_alone() -> None:
    stacks = Stacks({torch.Size((2, 5)): 3})
    a, b, c = (stacks.product(f, 1.0) for f in outers(3, 2, 5))
    assert joined({"a": [a], "c": [c]}) == []
    assert joined({"a": [a], "b": [b, Outer(torch.ones(3, 1, 5), torch.ones(3, 1, 2))], "c": [c]}) == []
    assert [block.names for block in joined({"c": [c], "a": [a], "b": [b]})] == [("a", "b", "c")]


def test_small_gradients_are_copied_side_by_side_and_large_ones_are_not() -> None:
    small = {name: [Dense(torch.randn(3, *shape))] for name, shape in {"a": (4, 2), "b": (5,), "c": ()}.items()}
    large = {"large": [Dense(torch.zeros(1).expand(3, 1 << 20))]}
    (block,) = joined({**small, **large})
    assert block.names == ("a", "b", "c")
    torch.testing.assert_close(block.gradients[0], torch.cat([f[0].gradient.reshape(3, -1) for f in small.values()], 1))


@pytest.mark.parametrize(("count", "numbers"), [(1, 7), (3, 128), (5, 300), (4000, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_of_a_stack_are_those_of_its_gradients_and_not_below(
    count: int, numbers: int, dtype: torch.dtype
) -> None:
    """Numbers that share a direction, so that rounding adds up."""
    torch.manual_seed(0)
    stack = 1 + 1e-3 * torch.randn(count, 8, numbers, dtype=dtype)
    true = np.sqrt((stack.double().numpy().astype(np.longdouble) ** 2).sum((0, 2)))
    found = norms.squared_norms({}, [stack]).squares.sqrt().numpy()
    assert (found >= true).all()
    assert (found <= true * (1 + (1e-5 if dtype == torch.float32 else 1e-12))).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_a_block_go_to_each_parameter(dtype: torch.dtype) -> None:
    shapes = {"a": (4, 2), "b": (8,), "c": (2, 2, 2)}
    into = {name: torch.ones(shape, dtype=dtype) for name, shape in shapes.items()}
    block, weights = Joined(tuple(shapes), torch.randn(3, 5, 8)), torch.rand(5, dtype=torch.float64)
    add_weighted_sums(block, weights, into)
    for i, name in enumerate(shapes):
        expected = 1 + torch.einsum("b,bn->n", weights, block.gradients[i].double())
        torch.testing.assert_close(into[name].flatten().double(), expected, rtol=1e-5, atol=1e-6)


def test_sums_are_not_in_bfloat16_under_autocast() -> None:
    """Somebody's autocast around the whole step: what an example adds would be up to 0.4 % above C."""
    model, batch = BUILD().train(), M.token_batch(1)
    with torch.autocast("cpu", torch.bfloat16):
        into, _ = engine.clipped_sum(model, {k: v.repeat(2, 1) for k, v in batch.items()}, lm_losses, 1e-3)
    assert float(reference.norm(into)) <= 2e-3
    assert float(reference.norm(into)) > 2e-3 * (1 - 1e-5)


def test_stacks_and_single_gradients_give_one_clipped_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = BUILD().double().train(), M.token_batch()
    forms = forms_of(model, batch)

    def clipped() -> dict[str, Tensor]:
        into = {n: torch.zeros_like(p) for n, p in reference.trainable(model).items()}
        passes = partial(per_example_factors, forms=forms)
        clipped_gradient_sum(model, lambda: lm_losses(model, batch), 3, 0.05, into, passes)
        return into

    stacked = clipped()
    monkeypatch.setattr(capture, "joined", lambda factors: [])
    assert reference.relative_difference(stacked, clipped()) < 1e-12
