"""Records of several owners: what one of them can do to a step, what a run says of it, and when it may go on."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from hf_dp import ConfigError, DPTrainer, LedgerError, RecipeError
from hf_dp.accounting.epsilon import spent
from hf_dp.card.record import Record
from hf_dp.card.registry import registry_entry
from hf_dp.card.report.page import page
from hf_dp.card.verification import verify
from hf_dp.ledger.budget import BudgetSubject
from hf_dp.ledger.ledger import LEDGER_NAME, read_ledger
from hf_dp.mechanism import FIXED_OWNERS, Segment, bound_in, is_owned, relation_of
from hf_dp.recipe.recipe import read
from hf_dp.recipe.task import build
from hf_dp.sampling import groups_by
from hf_dp.training.trackers import settings as tracked
from tests.support import models as M
from tests.support import recipes as R
from tests.support import reference, runs

G, CLIP = 2, 0.1
CHATS = [["ann", "bob"], ["ann"], ["bob", "cid"], ["cid"], ["dan", "ann", "eve"], ["eve"], ["bob"], ["dan", "dan"]] * 2
PEOPLE = sorted({name for names in CHATS for name in names})
NAMES = {"unit_column": "users", "contribution_bound": G, "target_delta": 1e-3}
UNIT = 'group of at most 2 records that name the same owner in "users"'
EMPTY: dict[str, Any] = {"input_ids": [], "attention_mask": [], "labels": []}
WORDS = "who owns which record is fixed and not protected"


def chats(lists: Any = CHATS, rows: Dataset | None = None) -> Dataset:
    return (rows or runs.text_rows(len(lists))).add_column("users", lists)


def without(rows: Dataset, name: str) -> Dataset:
    """The neighbour: this owner's records are empty, in their places and still theirs."""
    return Dataset.from_list([r | (EMPTY if name in r["users"] else {}) for r in rows], features=rows.features)


def kept_of(rows: Dataset) -> list[int]:
    groups = groups_by(rows, "users", bound=G)
    assert groups is not None
    kept: list[int] = groups.records.tolist()
    return kept


KEPT = kept_of(chats())
N = len(KEPT)


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> DPTrainer:
    torch.manual_seed(0)
    settings = {**runs.NOISELESS, **NAMES, "expected_batch_size": N}
    model = M.with_lora(M.llama).double()
    return runs.trainer(tmp_path_factory.mktemp("chats"), model, settings, train_dataset=chats())


def sum_of(trainer: DPTrainer, rows: Dataset) -> torch.Tensor:
    """The clipped sum of a step with q = 1 on the records that are kept of these."""
    return runs.clipped_sum(trainer, runs.collated(rows.select(kept_of(rows)).to_list(), 4)).double()


def test_emptying_one_owners_records_moves_the_sum_by_at_most_g_c(private: DPTrainer) -> None:
    """q = 1, no noise, float64: against one record at a time, for every owner; by all of G C where records agree."""
    assert private.mechanism is not None
    assert (private.mechanism.num_examples, private.mechanism.sample_rate) == (N, 1.0)
    assert len(CHATS) > N
    alike = chats(rows=Dataset.from_list(runs.text_rows(1).to_list() * len(CHATS)))
    for rows in (chats(), alike):
        whole = sum_of(private, rows)
        for name in PEOPLE:
            neighbour = without(rows, name)
            assert kept_of(neighbour) == KEPT
            own = [record for record in KEPT if name in CHATS[record]]
            assert len(own) <= G
            moved = whole - sum_of(private, neighbour)
            assert float(moved.norm()) <= G * CLIP * (1 + 1e-6)
            assert float((moved - one_at_a_time(private, rows, own)).norm()) < 1e-5 * CLIP
    assert float(moved.norm()) == pytest.approx(len(own) * CLIP, rel=1e-5)
    most = max(sum(name in CHATS[record] for record in KEPT) for name in PEOPLE)
    assert most == G


def one_at_a_time(trainer: DPTrainer, rows: Dataset, records: list[int]) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for record in records:
        found = reference.example_gradients(trainer.model, runs.collate([rows[record]]), reference.causal_lm_loss)[0]
        gradient = torch.cat([g.flatten() for g in found.values()])
        total = total + gradient * min(1.0, CLIP / float(gradient.norm()))
    return total.detach()


