"""The benchmarks run, and print what they promise. Nothing is asserted about time."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "scripts" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_whole_runs(tmp_path: Path) -> None:
    printed = run("bench_run", "--quick", "--picture", str(tmp_path / "runs.png"))
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("made-up | ")]
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    assert [row[1] for row in rows] == ["plain", "plain, length-grouped", "ours", "Opacus ghost", "fastDP"]
    for row in rows:
        assert row[2].endswith(" s") or row[2].startswith("not installed"), row
    passed = {row[1]: float(row[6]) for row in rows if len(row) > 3}
    assert passed["plain"] >= passed["plain, length-grouped"] >= 1  # padding and nothing less


@pytest.mark.slow
def test_data_that_are_missing_are_named(tmp_path: Path) -> None:
    assert f"E2E | {tmp_path / 'e2e_nlg'} is missing" in run("bench_run", "--data", str(tmp_path), "--sets", "E2E")


@pytest.fixture
def utility(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`scripts/bench_utility`, in this process."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return runpy.run_path(str(ROOT / "scripts/bench_utility"))


@pytest.mark.slow
def test_utility_runs_and_goes_on_where_it_stopped(
    utility: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given, people = "training.learning_rate=0.5", "privacy.unit_column=topic privacy.expected_batch_size=1"
    argv = ["bench_utility", str(tmp_path), "--quick", "--threads", "1", "--only-with", "--with", given, people]
    monkeypatch.setattr(sys, "argv", argv)
    utility["main"]()
    first = capsys.readouterr().out.splitlines()
    log = (tmp_path / "runs.jsonl").read_text()
    runs = {run["way"]: run for run in map(json.loads, log.splitlines())}
    assert list(runs) == ["no fine-tuning", "plain", given, people]
    assert [runs[way]["used"]["num_examples"] for way in (given, people)] == [400, 3]
    assert runs[given]["used"]["learning_rate"] == 0.5
    assert runs["plain"]["value"] != runs["no fine-tuning"]["value"] != runs[given]["value"]
    utility["main"]()
    assert (tmp_path / "runs.jsonl").read_text() == log
    table = [line for line in first if line.startswith("made-up | ")]
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("made-up | ")] == table
    assert table[1].endswith("| 100%")


def test_shares_are_of_the_gain_of_plains_best_rate(utility: dict[str, Any]) -> None:
    def run(way: str, value: float, rate: float | None = None, epsilon: float | None = None) -> dict[str, Any]:
        return {"measure": "accuracy", "way": way, "value": value, "rate": rate, "epsilon": epsilon}

    done = [run("no fine-tuning", 0.5), *(run("plain", v, 0.1) for v in (0.6, 0.7, 0.6))]
    done += [run("plain", v, 0.01) for v in (0.8, 0.9, 0.9)] + [run("ours", 0.7, epsilon=8.0)]
    found = utility["shares"](done)
    assert set(found) == {("no fine-tuning", None), ("plain, rate 0.01", None), ("ours", 8.0)}
    assert found["ours", 8.0][1] == pytest.approx([0.5])
    assert found["plain, rate 0.01", None][1] == pytest.approx([0.75, 1, 1])


def test_no_fine_tuning_has_none_of_the_gain_where_lower_is_better(utility: dict[str, Any]) -> None:
    runs = (("no fine-tuning", 2.0, None), ("plain", 1.5, 0.1))
    done = [{"measure": "nats_per_character", "way": w, "value": v, "rate": r, "epsilon": None} for w, v, r in runs]
    found = utility["shares"](done)
    assert utility["spread"](found["no fine-tuning", None][1], ".0%") == "0%"


@pytest.mark.slow
def test_overhead() -> None:
    printed = run("bench_overhead", "--quick")
    rows = {row[0]: row for row in (line.split(" | ") for line in printed.splitlines()) if len(row) == 5}
    plain, ours = (int(rows[name][3].replace(",", "")) for name in ("plain", "ours"))
    assert rows["plain"][2] == "1.00 [1.00, 1.00]"
    assert int(rows["ours"][4]) == ours - plain


@pytest.mark.slow
def test_one_device(tmp_path: Path) -> None:
    printed = run("bench_gpu", "--cpu", "--tiny", "--json", str(tmp_path / "gpu.json"))
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found) == ["card", "torch", "exactness", "noise", "memory", "speed", "profile", "release"]
    assert all(found["exactness"][case]["ok"] for case in ("LoRA", "full", "checkpointed", "bfloat16"))
    assert found["memory"]["sizes_tried"][0] > found["memory"]["sizes_tried"][-1]
    assert {"plain", "ours", "Opacus ghost", "Opacus hooks"} <= set(found["speed"][0]["methods"])
    assert len(found["profile"]["more_milliseconds"]) == 5
    assert "release | 20,000 | " in printed


@pytest.mark.slow
@pytest.mark.timeout(900)  # 16 starts of Python, and slower where other programs run
def test_growth(tmp_path: Path) -> None:
    printed = run("bench_growth", str(tmp_path / "growth.png"), "--quick")
    assert all(name in printed for name in ("logical batch", "tokens in a record", "rank of LoRA", "parameters"))
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
