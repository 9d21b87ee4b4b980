"""Groups of records protected as one: how they are drawn, what one can do to a step, what card and ledger say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy import stats

from hf_dp import PrivacyConfig, plan
from hf_dp.card.verification import verify
from hf_dp.errors import ConfigError, LedgerError, RecipeError
from hf_dp.ledger.ledger import LEDGER_NAME, read_ledger
from hf_dp.recipe.recipe import read
from hf_dp.recipe.task import build
from hf_dp.sampling.poisson import PoissonSampler
from hf_dp.sampling.privacy_unit import groups_by
from tests.support import models as M
from tests.support import recipes as R
from tests.support import runs

AUTHORS = ["b", "a", "b", "c", "b", "a", "b"]
PRIVATE = {"noise_multiplier": 1.0, "target_delta": 1e-3, "expected_batch_size": 4, "unit_column": "author"}
FALSE_ALARM = 1e-6


def by_author(authors: list[Any], rows: Dataset | None = None) -> Dataset:
    return (runs.text_rows(len(authors)) if rows is None else rows).add_column("author", authors)


def records_of(*sizes: int) -> Dataset:
    return by_author([f"author {g}" for g, size in enumerate(sizes) for _ in range(size)])


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_groups_come_in_the_order_of_their_first_record() -> None:
    groups = groups_by(by_author(AUTHORS), "author")
    assert groups.num_groups == 3
    assert [groups.records[a:b].tolist() for a, b in zip(groups.starts, groups.starts[1:], strict=False)] == [
        [0, 2, 4, 6],
        [1, 5],
        [3],
    ]
    all_of_them = np.arange(3)
    assert groups.some_of_each(all_of_them, np.zeros((3, 1)))[0].tolist() == [0, 1, 3]
    assert groups.some_of_each(all_of_them, np.full((3, 1), np.nextafter(1, 0)))[0].tolist() == [6, 5, 3]


def test_numbers_are_groups_too_and_transforms_do_not_matter() -> None:
    rows = by_author([3, 3, 1]).with_transform(lambda batch: {"nothing": batch["labels"]})
    assert groups_by(rows, "author").num_groups == 2


@pytest.mark.parametrize(
    ("authors", "column", "message"),
    [
        (AUTHORS, "writer", "no such column .it has input_ids, attention_mask, labels, author"),
        (["a", None, "b", None], "author", r"2 records \(rows 1, 3, counted from 0\) have no value"),
        ([1.0, float("nan")], "author", r"1 record \(row 1, counted from 0\) has no value"),
        ([["a"], ["b"]], "author", "got lists.*to all records that share a person"),
    ],
)
def test_a_column_that_does_not_say_whose_a_record_is(authors: list[Any], column: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        groups_by(by_author(authors), column)
    with pytest.raises(ConfigError, match=r"needs a datasets.Dataset.*got a list"):
        groups_by([{"author": "a"}], "author")


@pytest.mark.parametrize("name", ["", " ", "a|b", "two\nlines", "`x`", 'say "x"', 3])
def test_a_name_that_cannot_stand_on_a_card(name: Any) -> None:
    with pytest.raises(ConfigError, match="unit_column must be a column's name"):
        PrivacyConfig(noise_multiplier=1.0, unit_column=name)


def test_a_loop_of_ones_own_counts_records_alone() -> None:
    with pytest.raises(ConfigError, match="takes no unit_column"):
        plan(PrivacyConfig(**PRIVATE), 24, num_train_epochs=1)


# ---- draws -----------------------------------------------------------------------------------------------------------


def test_each_group_comes_with_q_whatever_its_size_and_each_of_its_records_as_often_as_another() -> None:
    """Two-sided chi-squares: N counts of groups, Bin(T, q) each; then of the records within the groups."""
    sizes, q, draws = [1, 2, 5, 40] * 25, 0.1, 4000
    owner = np.repeat(np.arange(100), sizes)
    sampler = PoissonSampler(groups_by(records_of(*sizes), "author"), q, draws)
    counts = np.zeros(len(owner))
    for number in range(draws):
        kept = sampler.draw(number)
        assert len(set(owner[kept])) == len(kept)  # one of a group at most
        counts[kept] += 1
    of_groups = np.bincount(owner, counts)
    low, high = stats.chi2.ppf([FALSE_ALARM, 1 - FALSE_ALARM], 100)
    assert low < (np.square(of_groups - draws * q) / (draws * q * (1 - q))).sum() < high
    expected = of_groups[owner] / np.repeat(sizes, sizes)
    low, high = stats.chi2.ppf([FALSE_ALARM, 1 - FALSE_ALARM], len(owner) - 100)
    assert low < (np.square(counts - expected) / expected).sum() < high


def test_processes_share_one_draw() -> None:
    groups = groups_by(records_of(*[3] * 50), "author")
    whole = PoissonSampler(groups, 0.3, 5, key=4)
    slices = [list(PoissonSampler(groups, 0.3, 5, key=4, process_index=r, num_processes=3)) for r in range(3)]
    for number in range(5):
        assert sorted(i for part in slices for i in part[number]) == sorted(whole.draw(number).tolist())


def test_each_choice_of_k_records_is_as_likely_as_another_and_never_has_one_twice() -> None:
    sizes, k, draws = [1, 3, 5], 3, 6000
    groups = groups_by(records_of(*sizes), "author", k)
    uniforms = np.random.default_rng(0).random((draws, 3, k))
    counts: dict[tuple[int, ...], int] = {}
    for each in uniforms:
        records, taken = groups.some_of_each(np.arange(3), each)
        assert taken.tolist() == [1, 3, 3]
        assert records[:4].tolist() == [0, 1, 2, 3]
        choice = tuple(sorted(records[4:].tolist()))
        assert len(set(choice)) == k
        counts[choice] = counts.get(choice, 0) + 1
    assert len(counts) == 10  # 3 of 5
    low, high = stats.chi2.ppf([FALSE_ALARM, 1 - FALSE_ALARM], 9)
    assert low < sum((n - draws / 10) ** 2 / (draws / 10) for n in counts.values()) < high


def test_what_is_taken_of_a_group_hangs_on_no_other_groups_records() -> None:
    few, many = (groups_by(records_of(*sizes), "author", 4) for sizes in ([9, 2, 9], [9, 50, 9]))
    for number in range(20):
        drawn = [PoissonSampler(groups, 0.7, 1, key=5)._records(number, slice(None)) for groups in (few, many)]
        owners = [
            np.repeat([0, 1, 2], sizes)[records]
            for sizes, (records, _) in zip(([9, 2, 9], [9, 50, 9]), drawn, strict=True)
        ]
        for owner, shift in ((0, 0), (2, 48)):
            here = [records[own == owner] for own, (records, _) in zip(owners, drawn, strict=True)]
            assert (here[0] + shift).tolist() == here[1].tolist()


def test_processes_take_whole_groups() -> None:
    groups = groups_by(records_of(*[1, 4, 9] * 20), "author", 4)
    owner = np.repeat(np.arange(60), [1, 4, 9] * 20)
    whole = PoissonSampler(groups, 0.3, 5, key=4)
    slices = [list(PoissonSampler(groups, 0.3, 5, key=4, process_index=r, num_processes=3)) for r in range(3)]
    for number in range(5):
        assert sorted(i for part in slices for i in part[number]) == sorted(whole.draw(number).tolist())
        for part in slices:
            own = owner[part[number]].tolist()
            assert [own.count(group) for group in dict.fromkeys(own)] == list(part[number].counts)


# ---- a run -----------------------------------------------------------------------------------------------------------


def moved(folder: Path, rows: Dataset, **privacy: Any) -> torch.Tensor:
    """The adapter's change by one noiseless step with q = 1, times B: the clipped sum."""
    torch.manual_seed(0)
    model = M.with_lora(M.llama)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = runs.trainer(folder, model, {**runs.NOISELESS, **privacy}, train_dataset=rows)
    trainer.train()
    change = [(before[n] - p.detach()).flatten() for n, p in model.named_parameters() if p.requires_grad]
    return torch.cat(change) * privacy["expected_batch_size"]


