"""Records of people drawn one by one, at most G of each: who is drawn, and what a run says and claims."""

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from scipy import stats

from hf_dp import ConfigError, LedgerError, RecipeError
from hf_dp.accounting.epsilon import spent
from hf_dp.card.record import Record
from hf_dp.card.report.page import page
from hf_dp.card.verification import verify
from hf_dp.ledger.ledger import LEDGER_NAME, read_ledger
from hf_dp.mechanism import Segment, bound_in, unit_of
from hf_dp.recipe.recipe import read
from hf_dp.sampling import PoissonSampler, groups_by
from tests.support import recipes as R
from tests.support import runs

SIZES, G = (1, 6, 2, 5, 9, 1), 3
KEPT = sum(min(size, G) for size in SIZES)
BOUNDED = {
    "noise_multiplier": 2.0,
    "target_delta": 1e-3,
    "unit_column": "author",
    "contribution_bound": G,
    "expected_batch_size": 4,
}
UNIT = 'group of at most 3 records with the same "author"'
FALSE_ALARM = 1e-6


def rows_of(*sizes: int) -> Dataset:
    """The authors' records in turn, a round each, until none is left."""
    authors = [f"author {a}" for turn in range(max(sizes)) for a, size in enumerate(sizes) if turn < size]
    return runs.text_rows(len(authors)).add_column("author", authors)


def test_the_first_records_of_each_are_kept_and_each_is_drawn_by_itself() -> None:
    rows = rows_of(*SIZES)
    groups = groups_by(rows, "author", bound=G)
    assert groups is not None
    assert groups.num_groups == KEPT == len(set(groups.records.tolist()))
    whole = groups_by(rows, "author")
    assert whole is not None
    firsts = [whole.records[a:b][:G].tolist() for a, b in zip(whole.starts, whole.starts[1:], strict=False)]
    assert sorted(groups.records.tolist()) == sorted(record for some in firsts for record in some)
    draws = 3000
    sampler = PoissonSampler(groups, 0.3, draws, key=5)
    counts = np.bincount([record for draw in sampler for record in draw], minlength=len(rows))
    assert set(np.flatnonzero(counts)) == set(groups.records.tolist())
    chances = [stats.binomtest(int(counts[record]), draws, 0.3).pvalue for record in groups.records]
    assert min(chances) > FALSE_ALARM
    (second,) = np.flatnonzero([len(some) == 2 for some in firsts])
    both = sum(set(firsts[second]) <= set(draw) for draw in PoissonSampler(groups, 0.3, draws, key=5))
    assert stats.binomtest(both, draws, 0.09).pvalue > FALSE_ALARM  # independently of one another


def test_a_units_name_says_its_bound() -> None:
    for column, bound, name in (("author", 1200, "at most 1,200 records"), ('at most 3 records "', 2, "at most 2")):
        assert bound_in(unit_of(column, contribution_bound=bound)) == bound
        assert name in unit_of(column, contribution_bound=bound)
    assert bound_in(unit_of('of at most 3 records with the same "')) is bound_in(unit_of(None)) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    trainer = runs.trainer(path, None, BOUNDED, train_dataset=rows_of(*SIZES), max_steps=2)
    trainer.train()
    trainer.save_model()
    return path


def test_plan_ledger_card_and_record_are_of_the_mixture(folder: Path) -> None:
    record = json.loads((folder / "privacy.json").read_text())
    assert [check for check in verify(folder) if not check.holds] == []
    q = 4 / KEPT
    assert (record["mechanism"]["num_examples"], record["mechanism"]["sample_rate"]) == (KEPT, q)
    assert record["epsilon"] == spent([Segment(q, 2.0, 2, contribution_bound=G)], 1e-3).epsilon
    assert record["epsilon"] > 1.3 * spent([Segment(q, 2.0, 2)], 1e-3).epsilon
    assert (record["epsilon_rdp"], record["unit"]) == ("infinite", UNIT)
    assert record["accountant"]["epsilon_is"] == "PLD of a mixture of Gaussians, an upper bound"
    assert record["mechanism"]["sampler"].endswith("of a group its first 3 records at most")
    assert "The number of training records is public." in record["assumptions"]
    ledger = read_ledger(folder / LEDGER_NAME)
    assert [s.contribution_bound for s in ledger.executed] == [G]
    assert {s.contribution_bound for plan in ledger.plans for s in plan} == {G}
    card = " ".join((folder / "README.md").read_text().split())
    assert f"any single {UNIT} of its {KEPT} training records" in card
    assert "chance of a record to enter a step" in card
    assert f"one {UNIT}; each of them is drawn by itself" in card


def test_the_report_computes_it_again_without_the_library(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = Record.of(json.loads((folder / "privacy.json").read_text()))
    (code,) = re.findall(
        r"<pre>(from dp_accounting.*?)</pre>", page(folder, "model", record, verify(folder)), re.DOTALL
    )
    exec(html.unescape(code), {})
    assert float(capsys.readouterr().out) == pytest.approx(record.epsilon, rel=5e-3)


@pytest.mark.parametrize("where", ["mechanism", "segments", "plans", "unit"])
def test_a_smaller_bound_than_was_drawn_does_not_verify(folder: Path, tmp_path: Path, where: str) -> None:
    for path in folder.iterdir():
        if path.is_file() and path.name != LEDGER_NAME:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    record = json.loads((tmp_path / "privacy.json").read_text())
    if where == "unit":
        record["unit"] = 'group of records with the same "author"'
    else:
        (changed,) = {"mechanism": [record["mechanism"]], "segments": record["segments"], "plans": record["plans"][0]}[
            where
        ]
        changed["contribution_bound"] = 2
    (tmp_path / "privacy.json").write_text(json.dumps(record))
    wrong = [check.name for check in verify(tmp_path) if not check.holds]
    assert "the records of a unit that are drawn" in wrong


def test_another_bound_does_not_go_on_with_a_training(folder: Path, tmp_path: Path) -> None:
    settings = {"train_dataset": rows_of(*SIZES), "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = runs.trainer(tmp_path, None, BOUNDED, **settings)
    trainer.train()
    other = runs.trainer(tmp_path, None, {**BOUNDED, "contribution_bound": 2}, **{**settings, "max_steps": 3})
    with pytest.raises((LedgerError, ConfigError), match=r"unit|num_examples"):
        other.train(resume_from_checkpoint=True)


def test_split_records_are_not_drawn_row_by_row(tmp_path: Path) -> None:
    recipe = R.write(tmp_path, data__split="chunks", privacy__contribution_bound=2)
    with pytest.raises(RecipeError, match="not for split records"):
        read(recipe)
