"""Units that own several examples: one clipped mean gradient each, in every form, and of its own numbers alone."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from hf_dp.errors import CaptureError
from hf_dp.per_example import MicroBatch, Owned, UnitUnderWay, clipped_gradient_sum, of_units, take_inventory
from hf_dp.per_example.capture import Pass, per_example_factors
from hf_dp.per_example.clipping import ROUNDING_MARGIN
from hf_dp.per_example.compiled import CompiledBlocks
from hf_dp.per_example.factors import Dense, Factor, Outer, Rows, Stack, materialise
from hf_dp.per_example.losses import causal_lm
from tests.support import models as M
from tests.support import reference

Batch = dict[str, Tensor]
CLIP, EXACT = 0.2, 1e-10
COUNTS = (2, 1, 4, 1)


def rows_of(counts: Sequence[int], length: int = 9) -> MicroBatch:
    return MicroBatch(M.token_batch(sum(counts), length), sum(counts), (), Owned(tuple(counts)))


def losses(model: nn.Module, batch: Batch) -> Tensor:
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    return causal_lm(model(**inputs), batch["labels"])


def slow(model: nn.Module, batch: MicroBatch, counts: Sequence[int], clip_norm: float) -> dict[str, Tensor]:
    """One unit at a time: the mean of its examples' gradients, clipped."""
    each = reference.example_gradients(model, batch, reference.causal_lm_loss)
    total = {name: torch.zeros_like(p) for name, p in reference.trainable(model).items()}
    for count in counts:
        own, each = each[:count], each[count:]
        mean = {name: sum(g[name] for g in own) / count for name in total}
        factor = min(1.0, clip_norm * (1 - ROUNDING_MARGIN) / float(reference.norm(mean)))
        total = {name: total[name] + factor * mean[name] for name in total}
    return total


def fast(model: nn.Module, batch: MicroBatch, counts: Sequence[int], factors_of: Pass) -> dict[str, Tensor]:
    into = {name: torch.zeros_like(p) for name, p in reference.trainable(model).items()}
    seen = clipped_gradient_sum(
        model, lambda: losses(model, batch), batch.size, CLIP, into, of_units(factors_of, counts)
    )
    each = torch.stack([x.mean() for x in losses(model, batch).detach().split(list(counts))])
    assert torch.allclose(seen.losses, each)
    return into


def stirred(build: Callable[[], nn.Module]) -> nn.Module:
    return M.stirred(build())


MODELS = {
    "llama, LoRA": partial(M.with_lora, M.llama),
    "llama": partial(stirred, M.llama),
    "gpt2, with a tied table": partial(stirred, M.gpt2),
}


