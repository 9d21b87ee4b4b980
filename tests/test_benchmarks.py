"""The benchmarks run, and print what they promise. Nothing is asserted about time."""

import json
import subprocess
import sys
from pathlib import Path

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


def test_data_that_are_missing_are_named(tmp_path: Path) -> None:
    assert f"E2E | {tmp_path / 'e2e_nlg'} is missing" in run("bench_run", "--data", str(tmp_path), "--sets", "E2E")


def test_overhead() -> None:
    printed = run("bench_overhead", "--quick")
    rows = {row[0]: row for row in (line.split(" | ") for line in printed.splitlines()) if len(row) == 5}
    plain, ours = (int(rows[name][3].replace(",", "")) for name in ("plain", "ours"))
    assert rows["plain"][2] == "1.00 [1.00, 1.00]"
    assert int(rows["ours"][4]) == ours - plain


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
