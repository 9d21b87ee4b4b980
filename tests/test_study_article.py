"""The study of the article on made-up records: the epsilon of each way of clipping, and no card of a broken run."""

import json
import math
import os
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_dp.accounting.epsilon import spent
from hf_dp.audit.one_run import gaussian_epsilon
from hf_dp.mechanism import Segment

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "study_article"
STEPS, BATCH, RECORDS = 2, 16, 400  # of --quick


def load() -> Any:
    sys.path.insert(0, str(SCRIPT.parent))  # as for a script that is run: it imports what the scripts share
    module = module_from_spec(spec_from_loader("study_article", SourceFileLoader("study_article", str(SCRIPT))))
    sys.modules["study_article"] = module  # dataclasses and named tuples look their module up
    module.__spec__.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def study() -> Any:
    return load()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("study")
    command = [sys.executable, str(SCRIPT), str(folder), "--quick"]
    environment = {name: value for name, value in os.environ.items() if name != "HF_DP_DATA"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def runs_of(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / "results.json").read_text())["runs"]


@pytest.mark.slow
def test_it_states_the_epsilon_of_each_way_of_clipping(finished: tuple[Path, str]) -> None:
    runs, q = runs_of(finished[0]), BATCH / RECORDS
    delta = runs["made-up|per-example|1.5|0"]["delta"]

    def epsilon(sigma: float) -> float:
        return spent([Segment(q, sigma, STEPS)], delta).epsilon

    ways = {
        way: runs[f"made-up|{way}|1.5|0"] for way in ("per-example", "whole-batch", "whole-batch, on mean", "unclipped")
    }
    assert all(run["claimed"] == pytest.approx(epsilon(1.5)) for run in ways.values())
    assert ways["per-example"]["epsilon"] == pytest.approx(epsilon(1.5))
    assert ways["whole-batch, on mean"]["epsilon"] == pytest.approx(epsilon(0.75))  # sensitivity 2 C, noise 1.5 C
    assert ways["unclipped"]["epsilon"] is None  # infinite
    # sensitivity 2 B C, noise 1.5 C: a lower bound from one step, so not above what both cost with every record in them
    assert 100 < ways["whole-batch"]["epsilon"] <= gaussian_epsilon(math.sqrt(STEPS) * 2 * BATCH / 1.5, delta)
    assert runs["made-up|per-example|0|0"]["epsilon"] is None
    tiny = runs["made-up|per-example|tiny|0"]
    assert tiny["epsilon"] <= 1e-3 < 1.01 * tiny["epsilon"]


@pytest.mark.slow
def test_noise_that_falls_spends_as_much_as_constant_noise(finished: tuple[Path, str]) -> None:
    runs = runs_of(finished[0])
    falling = [runs[f"made-up|{noise}, rate linear|falling|0"] for noise in ("constant", "exponential:0.5")]
    assert [run["epsilon"] for run in falling] == pytest.approx([2, 2], rel=2e-3)  # what calibration may leave unused
    assert falling[1]["noise_multiplier"] > falling[0]["noise_multiplier"]  # that of the first level


@pytest.mark.slow
def test_audits_have_power_and_refute_no_correct_run(finished: tuple[Path, str]) -> None:
    runs = runs_of(finished[0])
    assert runs["audit|control|0|0"]["area_under_curve"] > 0.9
    assert (
        runs["audit|whole-batch|1.5|0"]["area_under_curve"] > 0.8
    )  # 50 coins: 0.5 would be six standard deviations off
    correct = runs["audit|per-example|1.5|0"]
    assert not correct["refuted"]
    assert (
        correct["epsilon_at_least"] <= correct["claimed"] == pytest.approx(spent([Segment(1.0, 1.5, 1)], 1e-5).epsilon)
    )


@pytest.mark.slow
def test_it_leaves_results_and_a_picture_and_no_card_or_ledger(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    assert (folder / "study.png").read_bytes().startswith(b"\x89PNG")
    assert not [p for p in folder.rglob("*") if p.name in ("README.md", "privacy.json", "privacy_ledger.jsonl")]
    assert "Epsilon 0.001 needs sigma" in printed
    json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)  # no Infinity: any reader takes it


def test_runs_that_stand_there_are_not_repeated_and_other_settings_are_refused(study: Any, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    study.Results(path, {"a": {"steps": 1}}).add("a|per-example|1|0", {"epsilon": math.inf})
    assert study.Results(path, {"a": {"steps": 1}}).runs == {"a|per-example|1|0": {"epsilon": None}}
    with pytest.raises(SystemExit, match="other settings"):
        study.Results(path, {"a": {"steps": 2}})


@pytest.mark.parametrize("norm", [0.5, 40.0])
def test_a_batch_is_clipped_as_a_whole(study: Any, norm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    step = study.BrokenStep.__new__(study.BrokenStep)
    step.bound, step.sum = 8.0, SimpleNamespace(flat=torch.zeros(100))
    direction = torch.nn.functional.normalize(torch.randn(100), dim=0)
    monkeypatch.setattr(study.PrivateStep, "sum_up", lambda self, *_: self.sum.flat.copy_(norm * direction))
    step.sum_up([])
    torch.testing.assert_close(step.sum.flat, min(norm, 8.0) * direction)


def test_a_broken_trainer_writes_no_card(study: Any, tmp_path: Path) -> None:
    data = dict(study.made_up(tmp_path / "data", True))["made-up"]
    trainer = study.trained(data, study.BATCH, 0, tmp_path / "out", noise_multiplier=1.0)
    trainer.save_model()
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert "adapter_model.safetensors" in names
    assert not names & {"privacy.json", "privacy_tradeoff.svg"}
    card = tmp_path / "out" / "README.md"
    assert not card.exists() or "privacy" not in card.read_text()