def test_a_group_moves_a_step_by_c_however_many_its_records(tmp_path: Path) -> None:
    one = runs.text_rows(1).to_list()
    copies = by_author(["a"] * 50, Dataset.from_list(one * 50))
    alone = moved(tmp_path / "alone", Dataset.from_list(one), expected_batch_size=1)
    group = moved(tmp_path / "group", copies, expected_batch_size=1, unit_column="author")
    assert float(group.norm()) == pytest.approx(0.1, rel=1e-4)  # C, in float32
    assert torch.equal(group, alone)
    assert float(moved(tmp_path / "records", copies, expected_batch_size=50).norm()) > 4


def test_card_ledger_and_plan_count_groups_and_nothing_tells_the_number_of_records(tmp_path: Path) -> None:
    records = 1237
    rows = by_author([f"author {i % 12}" for i in range(records)])
    trainer = runs.trainer(
        tmp_path, None, PRIVATE, train_dataset=rows, max_steps=3, save_strategy="steps", save_steps=2
    )
    assert (trainer.mechanism.num_examples, trainer.mechanism.sample_rate) == (12, 4 / 12)
    output = trainer.train()
    trainer.save_model()
    trainer.save_metrics("train", output.metrics)
    record = json.loads((tmp_path / "privacy.json").read_text())
    assert (
        record["unit"] == read_ledger(tmp_path / LEDGER_NAME).header.unit == 'group of records with the same "author"'
    )
    assert "of a drawn group one record" in record["mechanism"]["sampler"]
    card = " ".join((tmp_path / "README.md").read_text().split())
    assert 'any single group of records with the same "author" of its 12 training groups.' in card
    assert "One person, one group" in card
    assert [check for check in verify(tmp_path) if not check.holds] == []
    for path in tmp_path.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".md", ".svg"):
            assert not {"1237", "1,237"} & set(path.read_text().replace('"', " ").split())
    rate, runtime = (output.metrics[f"train_{name}"] for name in ("samples_per_second", "runtime"))
    assert rate * runtime < 4 * 12  # of groups, not of the 1,237 records


