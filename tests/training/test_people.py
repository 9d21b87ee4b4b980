"""A person with several records: one clipped mean gradient, whatever the passes, and named wherever the run is."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from hf_dp import ConfigError, DPTrainer, PrivacyConfig
from hf_dp.card.verification import verify
from hf_dp.ledger.ledger import LEDGER_NAME, read_ledger
from hf_dp.per_example.batches import MicroBatch
from hf_dp.recipe.recipe import read
from hf_dp.recipe.task import build
from hf_dp.sampling import Draw, LogicalBatchCollator, micro_batches
from tests.support import models as M
from tests.support import recipes as R
from tests.support import reference, runs

SIZES, CLIP, BOUND = (1, 2, 5, 3, 7, 1), 0.1, 4.575
PEOPLE = {"unit_column": "author", "records_per_unit": 7, "expected_batch_size": len(SIZES)}
ROUNDING = 2e-6 * CLIP  # of each person: clipping aims a millionth below C, and sums are in float32


def rows_of(*sizes: int) -> Dataset:
    authors = [f"author {number}" for number, size in enumerate(sizes) for _ in range(size)]
    return runs.text_rows(len(authors)).add_column("author", authors)


def people_of(rows: Dataset) -> list[list[dict[str, Any]]]:
    return [rows.filter(lambda r, name=name: r["author"] == name).to_list() for name in dict.fromkeys(rows["author"])]


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> DPTrainer:
    torch.manual_seed(0)
    settings = {**runs.NOISELESS, **PEOPLE, "log_loss_up_to": BOUND}
    model = M.with_lora(M.llama).double()
    return runs.trainer(tmp_path_factory.mktemp("people"), model, settings, train_dataset=rows_of(*SIZES))


@pytest.fixture(scope="module")
def slow(private: DPTrainer) -> Tensor:
    return one_person_at_a_time(private, people_of(private.train_dataset), CLIP)


def one_person_at_a_time(trainer: DPTrainer, people: Sequence[list[dict[str, Any]]], clip_norm: float) -> Tensor:
    """The sum over people of their clipped mean gradients, one record at a time by autograd."""
    total: Any = 0.0
    for records in people:
        batches = [runs.collate([record]) for record in records]
        each = [reference.example_gradients(trainer.model, b, reference.causal_lm_loss)[0] for b in batches]
        mean = sum(torch.cat([g.flatten() for g in found.values()]) for found in each) / len(each)
        total = total + mean * min(1.0, clip_norm / float(mean.norm()))
    return total.detach()


def in_passes(
    trainer: DPTrainer, people: Sequence[list[dict[str, Any]]], most: int, tokens: int | None = None
) -> list[MicroBatch]:
    """A draw of these people, cut as the trainer cuts it."""
    draw = Draw([record for records in people for record in records], 0, map(len, people))
    return list(micro_batches(LogicalBatchCollator(trainer._collation(), most, tokens)(draw)))


@pytest.mark.parametrize(("most", "tokens"), [(1, None), (4, None), (24, None), (24, 40), (5, 31)])
def test_the_sum_is_that_of_one_person_at_a_time_whatever_the_passes(
    private: DPTrainer, slow: Tensor, most: int, tokens: int | None
) -> None:
    batches = in_passes(private, people_of(private.train_dataset), most, tokens)
    assert sum(batch.size for batch in batches) == sum(SIZES)
    assert max(batch.size for batch in batches) <= most
    for limit in (1e9, 30):  # what memory allows
        private.private_step._memory._tokens = limit
        found = runs.clipped_sum(private, batches)
        assert float((found[:-2] - slow).norm()) < ROUNDING * len(SIZES)
        check_metrics(private, found[-2:])
    private.private_step._memory._tokens = float("inf")


def check_metrics(trainer: DPTrainer, released: Tensor) -> None:
    """The two coordinates beside the gradient: of people, not of records."""
    losses = []
    for records in people_of(trainer.train_dataset):
        each = [reference.causal_lm_loss(trainer.model, runs.collate([record])).item() for record in records]
        losses.append(min(BOUND, sum(each) / len(each)))
    assert min(losses) < BOUND == max(losses)
    expected = torch.tensor([sum(losses) / BOUND, float(len(losses))]) * CLIP / 10
    assert torch.allclose(released, expected, rtol=1e-5)


def test_records_that_may_not_share_a_pass_have_one_each(private: DPTrainer, slow: Tensor) -> None:
    step = private.private_step
    passes = step.passes
    step.passes = dataclasses.replace(passes, compared=lambda batch: False)
    try:
        found = runs.clipped_sum(private, in_passes(private, people_of(private.train_dataset), 24))
    finally:
        step.passes = passes
    assert float((found[:-2] - slow).norm()) < ROUNDING * len(SIZES)


def test_removing_a_person_moves_the_sum_by_at_most_c(private: DPTrainer) -> None:
    people = people_of(private.train_dataset)
    norms = [float(one_person_at_a_time(private, [records], 1e9).norm()) for records in people]
    for clip_norm in (1e-3, sorted(norms)[3], 1e3):
        whole = runs.clipped_sum(private, in_passes(private, people, 4), clip_norm=clip_norm, loss_bound=None)[:-2]
        for number, norm in enumerate(norms):
            rest = in_passes(private, people[:number] + people[number + 1 :], 24)
            without = runs.clipped_sum(private, rest, clip_norm=clip_norm, loss_bound=None)[:-2]
            assert float((whole - without).norm()) == pytest.approx(min(clip_norm, norm), rel=1e-4)
    runs.clipped_sum(private, [], clip_norm=CLIP, loss_bound=BOUND)


def test_a_person_of_whom_records_are_missing_releases_nothing(private: DPTrainer) -> None:
    from hf_dp.errors import CaptureError

    (records,) = [r for r in people_of(private.train_dataset) if len(r) == 7]
    batches = in_passes(private, [records], 4)
    with pytest.raises(CaptureError, match="examples of a unit are missing"):
        runs.clipped_sum(private, batches[:-1])
    with pytest.raises(CaptureError, match="did not come together"):
        runs.clipped_sum(private, batches[1:])


def test_records_without_tokens_do_not_count(private: DPTrainer) -> None:
    empty = {"input_ids": [], "attention_mask": [], "labels": []}
    people = people_of(private.train_dataset)
    batches = in_passes(private, [[empty, *people[1]], [empty]], 24)
    found = runs.clipped_sum(private, batches)[:-2]
    slow = one_person_at_a_time(private, [people[1]], CLIP)
    assert float((found - slow).norm()) < ROUNDING


def test_whole_numbers_are_of_one_person_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {"noise_multiplier": 1.0, "target_delta": 1e-3, "noise": "discrete", **PEOPLE}
    trainer = runs.trainer(tmp_path, M.with_lora(M.llama).double(), settings, train_dataset=rows_of(*SIZES))
    people = people_of(trainer.train_dataset)
    batches = in_passes(trainer, people, trainer._most_examples())
    assert {batch.size for batch in batches} == {1}
    found = runs.clipped_sum(trainer, batches).double() * trainer.private_step.sum._grid.step
    slow = one_person_at_a_time(trainer, people, CLIP)
    assert float((found - slow).norm()) < 5 * ROUNDING * len(SIZES)  # and rounded to the grid


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two sessions, the second with another k."""
    path = tmp_path_factory.mktemp("run")
    for k, steps in ((3, 2), (2, 3)):
        privacy = {"noise_multiplier": 1.0, "target_delta": 1e-3, **PEOPLE, "records_per_unit": k}
        settings = {"max_steps": steps, "save_strategy": "steps", "save_steps": 1}
        trainer = runs.trainer(path, None, privacy, train_dataset=rows_of(*SIZES), **settings)
        trainer.train(resume_from_checkpoint=k == 2)
        trainer.save_model()
    return path


