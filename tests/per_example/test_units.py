"""Units of several rows: their gradients are formed over their rows before the norm, in every form, and are proved."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_dp.errors import UnsupportedParameterError
from hf_dp.per_example import MicroBatch, Untied, as_rows, as_units, clipped_gradient_sum, prove, take_inventory
from hf_dp.per_example.capture import per_example_factors
from hf_dp.per_example.clipping import ROUNDING_MARGIN
from hf_dp.per_example.compiled import CompiledBlocks
from hf_dp.per_example.factors import Dense, Factor, Outer, Rows, materialise
from hf_dp.per_example.units import folded
from tests.support import models as M
from tests.support import reference

Batch = dict[str, Tensor]
CLIP, ROWS, EXACT = 0.5, 3, 1e-10


def units(size: int = 3, length: int = 9) -> MicroBatch:
    """[U, k, T] tokens; the rows of a unit have different lengths, and share tokens."""
    rows = M.token_batch(size * ROWS, length)
    batch = {name: x.unflatten(0, (size, ROWS)) for name, x in rows.items()}
    return MicroBatch({**batch, "weight": torch.linspace(0.5, 2, size, dtype=torch.float64)}, size)


def unit_losses(model: nn.Module, batch: Batch) -> Tensor:
    """A softmax over the unit's rows, so that each row's gradient depends on all of them, [U]."""
    rows = as_rows(batch)
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows["labels"][:, 1:].flatten(), reduction="none")
    scores = each.view(len(logits), -1).sum(1).unflatten(0, (-1, ROWS))
    return rows["weight"] * (scores.logsumexp(1) + scores[:, 0] * scores[:, 1] / 9)


def full(build: Callable[[], nn.Module]) -> nn.Module:
    return M.stirred(build())


MODELS = {
    "llama, LoRA": partial(M.with_lora, M.llama),
    "llama": partial(full, M.llama),
    "gpt2, with a tied table": partial(full, M.gpt2),
}


def slow(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return reference.clipped_sum(model, batch, lambda m, one: unit_losses(m, one).sum(), CLIP * (1 - ROUNDING_MARGIN))


def fast(model: nn.Module, batch: MicroBatch, forms: object) -> dict[str, Tensor]:
    into = {name: torch.zeros_like(p) for name, p in reference.trainable(model).items()}
    factors_of = partial(per_example_factors, forms=forms)
    clipped_gradient_sum(model, lambda: unit_losses(model, batch), batch.size, CLIP, into, factors_of)
    return into


@pytest.mark.parametrize("materialised", [False, True, None])
@pytest.mark.parametrize("name", MODELS)
def test_the_clipped_sum_is_that_of_one_unit_at_a_time(
    name: str, materialised: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gram, with the products between a unit's rows; materialised; and as the cost decides."""
    if materialised is not None:
        monkeypatch.setattr("hf_dp.per_example.capture.materialise_is_cheaper", lambda *a: materialised)
    torch.manual_seed(0)
    model = MODELS[name]().double()
    inventory = take_inventory(model, units(), unit_losses, ROWS)
    for size, length in ((3, 9), (5, 7), (2, 3)):
        batch = units(size, length)
        ours, theirs = fast(model, batch, inventory.forms), slow(model, batch)
        assert reference.relative_difference(ours, theirs) < EXACT
    norms = [float(reference.norm(g)) for g in reference.example_gradients(model, batch, unit_losses)]
    assert max(norms) > CLIP  # clipping was at work


def test_removing_a_whole_unit_moves_the_sum_by_its_one_clipped_gradient() -> None:
    torch.manual_seed(0)
    model = M.with_lora(M.llama).double()
    forms, batch = take_inventory(model, units(), unit_losses, ROWS).forms, units(4)
    whole = fast(model, batch, forms)
    for number in range(4):
        rest = [*range(number), *range(number + 1, 4)]
        without = fast(model, MicroBatch({n: x[rest] for n, x in batch.items()}, 3), forms)
        move = float(reference.norm({n: whole[n] - without[n] for n in whole}))
        assert 0.9 * CLIP < move <= CLIP * (1 + 1e-9)


def test_compiled_blocks_fold_the_rows_of_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    torch.manual_seed(0)
    model = M.with_lora(M.llama).double()
    compiled = CompiledBlocks(model, take_inventory(model, units(), unit_losses, ROWS))
    batch = units(4, 7)
    into = {name: torch.zeros_like(p) for name, p in reference.trainable(model).items()}
    clipped_gradient_sum(model, lambda: unit_losses(model, batch), 4, CLIP, into, compiled)
    assert reference.relative_difference(into, slow(model, batch)) < EXACT


def test_rows_of_one_unit_may_depend_on_each_other_and_rows_of_two_may_not() -> None:
    torch.manual_seed(0)
    model = M.llama()
    assert prove(model, unit_losses, [units(), units()]).independent

    def rows_of_each_place(model: nn.Module, batch: Batch) -> Tensor:
        """The rows in the order of trl's collators: all first ones, all second ones, ..."""
        return unit_losses(model, {n: x.transpose(0, 1).contiguous() if x.dim() > 1 else x for n, x in batch.items()})

    assert not prove(model, rows_of_each_place, [units(), units()]).independent

    def compared(model: nn.Module, batch: Batch) -> Tensor:
        losses = unit_losses(model, batch)
        return losses - losses.mean()

    assert not prove(model, compared, [units(), units()]).independent


def test_another_number_of_rows_than_was_said_has_no_rule() -> None:
    torch.manual_seed(0)
    for wrong in (1, 2, 6):
        with pytest.raises(UnsupportedParameterError):
            take_inventory(M.llama(), units(), unit_losses, wrong)


def test_factors_are_folded_to_the_sum_of_their_rows() -> None:
    torch.manual_seed(0)
    x, g, index = torch.randn(6, 4, 5), torch.randn(6, 4, 7), torch.randint(0, 3, (6, 4))
    factors: list[Factor] = [Dense(torch.randn(6, 2, 3)), Outer(x, g), Rows(index, g, 3)]
    for factor in factors:
        expected = materialise(factor).unflatten(0, (2, 3)).sum(1)
        assert torch.allclose(materialise(folded(factor, 3)), expected, atol=1e-5)
        assert folded(factor, 1) is factor


def test_units_are_made_of_the_rows_of_each_record_or_refused() -> None:
    chosen_then_rejected = torch.arange(12).view(6, 2)
    batch = as_units({"ids": chosen_then_rejected, "margin": torch.arange(3), "name": "a"}, 3, 2)
    assert batch["ids"].tolist() == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]
    assert batch["margin"].tolist() == [0, 1, 2]
    rows = as_rows(batch)
    assert rows["ids"].tolist() == [[0, 1], [6, 7], [2, 3], [8, 9], [4, 5], [10, 11]]
    for wrong in (1, 4, 5, 12):
        with pytest.raises(Untied):
            as_units({"ids": torch.zeros(wrong, 2)}, 3, 2)