@pytest.mark.slow
def test_a_run_that_resumes_with_another_unit_is_refused(tmp_path: Path) -> None:
    rows = by_author([f"author {i % 12}" for i in range(24)])
    settings = {"train_dataset": rows, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    runs.trainer(tmp_path, None, PRIVATE, **settings).train()
    for privacy in ({**PRIVATE, "unit_column": None}, {**PRIVATE, "unit_column": "attention_mask"}):
        with pytest.raises((LedgerError, ConfigError)):
            runs.trainer(tmp_path, None, privacy, **settings).train(resume_from_checkpoint=True)


def test_a_trainer_that_reorders_its_records_is_refused(tmp_path: Path) -> None:
    from transformers import Trainer

    from hf_dp import DPTrainerMixin

    class Reordering(Trainer):
        def __init__(self, *args: Any, train_dataset: Any = None, **k: Any) -> None:
            super().__init__(*args, train_dataset=train_dataset.select(range(23, -1, -1)), **k)

    class Private(DPTrainerMixin, Reordering):
        pass

    settings: dict[str, Any] = {
        "model": M.with_lora(M.llama),
        "args": runs.arguments(tmp_path),
        "data_collator": runs.collate,
        "privacy": PrivacyConfig(**PRIVATE),
    }
    with pytest.raises(ConfigError, match="another order"):
        Private(**settings, train_dataset=by_author([f"author {min(i, 11)}" for i in range(24)]))


# ---- a recipe --------------------------------------------------------------------------------------------------------


def test_a_recipe_takes_the_column_of_its_data(tmp_path: Path) -> None:
    path = R.write(tmp_path, privacy__unit_column="mr", privacy__expected_batch_size=2, privacy__target_delta=1e-2)
    trainer = build(read(path))
    assert trainer.mechanism.num_examples == 3  # names of 40 records
    assert trainer.train_dataset.column_names == ["input_ids", "labels", "mr"]


def test_a_recipe_whose_column_has_the_name_of_ours(tmp_path: Path) -> None:
    lines = [{**r, "labels": i % 3} for i, r in enumerate(R.notes(40))]
    path = R.write(tmp_path, privacy__unit_column="labels", privacy__expected_batch_size=2, privacy__target_delta=1e-2)
    R.write_lines(tmp_path / "train.jsonl", lines)
    with pytest.raises(RecipeError, match="rename yours"):
        build(read(path))