def test_card_record_and_ledger_name_the_records_of_a_unit(folder: Path) -> None:
    record = json.loads((folder / "privacy.json").read_text())
    assert [check for check in verify(folder) if not check.holds] == []
    assert [s.get("records_per_unit") for s in record["segments"]] == [3, 2]
    assert record["mechanism"]["records_per_unit"] == 2
    assert "of a drawn group at most 2 of its records" in record["mechanism"]["sampler"]
    assert [s.records_per_unit for s in read_ledger(folder / LEDGER_NAME).executed] == [3, 2]
    card = " ".join((folder / "README.md").read_text().split())
    assert 'one group of records with the same "author"; a step takes of a drawn group at most 2 of its' in card


@pytest.mark.parametrize("number", [None, 3])
def test_another_number_than_was_taken_does_not_verify(folder: Path, tmp_path: Path, number: int | None) -> None:
    for path in folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    record = json.loads((tmp_path / "privacy.json").read_text())
    record["mechanism"]["records_per_unit"] = number
    if number is None:
        del record["mechanism"]["records_per_unit"]
    (tmp_path / "privacy.json").write_text(json.dumps(record))
    wrong = [check.name for check in verify(tmp_path) if not check.holds]
    assert "the last steps are the plan's" in wrong


def test_a_number_of_records_needs_a_unit() -> None:
    for settings, message in (
        ({"records_per_unit": 4}, "records_per_unit is of the groups that unit_column makes"),
        ({"records_per_unit": 0, "unit_column": "author"}, "a whole number from 1 to 1,024"),
        ({"records_per_unit": True, "unit_column": "author"}, "a whole number from 1 to 1,024"),
    ):
        with pytest.raises(ConfigError, match=message):
            PrivacyConfig(noise_multiplier=1.0, **settings)


def test_a_recipe_that_splits_documents_protects_each_as_one(tmp_path: Path) -> None:
    settings = {"data__split": "chunks", "data__max_length": 6, "privacy__records_per_unit": 4}
    trainer = build(read(R.write(tmp_path, **settings, privacy__clip_norm=1e-4)))
    m, rows = trainer.mechanism, trainer.train_dataset
    assert (m.num_examples, m.records_per_unit, len(rows)) == (40, 4, 80)
    assert m.unit == 'group of records with the same "document"'
    chunks = [rows.select([2 * number, 2 * number + 1]).remove_columns("document").to_list() for number in range(3)]
    found = runs.clipped_sum(trainer, in_passes(trainer, chunks, 8))
    trainer.model.double()
    whole = [[{**row, "attention_mask": [1] * len(row["input_ids"])} for row in some] for some in chunks]
    slow = one_person_at_a_time(trainer, whole, 1e-4)
    assert float((found - slow).norm()) < 1e-4 * 1e-4  # a pass in float32
    with pytest.raises(ConfigError, match="no such column"):
        build(read(R.write(tmp_path, **settings, privacy__unit_column="nobody")))
