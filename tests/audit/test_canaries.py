"""Audited runs claim for N + m slots, take canaries in as records, and put what is found on a card that verifies."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from hf_dp import AuditConfig, DPTrainer, PrivacyConfig
from hf_dp.accounting.calibration import calibrate
from hf_dp.accounting.epsilon import spent
from hf_dp.audit.report import CONFIDENCE, audit_record, counted
from hf_dp.audit.scores import log_likelihood_ratio
from hf_dp.cli import app
from hf_dp.errors import AuditError, ConfigError, LedgerError
from hf_dp.ledger.ledger import LEDGER_NAME, read_ledger
from hf_dp.mechanism import Segment
from hf_dp.sampling.microbatch import DRAW_NUMBER, MICRO_BATCHES, micro_batches
from hf_dp.training.canaries import SLOTS, Canaries
from tests.support import models as M
from tests.support import recipes as R
from tests.support import runs
from tests.support.broken import noise_divided_by_the_batch
from tests.support.folders import failures
from tests.support.marks import quick

N, M_CANARIES, B = 24, 40, 16
FALSE_ALARM = 1e-6


def audited(folder: Path, model: Any = None, **k: Any) -> DPTrainer:
    """A small audited run: 24 records and 40 canaries, unless told otherwise."""
    privacy = {"noise_multiplier": 1.0, "expected_batch_size": B, "clip_norm": 0.1, "target_delta": 1e-5}
    privacy |= k.pop("privacy", {})
    audit = AuditConfig(**{"num_canaries": M_CANARIES, **k.pop("audit", {})})
    own = {"train_dataset": k.pop("rows", runs.text_rows(N)), "data_collator": runs.collate, "audit": audit}
    own |= {name: k.pop(name) for name in ("processing_class",) if name in k}
    arguments = runs.arguments(folder, **{"max_steps": 4, "logging_steps": 1000, **k})
    return DPTrainer(
        model=M.with_lora(M.llama) if model is None else model, args=arguments, privacy=PrivacyConfig(**privacy), **own
    )


# ---- the claim stays true --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", quick(("random-token",), ["gradient", "random-token"]))
def test_mechanism_ledger_sampler_and_card_count_the_canaries(kind: str, tmp_path: Path) -> None:
    trainer = audited(tmp_path, audit={"kind": kind})
    total = N + M_CANARIES
    assert (trainer.mechanism.num_examples, trainer.mechanism.sample_rate) == (total, B / total)
    assert trainer.get_train_dataloader().batch_sampler.num_examples == total
    trainer.train()
    trainer.save_model()
    ledger = read_ledger(tmp_path / LEDGER_NAME)
    assert (ledger.header.num_examples, ledger.segments[0].sample_rate) == (total, B / total)
    record = json.loads((tmp_path / "privacy.json").read_text())
    assert record["mechanism"]["num_examples"] == total
    assert record["audit"] == json.loads(json.dumps(trainer.audit_result()))
    assert record["audit"]["num_canaries"] == M_CANARIES
    assert f"{M_CANARIES} of the records are canaries" in (tmp_path / "README.md").read_text()
    assert failures(tmp_path) == ""
    assert not [p for p in tmp_path.rglob("*") if "canar" in p.name or "audit" in p.name]  # coins stay in memory


def test_coins_are_fair_fresh_and_not_from_the_seed(tmp_path: Path) -> None:
    tossed = []
    for key in range(200):
        canaries = Canaries(AuditConfig(num_canaries=100))
        canaries.toss(key)
        tossed.append(canaries.included)
    assert stats.binomtest(int(np.sum(tossed)), 200 * 100).pvalue > FALSE_ALARM
    first, second = (audited(tmp_path / str(i), max_steps=1) for i in range(2))
    for trainer in (first, second):
        trainer.train()
    assert (first._canaries.included != second._canaries.included).any()  # the same by chance once in 2**40


def test_who_is_out_contributes_nothing_and_who_is_in_a_vector_of_norm_c(tmp_path: Path) -> None:
    trainer = audited(tmp_path, privacy={"expected_batch_size": N + M_CANARIES})  # q = 1: every slot is drawn
    trainer._canaries.toss(12345)
    [container] = trainer.get_train_dataloader()
    included = trainer._canaries.included
    assert container[SLOTS] == list(np.flatnonzero(included))
    assert sum(len(b["input_ids"]) for b in micro_batches(container)) == N
    moves = []
    for slot in range(M_CANARIES):
        flat = torch.zeros(5000)
        trainer._canaries.add_to(flat, {SLOTS: [slot]}, 0.1)
        moves.append(flat)
    products = torch.stack(moves) @ torch.stack(moves).T
    assert torch.allclose(products, 0.01 * torch.eye(M_CANARIES), atol=1e-8)  # norm C, each in its own direction


def test_token_canaries_are_records_like_the_others_and_those_out_are_no_records(tmp_path: Path) -> None:
    trainer = audited(tmp_path, audit={"kind": "random-token"}, privacy={"expected_batch_size": N + M_CANARIES})
    trainer._canaries.toss(1)
    trainer._canaries.make_rows(trainer.train_dataset[0], M.VOCAB, None)
    [container] = trainer.get_train_dataloader()
    seen = [row.tolist() for batch in micro_batches(container) for row in batch["input_ids"]]
    assert len(seen) == N + trainer._canaries.included.sum()
    for row, is_in in zip(trainer._canaries.rows, trainer._canaries.included, strict=True):
        assert any(s[: len(row["input_ids"])] == row["input_ids"] for s in seen) == is_in
    assert container[SLOTS] == []
    assert DRAW_NUMBER in container


def test_a_positive_control_reads_no_record(tmp_path: Path) -> None:
    privacy = {"noise_multiplier": 0.0}
    with pytest.raises(ConfigError, match="noise_multiplier=0"):
        audited(tmp_path, audit={"control": True})
    trainer = audited(tmp_path, audit={"control": True}, privacy=privacy, max_steps=20)
    trainer.train()
    assert all(container[MICRO_BATCHES] == [] for container in trainer.get_train_dataloader())
    assert trainer.audit_result()["area_under_curve"] > 0.9


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"privacy": {"noise": "discrete"}}, "no place on the grid"),
        ({"privacy": {"log_loss_up_to": 4.0}}, "log_loss_up_to"),
        ({"audit": {"num_canaries": 3}}, "from 10 to"),
        ({"audit": {"kind": "dirac"}}, "kind must be one of"),
    ],
)
def test_what_cannot_be_audited_is_refused_by_name(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        audited(tmp_path, **settings)


@pytest.mark.slow
def test_resuming_and_asking_too_early_are_errors(tmp_path: Path) -> None:
    trainer = audited(tmp_path, save_strategy="steps", save_steps=2)
    with pytest.raises((ConfigError, AuditError)):
        trainer.audit_result()
    trainer.train()
    with pytest.raises(ConfigError, match="does not resume"):
        audited(tmp_path, max_steps=8).train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="resize_token_embeddings"):
        audited(tmp_path / "new", audit={"kind": "new-token"}).train()


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_audits_a_recipe_at_claim_1(tmp_path: Path) -> None:
    recipe = R.write(tmp_path, training__max_steps=3)
    done = CliRunner().invoke(app, ["audit", str(recipe), "--num-canaries", "40"])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out" / "privacy.json").read_text())
    assert 0.9 < record["epsilon"] <= 1
    assert record["delta"] == 1e-5
    assert record["mechanism"]["num_examples"] == 80
    assert record["audit"]["control_area_under_curve"] is not None
    assert "epsilon at least" in done.output
    assert "Not refuted" in done.output
    again = CliRunner().invoke(app, ["audit", str(recipe)])
    assert isinstance(again.exception, LedgerError)


# ---- the figures -----------------------------------------------------------------------------------------------------


def simulated(segment: Segment, sigma: float, generator: np.random.Generator, m: int = 300) -> Any:
    """Counts of a run whose noise is really `sigma`, scored as it should be by what it claims."""
    included = generator.random(m) < 0.5
    present = (generator.random((segment.num_steps, m)) < segment.sample_rate) & included
    seen = present + sigma * generator.standard_normal((segment.num_steps, m))
    return counted(
        "gradient", log_likelihood_ratio(seen, segment.sample_rate, segment.joint_noise_multiplier), included
    )


def test_correct_runs_are_rarely_refuted_and_broken_ones_often() -> None:
    """U4: of 200 audits at claim 1, 5 % and three standard errors may be refuted; all where noise is divided by B."""
    q, steps, delta = 24 / 400, 100, 1e-5
    segment = Segment(q, calibrate(1.0, sample_rate=q, num_steps=steps, delta=delta), steps)
    epsilon, generator = spent([segment], delta).epsilon, np.random.default_rng(0)
    wrong = 0
    for _ in range(200):
        record = audit_record(simulated(segment, segment.joint_noise_multiplier, generator), [segment], delta, epsilon)
        assert record.epsilon_at_least <= epsilon or record.refuted
        wrong += record.refuted
    allowed = 1 - CONFIDENCE
    assert wrong <= 200 * (allowed + 3 * math.sqrt(allowed * (1 - allowed) / 200))
    for _ in range(20):
        record = audit_record(
            simulated(segment, segment.joint_noise_multiplier / 24, generator), [segment], delta, epsilon
        )
        assert record.refuted
        assert record.epsilon_at_least > epsilon


def small_claim(folder: Path, **k: Any) -> DPTrainer:
    """U1: claim 1, 300 gradient canaries, 100 records, 60 steps."""
    model = M.with_lora(partial(M.llama, hidden_size=32), r=8)
    privacy = {"noise_multiplier": None, "target_epsilon": 1.0, "expected_batch_size": 24}
    audit = {"num_canaries": 300, **k.pop("audit", {})}
    return audited(
        folder, model, audit=audit, privacy=privacy, rows=runs.text_rows(100), max_steps=60, learning_rate=0.01, **k
    )


@pytest.mark.slow
def test_noise_divided_by_the_batch_is_refuted_on_the_card_and_by_verify(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        noise_divided_by_the_batch(patch)
        trainer = small_claim(tmp_path)
        trainer.train()
    trainer.save_model()
    assert trainer.audit_result()["refuted"]
    assert trainer.audit_result()["epsilon_at_least"] > 1
    assert "REFUTED" in (tmp_path / "README.md").read_text()
    assert "the audit does not refute the claim" in failures(tmp_path)


@pytest.mark.slow
def test_ten_correct_runs_and_five_with_noise_divided_by_the_batch(tmp_path: Path) -> None:
    """U1 in whole."""
    correct = []
    for repeat in range(10):
        trainer = small_claim(tmp_path / f"correct {repeat}")
        trainer.train()
        correct.append(trainer.audit_result()["refuted"])
    assert sum(correct) <= 1
    broken = []
    for repeat in range(5):
        with pytest.MonkeyPatch.context() as patch:
            noise_divided_by_the_batch(patch)
            trainer = small_claim(tmp_path / f"broken {repeat}")
            trainer.train()
        broken.append(trainer.audit_result()["refuted"])
    assert sum(broken) >= 4