@pytest.mark.parametrize("materialised", [False, True, None])
@pytest.mark.parametrize("name", MODELS)
def test_the_clipped_sum_is_that_of_one_unit_at_a_time(
    name: str, materialised: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gram, with the products between a unit's examples; materialised; and as the cost decides."""
    if materialised is not None:
        monkeypatch.setattr("hf_dp.per_example.capture.materialise_is_cheaper", lambda *a: materialised)
    torch.manual_seed(0)
    model = MODELS[name]().double()
    forms = take_inventory(model, rows_of((1, 1, 1)), losses).forms
    for counts, length in ((COUNTS, 9), ((3, 3), 7), ((1, 1, 1, 1), 5), ((5,), 8)):
        batch = rows_of(counts, length)
        ours = fast(model, batch, counts, partial(per_example_factors, forms=forms))
        assert reference.relative_difference(ours, slow(model, batch, counts, CLIP)) < EXACT
    assert float(reference.norm(ours)) == pytest.approx(CLIP, rel=1e-5)  # clipping was at work


def test_compiled_blocks_give_units_their_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    torch.manual_seed(0)
    model, batch = M.with_lora(M.llama).double(), rows_of(COUNTS)
    compiled = CompiledBlocks(model, take_inventory(model, rows_of((1, 1, 1)), losses))
    assert reference.relative_difference(fast(model, batch, COUNTS, compiled), slow(model, batch, COUNTS, CLIP)) < EXACT


def test_a_unit_in_several_passes_is_the_same_unit() -> None:
    """In parts of any sizes, one example each too; a unit that follows begins anew."""
    torch.manual_seed(0)
    model = stirred(M.gpt2).double()
    forms = take_inventory(model, rows_of((1, 1, 1)), losses).forms
    shapes = {name: p.detach() for name, p in reference.trainable(model).items()}
    under_way, into = UnitUnderWay(shapes), {name: torch.zeros_like(p) for name, p in shapes.items()}
    whole = rows_of((5,))
    for most in (1, 2, 3):
        for total in into.values():
            total.zero_()
        for part in whole.pieces(most):
            assert part.owned is not None
            assert part.owned.of == 5
            found = per_example_factors(model, lambda one=part: losses(model, one), part.size, forms=forms)
            unit = under_way.add(found, part.owned)
            assert (unit is None) == under_way.is_begun == (not part.owned.last)
        seen = clipped_gradient_sum(model, lambda: None, 1, CLIP, into, lambda *_, whole=unit: whole)
        assert reference.relative_difference(into, slow(model, whole, (5,), CLIP)) < EXACT
        assert torch.allclose(seen.losses, losses(model, whole).mean().detach())


def test_a_unit_of_which_examples_are_missing_is_an_error() -> None:
    found = {"w": [Dense(torch.ones(1, 2))]}, torch.zeros(1)
    for parts in ([(1, True)], [(1, False)] * 3 + [(1, True)]):  # too few of it; those of a unit before it
        under_way = UnitUnderWay({"w": torch.zeros(2)})
        *before, end = (Owned((count,), 3, last=last) for count, last in parts)
        for owned in before:
            under_way.add(found, owned)
        with pytest.raises(CaptureError, match="did not come together"):
            under_way.add(found, end)
    with pytest.raises(CaptureError, match="units of 3 examples"):
        of_units(lambda *_: found, (2, 1))(nn.Identity(), lambda: torch.zeros(1), 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_stays_with_its_unit(bad: float) -> None:
    torch.manual_seed(0)
    x, g, index = torch.randn(8, 4, 5), torch.randn(8, 4, 7), torch.randint(0, 3, (8, 4))
    stack = Stack(torch.randn(2, 8, 3, 2))
    stack.used = 2
    forms: dict[str, list[Factor]] = {
        "dense": [Dense(torch.randn(8, 2, 3))],
        "outer": [Outer(x, g)],
        "rows": [Rows(index, g, 3)],
        "first": [Dense(stack.numbers[0], stack, 0)],
        "second": [Dense(stack.numbers[1], stack, 1)],
    }
    before = means(forms)
    for name, (factor,) in forms.items():
        expected = torch.stack([part.mean(0) for part in materialise(factor).split(COUNTS)])
        assert torch.allclose(before[name], expected, atol=1e-5)
    for tensor in (forms["dense"][0].gradient, x, g, stack.numbers[0]):
        tensor[4] = bad  # of the third unit
    after = means(forms)
    for name in forms:
        others = [0, 1, 3]
        assert torch.equal(before[name][others], after[name][others])
        assert name == "second" or not after[name][2].isfinite().all()


def means(forms: dict[str, list[Factor]]) -> dict[str, Tensor]:
    found, _ = of_units(lambda *_: (forms, torch.zeros(8)), COUNTS)(nn.Identity(), lambda: torch.zeros(8), 8)
    return {name: materialise(factor) for name, (factor,) in found.items()}


def test_a_micro_batch_is_cut_between_units_where_it_can_be() -> None:
    batch = MicroBatch({"x": torch.arange(8)}, 8, tuple("abcdefgh"), Owned((2, 1, 4, 1)))
    cut = [(p["x"].tolist(), "".join(p.records), p.owned) for p in batch.pieces(3)]
    assert cut == [
        ([0, 1, 2], "abc", Owned((2, 1))),
        ([3, 4, 5], "def", Owned((3,), 4, last=False)),
        ([6], "g", Owned((1,), 4, last=True)),
        ([7], "h", None),
    ]
    again = [piece.owned for part in batch.pieces(3) for piece in part.pieces(1)]
    assert again == [piece.owned for piece in batch.pieces(1)]
    assert [p.owned for p in batch.pieces(8)] == [batch.owned]
    assert [p["x"].tolist() for p in MicroBatch({"x": torch.arange(5)}, 5).pieces(2)] == [[0, 1], [2, 3], [4]]
