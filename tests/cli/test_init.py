"""`hf-dp init` and `hf-dp recipe`: a recipe that runs, from the columns, from answers or from flags; and all keys."""

import csv
import io
import json
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

from hf_dp.config import PrivacyConfig
from hf_dp.recipe import read
from hf_dp.recipe.starting import batch_for, epochs_for
from tests.support import recipes as R


def table(path: Path, columns: dict[str, list[str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """A new folder with a model and a table; it is the current one."""
    monkeypatch.chdir(tmp_path)
    R.save_causal_lm(tmp_path / "base")
    table(tmp_path / "notes.csv", {"customer": ["a", "b"] * 60, "note": ["the pub is cheap", "the price is blue"] * 60})
    return tmp_path / "notes.csv"


def answered(monkeypatch, *lines: str) -> None:
    """A person at a terminal, who gives these answers."""
    terminal = io.StringIO("".join(f"{line}\n" for line in lines))
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)


def test_three_commands_make_a_private_model_of_a_table(hf_dp, notes):
    status, out, err = hf_dp("init", "notes.csv", "--model", "base", "--epsilon", 4)
    assert status == 0, err
    assert "120 records of customer (text), note (text)" in out
    assert "--unit-column customer" in out
    status, out, err = hf_dp("train", "notes.yaml", "training.max_steps=2", "training.logging_steps=1")
    assert status == 0, err
    assert "epsilon" in out
    logged = [json.loads(line) for line in Path("out/notes/metrics.jsonl").read_text().splitlines()]
    assert {"step", "epsilon", "learning_rate", "signal_to_noise"} <= {*logged[0]}
    assert not {"loss", "train_loss"} & {name for line in logged for name in line}
    status, out, err = hf_dp("generate", "out/notes", "the", "--max-new-tokens", 3)
    assert status == 0, err
    assert out.strip()


def test_what_is_found_in_the_columns_stands_in_the_recipe(hf_dp, notes):
    assert hf_dp("init", "notes.csv", "--model", "base")[0] == 0
    made = read("notes.yaml")
    assert made.data.target == "{note}"
    assert made.data.prompt is None
    assert made.data.max_length == 32  # the model's positions
    assert made.privacy.target_epsilon == 8
    assert made.privacy.unit_column is None
    assert "# unit_column: customer" in Path("notes.yaml").read_text()
    assert "the pub" not in Path("notes.yaml").read_text()  # nothing that stands in a record


def test_lists_of_owners_get_a_bound(hf_dp, notes):
    users = [["ann", "bob"], ["ann"], ["bob"]] * 10
    lines = [json.dumps({"users": names, "note": "the pub is red"}) for names in users]
    Path("chats.jsonl").write_text("\n".join(lines))
    status, _, err = hf_dp("init", "chats.jsonl", "--model", "base", "--unit-column", "users")
    assert status == 0, err
    made = read("chats.yaml")
    assert (made.privacy.unit_column, made.privacy.contribution_bound) == ("users", 4)
    assert "(8 records)" in Path("chats.yaml").read_text()  # of which nobody owns more than 4


def test_it_asks_a_person_at_a_terminal(hf_dp, notes, monkeypatch):
    answered(monkeypatch, "notes.csv", "{note}.", r"{customer}\n", "base", "2", "y")
    status, _, err = hf_dp("init")
    assert status == 0, err
    made = read("notes.yaml")
    assert (made.data.target, made.data.prompt) == ("{note}.", "{customer}\n")
    assert (made.model.name, made.privacy.target_epsilon, made.privacy.unit_column) == ("base", 2, "customer")


@pytest.mark.parametrize(
    ("columns", "arguments", "templates"),
    [
        (("question", "answer"), (), {"prompt": "{question}\n", "target": "{answer}"}),
        (("Prompt", "Completion"), (), {"prompt": "{Prompt}\n", "target": "{Completion}"}),
        (("title", "body"), ("--target", "{title}: {body}"), {"target": "{title}: {body}"}),
        (("text", "label"), ("--label", "label", "--labels", "sad, glad"), {"text": "{text}", "label": "label"}),
    ],
)
def test_templates_follow_from_names_and_flags(columns, arguments, templates, hf_dp, notes):
    table(notes, {columns[0]: ["a longer text"] * 40, columns[1]: ["sad"] * 40})
    status, _, err = hf_dp("init", "notes.csv", "--model", "base", *arguments)
    assert status == 0, err
    data = read("notes.yaml").data
    assert {key: getattr(data, key) for key in ("prompt", "target", "text", "label")} == dict.fromkeys(
        ("prompt", "target", "text", "label")
    ) | templates
    assert data.labels == (["sad", "glad"] if "--label" in arguments else None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "hf-dp init RECORDS.csv"),
        (("none.csv",), "cannot read none.csv"),
        (("notes.txt",), "expected a file ending in .jsonl"),
        (("notes.csv", "--target", "{nope}"), "no column 'nope'"),
        (("notes.csv", "--label", "customer"), "--labels yes,no"),
        (("notes.csv", "--epsilon", "-1"), "target_epsilon must be a finite number above 0"),
        (("notes.csv", "--output", "notes.csv"), "exists already"),
        (("numbers.csv.parquet",), "no column holds text"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(arguments, said, hf_dp, notes):
    import pyarrow
    import pyarrow.parquet

    (notes.parent / "notes.txt").write_text("a note")
    pyarrow.parquet.write_table(pyarrow.table({"age": [1, 2]}), notes.parent / "numbers.csv.parquet")
    status, _, err = hf_dp("init", *arguments)
    assert status == 2
    assert said in err
    assert not list(notes.parent.glob("*.yaml"))


def test_batch_and_epochs_follow_the_number_of_records():
    sizes = [(n, batch_for(n), epochs_for(n)) for n in (30, 1_000, 42_061, 200_000, 10_000_000)]
    assert sizes == [(30, 8, 10), (1_000, 64, 10), (42_061, 1024, 10), (200_000, 1024, 3), (10_000_000, 1024, 1)]


@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification"])
def test_a_recipe_to_start_from_can_be_read(task, hf_dp, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = hf_dp("recipe", task)
    assert status == 0
    R.write_lines(tmp_path / "records.jsonl", [{"text": "a", "label": "first class"}])
    (tmp_path / "recipe.yaml").write_text(out)
    assert read("recipe.yaml").model.task == task


def test_keys_are_those_of_the_settings_with_their_defaults(hf_dp):
    status, out, _ = hf_dp("recipe", "--keys")
    assert status == 0
    listed = dict(line.split(": ", 1) for line in out.splitlines() if not line.startswith(" "))
    assert {f"privacy.{f.name}" for f in fields(PrivacyConfig)} <= {*listed}
    assert {f"training.{f.name}" for f in fields(TrainingArguments) if f.init} <= {*listed}
    assert listed["data.train"] == "(must be given)"
    assert listed["privacy.expected_batch_size"] == "256"
    assert listed["training.num_train_epochs"] == "3.0"
    assert listed["training.output_dir"] == "out/RECIPE"
    assert {"training.micro_batch_tokens", "lora.r", "model.task"} <= {*listed}
    assert all(len(line) <= 80 for line in out.splitlines() if line.startswith("    ") and "http" not in line)
    assert hf_dp("recipe", "prefrence")[2].count("did you mean 'preference'") == 1
