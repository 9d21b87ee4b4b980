"""Training loss and batch size are coordinates of the one release: their noise and share of epsilon; no exact log."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_dp import PrivacyConfig
from hf_dp.accounting.derivation import derivation
from hf_dp.accounting.epsilon import spent
from hf_dp.accounting.plan import plan_mechanism
from hf_dp.card.verification import verify
from hf_dp.errors import AccountingError, ConfigError, ReleaseError
from hf_dp.ledger.ledger import LEDGER_NAME, read_ledger
from hf_dp.mechanism import METRIC_NOISE, Mechanism, Segment
from hf_dp.step.metrics import ReleasedMetrics, contribution
from hf_dp.step.opening import Place, Session
from hf_dp.step.run import PrivateRun
from tests.support import models as M
from tests.support import reference, runs
from tests.support.marks import quick
from tests.support.noise_checks import assert_gaussian, assert_uncorrelated, std_is

E2E = {"sample_rate": 1024 / 42061, "num_steps": 410}
DELTA = 8e-6
PRIVATE = {"noise_multiplier": 1.0, "target_delta": 1e-3, "expected_batch_size": 8, "log_loss_up_to": 3.0}
MECHANISM = Mechanism(
    num_examples=1000,
    expected_batch_size=50,
    num_steps=10,
    noise_multiplier=1.3,
    clip_norm=0.2,
    delta=1e-4,
    loss_bound=4.0,
)


def epsilon(*sigmas: float, delta: float) -> float:
    """Of releases that are charged one beside the other."""
    return spent([Segment(E2E["sample_rate"], s, int(E2E["num_steps"])) for s in sigmas], delta).epsilon


# ---- accounting ------------------------------------------------------------------------------------------------------


def test_the_joint_release_has_the_noise_multiplier_of_its_parts_together() -> None:
    for sigma in (0.3, 0.68264, 1.0, 7.0):
        parts = [sigma, METRIC_NOISE * sigma, METRIC_NOISE * sigma]
        joint = dataclasses.replace(MECHANISM, noise_multiplier=sigma).joint_noise_multiplier
        assert joint == pytest.approx(sum(s**-2 for s in parts) ** -0.5, rel=1e-12)
        assert dataclasses.replace(MECHANISM, noise_multiplier=sigma, loss_bound=None).joint_noise_multiplier == sigma
    assert dataclasses.replace(MECHANISM, noise_multiplier=1.0).joint_noise_multiplier == pytest.approx(0.99014754)


def test_two_charges_for_one_draw_would_say_too_little() -> None:
    """Why the metrics are no second release: who is in one is in the other, which two charges do not know."""
    gradient, other = 0.6785, 1.0
    assert epsilon(gradient, other, delta=1e-5) == pytest.approx(8.59, abs=0.01)
    assert epsilon((gradient**-2 + other**-2) ** -0.5, delta=1e-5) == pytest.approx(13.56, abs=0.01)


def test_what_the_metrics_cost_at_the_published_setting() -> None:
    without = plan_mechanism(
        PrivacyConfig(target_epsilon=8.0, target_delta=DELTA, expected_batch_size=1024), 42061, num_train_epochs=10
    )
    with_metrics = plan_mechanism(
        PrivacyConfig(target_epsilon=8.0, target_delta=DELTA, expected_batch_size=1024, log_loss_up_to=10.0),
        42061,
        num_train_epochs=10,
    )
    assert (without.noise_multiplier, with_metrics.noise_multiplier) == (0.68264, 0.68943)  # 1 % more noise
    assert spent(with_metrics.segments(), DELTA).epsilon == pytest.approx(7.996, abs=0.005)
    same_noise = dataclasses.replace(without, loss_bound=10.0)
    assert spent(same_noise.segments(), DELTA).epsilon == pytest.approx(8.2126, abs=0.001)


@pytest.mark.parametrize(
    ("target", "n", "batch", "steps"), [(8, 42061, 1024, 410), (1, 1000, 50, 60), (0.2, 500, 500, 3)]
)
def test_calibration_with_metrics_never_exceeds_the_target(target: float, n: int, batch: int, steps: int) -> None:
    """Of what is charged, the joint multiplier, and as the very float that is charged."""
    config = PrivacyConfig(target_epsilon=target, expected_batch_size=batch, log_loss_up_to=2.0)
    m = plan_mechanism(config, n, num_train_epochs=1, max_steps=steps)
    assert target * 0.998 <= spent(m.segments(), m.delta).epsilon <= target
    assert m.segments()[0].joint_noise_multiplier == m.joint_noise_multiplier < m.noise_multiplier
    assert spent([Segment(m.sample_rate, m.noise_multiplier, steps)], m.delta).epsilon < 0.995 * target


def test_the_plan_states_bound_noise_and_joint_multiplier() -> None:
    config = PrivacyConfig(noise_multiplier=1.3, expected_batch_size=50, clip_norm=0.2, log_loss_up_to=4.0)
    m = plan_mechanism(config, 1000, num_train_epochs=1)
    rows = {row.name: row.value for row in derivation(config, m, num_train_epochs=1)}
    assert float(rows["noise multiplier sigma"]) == 1.3
    assert float(rows["joint noise multiplier"]) == pytest.approx(1.3 / math.sqrt(1.02))
    assert float(rows["noise on a logged loss"]) == pytest.approx(10 * 1.3 * 4.0 / 50)
    assert float(rows["noise on a logged batch size"]) == pytest.approx(13.0)
    plain = dataclasses.replace(config, log_loss_up_to=None)
    assert not any(
        "logged" in row.name
        for row in derivation(plain, plan_mechanism(plain, 1000, num_train_epochs=1), num_train_epochs=1)
    )


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, True, "10", 1e-9, 1e9])
def test_a_bound_that_is_none_is_refused(bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"log_loss_up_to must be a number from 0\.001"):
        PrivacyConfig(target_epsilon=8.0, log_loss_up_to=bad)


def test_noise_too_weak_for_the_joint_release_is_refused() -> None:
    with pytest.raises(ConfigError, match="noise_multiplier must be 0"):
        plan_mechanism(
            PrivacyConfig(noise_multiplier=0.01, expected_batch_size=5, log_loss_up_to=1.0), 100, num_train_epochs=1
        )
    with pytest.raises(AccountingError):
        plan_mechanism(
            PrivacyConfig(target_epsilon=1e8, expected_batch_size=5, log_loss_up_to=1.0), 100, num_train_epochs=1
        )


# ---- what an example contributes -------------------------------------------------------------------------------------


def test_a_loss_is_clamped_and_one_that_is_not_finite_counts_as_nothing() -> None:
    losses = torch.tensor([0.5, 9.0, -3.0, math.nan, math.inf, -math.inf, 4.0])
    total, count = (contribution(losses, clip_norm=0.2, loss_bound=4.0) * METRIC_NOISE / 0.2).tolist()
    assert total == pytest.approx((0.5 + 4.0 + 4.0) / 4.0)
    assert count == pytest.approx(7.0)
    assert contribution(torch.zeros(0), clip_norm=0.2, loss_bound=4.0).tolist() == [0.0, 0.0]


def test_one_example_moves_each_coordinate_by_a_tenth_of_c_at_most() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(40, generator=generator).exp() * 3
    whole = contribution(losses, clip_norm=0.7, loss_bound=2.0)
    moves = [
        whole - contribution(torch.cat([losses[:i], losses[i + 1 :]]), clip_norm=0.7, loss_bound=2.0) for i in range(40)
    ]
    assert torch.stack(moves).abs().max() <= 0.07 + 1e-6  # float32 sums
    assert torch.stack(moves).abs().amax(0).tolist() == pytest.approx([0.07, 0.07], abs=1e-6)


def test_means_are_read_back_in_their_own_units() -> None:
    metrics, m = (
        ReleasedMetrics(),
        dataclasses.replace(MECHANISM, clip_norm=0.7, loss_bound=2.0, expected_batch_size=10),
    )
    assert metrics.take() == {}
    for losses in (torch.tensor([1.0, 0.5, 5.0]), torch.tensor([2.0])):
        metrics.add(contribution(losses, clip_norm=0.7, loss_bound=2.0), m)
    assert metrics.take() == pytest.approx({"loss": (3.5 + 2.0) / 2 / 10, "batch_size": (3 + 1) / 2})
    assert metrics.take() == {}


def test_removing_any_record_moves_the_joint_vector_by_at_most_its_sensitivity(tmp_path: Path) -> None:
    """Neighbour replay of the whole vector: reached where the gradient is clipped and the loss above its bound."""
    rows = runs.text_rows(8).to_list()
    rows.append({"input_ids": [7] * 40, "attention_mask": [1] * 40, "labels": [8] * 40})
    for clip_norm, bound, reached in ((1e-3, 0.5, True), (0.2, 5.0, False), (1e3, 100.0, False)):
        config = {**runs.NOISELESS, "clip_norm": clip_norm, "expected_batch_size": 9, "log_loss_up_to": bound}
        trainer = runs.trainer(tmp_path, None, config, train_dataset=runs.Dataset.from_list(rows))
        sums = []
        for kept in [rows, *[rows[:i] + rows[i + 1 :] for i in range(len(rows))]]:
            sums.append(runs.clipped_sum(trainer, runs.collated(kept, 4)))
        moves = torch.stack([(s - sums[0]).norm() for s in sums[1:]]) / trainer.mechanism.sensitivity
        assert float(moves.max()) <= 1 + 1e-5  # float32 sums
        assert float(moves.max()) > 0.999 or not reached
        assert trainer.mechanism.sensitivity == pytest.approx(clip_norm * math.sqrt(1.02))


# ---- the noise -------------------------------------------------------------------------------------------------------


def test_every_coordinate_has_the_stated_noise(tmp_path: Path) -> None:
    """Two-sided, in the log's units: 10 sigma L / B on the loss, 10 sigma on the size, sigma C on the gradient."""
    m, steps = dataclasses.replace(MECHANISM, num_steps=1500), 1500
    run = PrivateRun.open(m, Place(tmp_path), Session([0] * 1000))
    metrics = ReleasedMetrics()
    exact = torch.cat([torch.zeros(25), contribution(torch.full((40,), 1.5), clip_norm=m.clip_norm, loss_bound=4.0)])
    gradients, logged = [], []
    for number in range(steps):
        noisy = run.release(exact, number)
        metrics.add(noisy[-2:], m)
        gradients.append(noisy[:-2].numpy().copy())
        logged.append(list(metrics.take().values()))
    run.close()
    loss, size = (np.array(logged, dtype=np.float32) - np.array([40 * 1.5 / 50, 40], dtype=np.float32)).T
    for values, std in ((loss, 10 * 1.3 * 4.0 / 50), (size, 10 * 1.3), (np.concatenate(gradients), 1.3 * 0.2)):
        assert_gaussian(values, std)
    assert not std_is(loss, 10 * 1.3 * 4.0 / 50 * 1.25)  # twice what 1,500 values just catch
    assert_uncorrelated(loss, size)
    assert_uncorrelated(loss, np.stack(gradients)[:, 0])


