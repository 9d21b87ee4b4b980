"""The studies of preferences and of synthetic texts run on made-up records, and print what they promise."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_dp.card import verify

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Reads a script in this process, to be called with arguments behind its output folder."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def read(name: str, *arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [name, str(tmp_path), *arguments])
        return runpy.run_path(str(SCRIPTS / name))

    return read


def test_pairs_are_of_two_records_each_and_share_none(study: Any, tmp_path: Path) -> None:
    records = [{"mr": f"name[{i // 3}]", "ref": f"text {i}"} for i in range(41)]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_pairs = study("study_preferences")["write_pairs"]
    path = write_pairs(tmp_path / "records.jsonl", ("mr", "ref"), tmp_path / "pairs.jsonl")
    pairs = [json.loads(line) for line in path.read_text().splitlines()]
    facts = {record["ref"]: record["mr"] for record in records}
    assert len(pairs) == sum(first // 3 != (first + 1) // 3 for first in range(0, 40, 2)) < 20
    assert all(facts[pair["chosen"]] == pair["prompt"] != facts[pair["rejected"]] for pair in pairs)
    used = [pair[answer] for pair in pairs for answer in ("chosen", "rejected")]
    assert len(used) == len(set(used))


def test_preferences_are_learnt_privately(study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    study("study_preferences", "--quick", "--no-plain")["main"]()
    printed = capsys.readouterr().out.splitlines()
    start, private = (line.split(" | ") for line in printed if " | " in line)
    assert (start[0], start[2], private[0]) == ("start", "0.00", "private")
    assert 0 < float(start[1]) <= 8
    assert 0 < float(private[1]) <= 8
    assert float(private[4]) - float(start[4]) == pytest.approx(float(private[2]), abs=0.02)
    in_pairs, others = ((tmp_path / f"{name}.jsonl").read_text() for name in ("pairs", "rest"))
    assert not [record for record in map(json.loads, others.splitlines()) if f'"{record["note"]}"' in in_pairs]
    assert printed[-1] == f"{tmp_path / 'private'} verifies; its unit of privacy is the pair of answers."


def test_made_up_facts_have_the_kinds_of_one_and_values_of_others(study: Any) -> None:
    asked_for = study("study_synthetic")["asked_for"]
    public = ["name[A], area[b]", "name[C], food[d], near[e f]", "name[G], area[h]"]
    found = asked_for(public, 200)
    assert len(found) == 200
    assert {"name[C], area[h]", "name[A], food[d], near[e f]"} < set(found)
    assert all(text.startswith("name[") and ("area[" in text) != ("food[d], near[e f]" in text) for text in found)
    assert set(asked_for(["heating", "gas"], 20)) == {"heating", "gas"}


def test_a_plain_model_is_trained_on_texts_alone(
    study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study("study_synthetic", "--quick")["main"]()
    printed = capsys.readouterr().out.splitlines()
    rows = dict(line.split(" | ") for line in printed if " | " in line)
    assert set(rows) == {"base", "private, on the records", "plain, on the texts"}
    assert len(set(rows.values())) == 3
    assert not [check.name for folder in ("private", "texts") for check in verify(tmp_path / folder) if not check.holds]
