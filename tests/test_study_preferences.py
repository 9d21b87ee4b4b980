"""The study of preferences: pairs that favour no text, margins by hand, and a whole run on made-up records."""

import json
import runpy
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax

from tests.support import models as M

pytest.importorskip("trl", reason="trl is not installed")

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`scripts/study_preferences`, in this process."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return runpy.run_path(str(SCRIPTS / "study_preferences"))


def records(facts: int, texts: int) -> list[dict[str, Any]]:
    return [{"facts": f"facts {i}", "text": f"text {i} {k}"} for i in range(facts) for k in range(texts)]


def test_no_facts_are_in_both_halves_and_no_record_is_in_two_pairs(study: dict[str, Any]) -> None:
    public, private = study["halves"](records(40, 5), "facts")
    assert not {r["facts"] for r in public} & {r["facts"] for r in private}
    assert len(public) + len(private) == 200
    pairs = study["training_pairs"](private)
    texts = [pair[name] for pair in pairs for name in ("chosen", "rejected")]
    assert len(texts) == len(set(texts)) > 80
    own = {r["text"]: r["facts"] for r in private}
    assert all(own[pair["chosen"]] == pair["prompt"] != own[pair["rejected"]] for pair in pairs)


def test_whoever_does_not_read_the_facts_prefers_half_of_the_held_out_pairs(study: dict[str, Any]) -> None:
    pairs = study["held_out_pairs"](records(7, 4))
    assert len(pairs) == 3 * study["MOST_TEXTS"] * 2  # three couples of facts
    liking = {r["text"]: torch.rand(1).item() for r in records(7, 4)}
    margins = [liking[pair["chosen"]] - liking[pair["rejected"]] for pair in pairs]
    assert sum(margins) == pytest.approx(0, abs=1e-6)
    assert statistics.mean(margin > 0 for margin in margins) == 0.5
    assert all(len({pair["prompt"] for pair in pairs if pair["couple"] == couple}) == 2 for couple in range(3))


def test_the_standard_error_counts_couples(study: dict[str, Any]) -> None:
    values = [1.0, 4.0, 2.0, 7.0]
    alone = study["standard_error"](values, [0, 1, 2, 3])
    assert alone == pytest.approx(statistics.stdev(values) / 2)
    twice = study["standard_error"]([v for v in values for _ in range(2)], [c for c in range(4) for _ in range(2)])
    assert twice == pytest.approx(alone)


def test_log_probabilities_are_those_of_one_row_at_a_time(study: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = M.llama(num_hidden_layers=1).eval()
    rows = [([3, 4], [5, 6, 7]), ([8], [9]), ([3, 5, 7, 9], [4, 4])]
    found = study["log_probabilities"](model, rows)
    for value, (prompt, answer) in zip(found, rows, strict=True):
        with torch.no_grad():
            scores = log_softmax(model(torch.tensor([prompt + answer])).logits[0], -1)
        at = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        assert float(value) == pytest.approx(
            sum(float(scores[i, t]) for i, t in zip(at, answer, strict=True)), abs=1e-4
        )


def test_it_runs_and_goes_on_where_it_stopped(
    study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["study_preferences", str(tmp_path), "--quick"])
    study["main"]()
    first, log = capsys.readouterr().out, (tmp_path / "results.json").read_text()
    rows = {row[0]: row for row in (line.split(" | ") for line in first.splitlines()) if len(row) == 6}
    assert list(rows) == ["start", "plain DPO", "private DPO"]
    assert float(rows["private DPO"][1]) <= 8
    assert "private-0: the card states the unit, a pair of answers. hf-dp verify: Verified" in first
    run = json.loads(log)["runs"]["test|private DPO||0"]
    assert (run["unit"], run["num_pairs"]) == ("pair of answers", 100)
    study["main"]()
    assert capsys.readouterr().out == first
    assert (tmp_path / "results.json").read_text() == log