def test_a_whole_step_of_a_trainer_moves_by_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = runs.record_sums(monkeypatch)
    settings = {**runs.NOISELESS, **NAMES, "expected_batch_size": N}
    for number, rows in enumerate((chats(), without(chats(), "ann"))):
        torch.manual_seed(0)
        model = M.with_lora(M.llama).double()
        runs.trainer(tmp_path / str(number), model, settings, train_dataset=rows, max_steps=1).train()
    moved = (sums[0] - sums[1]).double()
    assert 0.5 * CLIP < float(moved.norm()) <= G * CLIP * (1 + 1e-6)


# ---- what a run says -------------------------------------------------------------------------------------------------

RUN = {**NAMES, "noise_multiplier": 2.0, "expected_batch_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two sessions."""
    path = tmp_path_factory.mktemp("run")
    for steps in (1, 2):
        trainer = runs.trainer(path, None, RUN, train_dataset=chats(), max_steps=steps, **SAVED)
        trainer.train(resume_from_checkpoint=steps == 2)
        trainer.save_model()
    return path


SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}


def test_epsilon_is_that_of_g_records_by_the_mixture_and_by_a_full_batch(folder: Path) -> None:
    record = json.loads((folder / "privacy.json").read_text())
    q = 4 / N
    assert (record["mechanism"]["num_examples"], record["mechanism"]["sample_rate"]) == (N, q)
    assert record["epsilon"] == spent([Segment(q, 2.0, 2, contribution_bound=G)], 1e-3).epsilon
    assert record["epsilon"] > 1.3 * spent([Segment(q, 2.0, 2)], 1e-3).epsilon
    full, moved_by_g = (
        spent([Segment(1.0, 2.0, 2, contribution_bound=G)], 1e-3),
        spent([Segment(1.0, 2.0 / G, 2)], 1e-3),
    )
    assert full.epsilon == pytest.approx(moved_by_g.epsilon)  # the sum moves by G C
    assert [s.contribution_bound for s in read_ledger(folder / LEDGER_NAME).executed] == [G]


def test_whatever_names_the_unit_says_what_is_assumed_of_owners(folder: Path) -> None:
    stated = json.loads((folder / "privacy.json").read_text())
    record = Record.of(stated)
    assert [check for check in verify(folder) if not check.holds] == []
    assert (stated["unit"], stated["relation"]) == (UNIT, FIXED_OWNERS)
    assert any(
        "from the lists of owners, in the records' order, and never from what a" in s for s in record.assumptions
    )
    assert any(s.startswith("Who owns which record, how many, and together with whom") for s in record.not_covered)
    assert record.mechanism.sampler.endswith("of an owner 2 records at most, chosen by who owns which alone")
    header = read_ledger(folder / LEDGER_NAME).header
    assert (header.unit, header.relation) == (UNIT, FIXED_OWNERS)
    text = (folder / "README.md").read_text()
    front, card = yaml.safe_load(text.split("---")[1])["privacy"], " ".join(text.split())
    assert (front["unit"], front["relation"]) == (UNIT, FIXED_OWNERS)
    for words in (
        f"one {UNIT} of {N} records.**",
        "any single owner of its training records by what these say is limited",
        "somebody who knows all the other records",
        f"{FIXED_OWNERS}: one {UNIT} is replaced by an empty one",
        f"one {UNIT}; neighbours: {FIXED_OWNERS}",  # in the terms of NIST SP 800-226
        *record.assumptions,
        *record.not_covered,
    ):
        assert " ".join(words.split()) in card, words
    shown = page(folder, "model", record, verify(folder))
    assert shown.count(WORDS) >= 2
    assert WORDS in " ".join(registry_entry(record, text, "model").split())
    assert not {*PEOPLE} & {*re.findall(r"\w+", text), *re.findall(r"\w+", shown)}