def test_a_second_release_of_one_draw_is_an_error(tmp_path: Path) -> None:
    run = PrivateRun.open(MECHANISM, Place(tmp_path), Session([0] * 1000))
    run.release(torch.zeros(5), 0)
    with pytest.raises(ReleaseError, match="two releases of one draw"):
        run.release(torch.zeros(2), 0)
    run.close()
    assert run.spent().num_steps == 1


# ---- whole runs ------------------------------------------------------------------------------------------------------


def history(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("settings", quick(({},), [{"per_device_train_batch_size": 1}, {"micro_batch_tokens": 20}, {}]))
def test_without_noise_the_log_has_the_clamped_mean_however_batches_are_cut(
    settings: dict[str, int], tmp_path: Path
) -> None:
    model, rows = M.with_lora(M.llama), runs.text_rows()
    exact = [float(reference.causal_lm_loss(model, runs.collate([row]))) for row in rows]
    bound = sorted(exact)[12]  # half of them are above it
    config = {**runs.NOISELESS, "log_loss_up_to": bound}
    trainer = runs.trainer(
        tmp_path, model, config, train_dataset=rows, learning_rate=0.0, max_steps=4, logging_steps=2, **settings
    )
    trainer.train()
    expected = np.mean(np.clip(exact, 0, bound))
    assert history(trainer, "loss") == pytest.approx([expected] * 2, rel=1e-5)  # float32
    assert history(trainer, "batch_size") == pytest.approx([24.0] * 2, rel=1e-5)


def test_the_gradient_has_the_same_noise_with_and_without_metrics(tmp_path: Path) -> None:
    """Under one debug seed the coordinates of the gradient get the same noise, sigma C: the metrics come after them."""
    start, final = M.with_lora(M.llama).state_dict(), []
    for bound in (None, 3.0):
        model = M.with_lora(M.llama)
        model.load_state_dict(start)
        config = {**PRIVATE, "debug_seed": 5, "log_loss_up_to": bound}
        runs.trainer(tmp_path / str(bound), model, config, learning_rate=0.1).train()
        final.append({name: p.detach().clone() for name, p in reference.trainable(model).items()})
    assert reference.relative_difference(*final) < 1e-5  # float32


def test_ledger_card_and_verification_have_the_joint_release(tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path, None, PRIVATE, max_steps=5)
    trainer.train()
    trainer.save_model()
    joint = 1 / math.sqrt(1.02)
    ledger, record = read_ledger(tmp_path / LEDGER_NAME), json.loads((tmp_path / "privacy.json").read_text())
    assert ledger.segments == (Segment(8 / 24, pytest.approx(joint), 5),)
    assert ledger.executed[0].loss_bound == record["segments"][0]["loss_bound"] == 3.0
    assert record["epsilon"] == trainer.privacy_spent().epsilon == spent(ledger.segments, 1e-3).epsilon
    assert record["epsilon"] > spent([Segment(8 / 24, 1.0, 5)], 1e-3).epsilon
    card = (tmp_path / "README.md").read_text()
    assert (
        "the training loss (each example's clamped to [0, 3]) and the batch size, all with noise, as one release inside"
        in card
    )
    assert [c for c in verify(tmp_path) if not c.holds] == []
    for segment in (record["segments"][0], record["plans"][0][0]):
        segment["noise_multiplier"] = 1.0  # as if the metrics were free
    (tmp_path / "privacy.json").write_text(json.dumps(record))
    assert {"epsilon, computed again", "segments in the ledger and in privacy.json"} <= {
        c.name for c in verify(tmp_path) if not c.holds
    }


def test_without_metrics_nothing_of_them_is_there(tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path, None, {**PRIVATE, "log_loss_up_to": None}, max_steps=2)
    trainer.train()
    trainer.save_model()
    assert history(trainer, "loss") == history(trainer, "batch_size") == []
    record = json.loads((tmp_path / "privacy.json").read_text())
    assert "loss_bound" not in record["segments"][0]
    assert record["mechanism"]["released"] == "the gradient"
    assert record["segments"][0]["noise_multiplier"] == 1.0


@pytest.mark.slow
def test_turning_them_on_in_a_resumed_run_is_a_segment_of_its_own(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01}
    runs.trainer(tmp_path, None, {**PRIVATE, "log_loss_up_to": None}, max_steps=2, **settings).train()
    trainer = runs.trainer(tmp_path, None, PRIVATE, max_steps=5, **settings)
    trainer.train(resume_from_checkpoint=True)
    executed = read_ledger(tmp_path / LEDGER_NAME).executed
    assert [(s.loss_bound, s.num_steps) for s in executed] == [(None, 2), (3.0, 3)]
    assert (
        trainer.privacy_spent().epsilon
        == spent([Segment(8 / 24, 1.0, 2), Segment(8 / 24, 1 / math.sqrt(1.02), 3)], 1e-3).epsilon
    )
    assert len(history(trainer, "batch_size")) == 3
    trainer.save_model()
    assert "the gradient, then the gradient, the training loss" in (tmp_path / "README.md").read_text()