def test_plan_and_trackers_say_it_too(private: DPTrainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = get_peft_model(
        M.llama(), LoraConfig(r=4, target_modules="all-linear")
    )  # a new one, of which little is said
    trainer = runs.trainer(tmp_path, adapter, RUN, train_dataset=chats())
    m = trainer.mechanism
    assert m is not None
    trainer.train()
    plan = " ".join(capsys.readouterr().out.split())
    assert WORDS in plan
    assert "of each owner G at most, chosen by who owns which alone" in plan
    assert (tracked(m)["unit"], tracked(m)["relation"]) == (UNIT, FIXED_OWNERS)
    assert BudgetSubject.run(m, "data").relation == FIXED_OWNERS
    assert (bound_in(UNIT), is_owned(UNIT), relation_of(UNIT)) == (G, True, FIXED_OWNERS)


@pytest.mark.parametrize(
    "lists", [[names[0] for names in CHATS], [names[:1] for names in CHATS], [["ann"], *CHATS[1:]]]
)
def test_other_owners_do_not_go_on_with_a_training(folder: Path, tmp_path: Path, lists: Any) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            (tmp_path / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path.relative_to(folder)).write_bytes(path.read_bytes())
    other = runs.trainer(tmp_path, None, RUN, train_dataset=chats(lists), max_steps=3, **SAVED)
    with pytest.raises((LedgerError, ConfigError), match=r"unit|num_examples|records|data"):
        other.train(resume_from_checkpoint=True)


def test_a_training_that_stops_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    settings = {**runs.NOISELESS, **NAMES, "expected_batch_size": N}
    weights = []
    for name, stops in (("once", (4,)), ("twice", (2, 4))):
        for stop in stops:
            torch.manual_seed(0)
            trainer = runs.trainer(tmp_path / name, None, settings, train_dataset=chats(), max_steps=stop, **SAVED)
            trainer.train(resume_from_checkpoint=stop != stops[0])
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]))
    assert torch.allclose(*weights, atol=1e-6)
    assert read_ledger(tmp_path / "twice" / LEDGER_NAME).num_steps == 4


# ---- a recipe --------------------------------------------------------------------------------------------------------


def with_users(tmp_path: Path, **changes: Any) -> Path:
    path = R.write(tmp_path, privacy__unit_column="users", privacy__expected_batch_size=2, **changes)
    lines = [{**note, "users": names} for note, names in zip(R.notes(len(CHATS)), CHATS, strict=True)]
    R.write_lines(tmp_path / "train.jsonl", lines)
    return path


def test_a_recipe_takes_lists_of_owners(tmp_path: Path) -> None:
    trainer = build(read(with_users(tmp_path, privacy__contribution_bound=G, privacy__target_delta=1e-2)))
    assert (trainer.mechanism.num_examples, trainer.mechanism.unit) == (N, UNIT)
    assert trainer.train_dataset["users"][:] == CHATS


@pytest.mark.parametrize("first", ["ann", "['ann', 'bob']", '["ann", "bob"]'])
def test_a_recipe_whose_lists_are_texts_is_refused(tmp_path: Path, first: str) -> None:
    """As where one of them is no list, or in a CSV file: nobody of those whom they name would be protected."""
    path = with_users(tmp_path, privacy__contribution_bound=G)
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    lists = [first, *(CHATS if first == "ann" else CHATS[1:])]
    R.write_lines(tmp_path / "train.jsonl", [line | {"users": some} for line, some in zip(lines, lists, strict=False)])
    with pytest.raises(ConfigError, match="written like a list") as error:
        build(read(path))
    assert "bob" not in str(error.value)


@pytest.mark.parametrize("other", [[["bob"]], ["bob", 1], [1], ["bob", ["cid"]]])
def test_a_recipe_whose_lists_hold_several_kinds_is_refused_by_record(tmp_path: Path, other: list[Any]) -> None:
    path = with_users(tmp_path, privacy__contribution_bound=G)
    lines = [{**note, "users": names} for note, names in zip(R.notes(3), (["ann"], other, ["ann"]), strict=True)]
    R.write_lines(tmp_path / "train.jsonl", lines)
    with pytest.raises(RecipeError, match=r"lists of texts alone.* users in records 2$"):
        build(read(path))


def test_a_recipe_that_would_draw_owners_is_refused_with_the_way_out(tmp_path: Path) -> None:
    for changes in ({}, {"privacy__records_per_unit": 4}):
        with pytest.raises(ConfigError, match="set contribution_bound=G, and leave records_per_unit out"):
            build(read(with_users(tmp_path, **changes)))
