"""Schedules: their levels, epsilon against numerical integration, calibration, runs that execute what is charged."""

import json
import math
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import TrainerCallback

from hf_dp import PrivacyConfig, PrivateLoop, accounting
from hf_dp.accounting.epsilon import deltas, spent
from hf_dp.card.verification import verify
from hf_dp.errors import ConfigError
from hf_dp.ledger.ledger import LEDGER_NAME, read_ledger
from hf_dp.mechanism import Mechanism, Segment, first_steps
from hf_dp.sampling.poisson import PoissonSampler
from hf_dp.schedule import MOST_LEVELS, Level, Schedules, factors, levels, mean_batch
from tests.support import fft_accountant, reference, runs
from tests.support import models as M
from tests.support.marks import quick

SETTINGS = {"target_delta": 1e-3, "expected_batch_size": 8, "clip_norm": 0.1}


# ---- levels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, [1]),
        ("linear:0.5", [1 - 0.5 * i / 7 for i in range(8)]),
        ("exponential:4", [4 ** (i / 7) for i in range(8)]),
        ("cosine:0.2", [0.2 + 0.8 * (1 + math.cos(math.pi * i / 7)) / 2 for i in range(8)]),
        ("step:0.5", [1, 0.5]),
        ("step:0.25:3", [1, 0.5, 0.25]),
    ],
)
def test_the_shapes(text: str | None, expected: list[float]) -> None:
    assert factors(text) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 9, 100, 1001])
@pytest.mark.parametrize("texts", [("linear:2", None, None), ("step:0.5:3", "cosine:0.1", "exponential:8")])
def test_levels_are_all_steps_in_order_of_nearly_equal_length(steps: int, texts: tuple[str | None, ...]) -> None:
    first = Level(steps, 1.3, 0.7, 40)
    course = levels(first, Schedules(*texts))
    assert sum(x.num_steps for x in course) == steps
    assert course[0][1:] == first[1:]
    own = levels(first, Schedules(noise="linear:2"))
    assert len(own) == min(steps, MOST_LEVELS)
    assert max(x.num_steps for x in own) - min(x.num_steps for x in own) <= 1
    if steps > 1:
        ratios = [a / b for a, b in zip(course[-1][1:], course[0][1:], strict=True)]
        assert ratios == pytest.approx([1 if t is None else float(t.split(":")[1]) for t in texts], rel=1e-4)


def test_a_schedule_that_goes_nowhere_is_none() -> None:
    plain = accounting.plan_mechanism(
        PrivacyConfig(target_epsilon=4.0, expected_batch_size=50), 1000, num_train_epochs=2
    )
    for text in ("linear:1", "step:1"):
        config = PrivacyConfig(target_epsilon=4.0, expected_batch_size=50, noise_schedule=text, batch_schedule=text)
        assert accounting.plan_mechanism(config, 1000, num_train_epochs=2) == plain


@pytest.mark.parametrize(
    "text",
    [
        "",
        *"linear linear: linear:0 linear:-1 linear:nan linear:1e9 linear:2:4 zigzag:2".split(),
        *"step:2:1 step:2:99 step:2:x".split(),
        "step:2:3:4",
        "LINEAR:2",
        0.5,
    ],
)
def test_what_is_no_schedule_is_refused_with_what_is(text: Any) -> None:
    with pytest.raises(
        ConfigError, match="noise_schedule must be SHAPE:RATIO, the shape one of linear, exponential, cosine, step"
    ):
        PrivacyConfig(target_epsilon=1.0, noise_schedule=text)


def test_the_grid_of_discrete_noise_has_no_schedule() -> None:
    with pytest.raises(ConfigError, match="leave the schedules out"):
        PrivacyConfig(target_epsilon=1.0, noise="discrete", clip_schedule="linear:0.5")


def test_a_batch_that_grows_beyond_the_data_is_refused() -> None:
    config = PrivacyConfig(target_epsilon=1.0, expected_batch_size=300, batch_schedule="linear:4")
    with pytest.raises(ConfigError, match=r"at most the number of examples, 1,000.*got 1,200, at its greatest"):
        accounting.plan_mechanism(config, 1000, num_train_epochs=1)


def test_a_sigma_out_of_range_at_its_end_is_refused() -> None:
    config = PrivacyConfig(noise_multiplier=0.05, noise_schedule="linear:0.1")
    with pytest.raises(ConfigError, match=r"got 0\.005"):
        accounting.plan_mechanism(config, 1000, num_train_epochs=1)


def test_epochs_are_passes_over_the_data() -> None:
    config = PrivacyConfig(noise_multiplier=1.0, expected_batch_size=100, batch_schedule="linear:3", target_delta=1e-6)
    m = accounting.plan_mechanism(config, 100_000, num_train_epochs=4)
    assert mean_batch(100, "linear:3") == pytest.approx(200, abs=1)
    assert m.num_steps == 2000
    assert sum(s.sample_rate * s.num_steps for s in m.segments()) == pytest.approx(4, rel=1e-3)


# ---- parts of a course -----------------------------------------------------------------------------------------------


def test_any_part_of_the_course_is_what_its_steps_are_one_by_one() -> None:
    first = Mechanism(1000, 10, 23, 1.0, 0.5, 1e-5)
    m = replace(first, levels=levels(Level(23, 1.0, 0.5, 10), Schedules("linear:2", "step:0.5", "step:4:3")))
    one_by_one = [m.at(t).steps(1) for t in range(60)]  # behind the end, the last goes on
    assert one_by_one[22:] == [one_by_one[22]] * 38
    for start in (0, 1, 8, 22, 23, 30):
        for count in (0, 1, 5, 17):
            part = m.segments(start, count)
            assert [s._replace(num_steps=1) for s in part for _ in range(s.num_steps)] == one_by_one[
                start : start + count
            ]
            assert all(a._replace(num_steps=0) != b._replace(num_steps=0) for a, b in pairwise(part))
    assert first_steps(m.segments(), 7) == m.segments(0, 7)
    assert first_steps(m.segments(), 99) == m.segments()


# ---- epsilon ---------------------------------------------------------------------------------------------------------


def delta_of_two_steps(first: Segment, second: Segment, epsilon: float, *, adding: bool) -> float:
    """The hockey-stick divergence by its definition: an integral over the outcomes of both steps, on a fine grid."""
    densities = []
    for q, sigma, *_ in (first, second):
        x = np.linspace(-9 * sigma, 1 + 9 * sigma, 3001)
        absent = np.exp(-((x / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
        present = (1 - q) * absent + q * np.exp(-(((x - 1) / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
        cell = x[1] - x[0]
        densities.append((present * cell, absent * cell))
    (p1, q1), (p2, q2) = densities
    with_it, without = np.outer(p1, p2), np.outer(q1, q2)
    above, below = (without, with_it) if adding else (with_it, without)
    return float(np.maximum(0, above - math.exp(epsilon) * below).sum())


@pytest.mark.parametrize(
    "steps",
    [
        (Segment(0.2, 0.8, 1), Segment(0.4, 1.6, 1)),
        (Segment(1.0, 2.0, 1), Segment(0.1, 0.7, 1)),
        (Segment(0.05, 1.0, 1), Segment(0.05, 0.5, 1)),
    ],
)
def test_delta_of_two_different_steps_is_the_integral(steps: tuple[Segment, Segment]) -> None:
    """The accountant's is an upper bound: never below the integral (but for its grid), and at most 1 % above."""
    epsilons = [0.2, 0.5, 1.0, 2.0]
    for epsilon, found in zip(epsilons, deltas(steps, epsilons), strict=True):
        exact = max(delta_of_two_steps(*steps, epsilon, adding=adding) for adding in (False, True))
        assert exact * (1 - 1e-3) <= found <= exact * 1.01 + 1e-12


def test_epsilon_of_a_course_is_that_of_a_convolution_in_other_code() -> None:
    config = PrivacyConfig(
        noise_multiplier=1.2, expected_batch_size=100, noise_schedule="cosine:0.6", batch_schedule="linear:2"
    )
    m = accounting.plan_mechanism(config, 5000, num_train_epochs=2)
    assert len(m.segments()) == MOST_LEVELS
    found = spent(m.segments(), m.delta).pld
    assert fft_accountant.epsilon([s[:3] for s in m.segments()], m.delta) == pytest.approx(found, rel=5e-3)


@pytest.mark.parametrize(
    ("target", "steps", "course"),
    [
        (0.3, 4, {"noise_schedule": "step:3:4", "log_loss_up_to": 5.0}),
        (1.0, 400, {"noise_schedule": "step:0.4:3", "batch_schedule": "step:2", "clip_schedule": "linear:0.1"}),
        pytest.param(8.0, 40, {"noise_schedule": "exponential:0.5"}, marks=pytest.mark.slow),
        pytest.param(3.0, 100, {"batch_schedule": "linear:4"}, marks=pytest.mark.slow),
        pytest.param(30.0, 7, {"noise_schedule": "cosine:5", "batch_schedule": "cosine:0.1"}, marks=pytest.mark.slow),
    ],
)
def test_calibration_never_overshoots_and_wastes_little(target: float, steps: int, course: dict[str, Any]) -> None:
    config = PrivacyConfig(target_epsilon=target, expected_batch_size=64, target_delta=1e-5, **course)
    m = accounting.plan_mechanism(config, 2000, num_train_epochs=0.0, max_steps=steps)
    assert m.levels[0].noise_multiplier == m.noise_multiplier
    assert target * 0.997 <= spent(m.segments(), m.delta).epsilon <= target


# ---- draws -----------------------------------------------------------------------------------------------------------


def test_each_draw_has_its_own_rate() -> None:
    """Two-sided: 200 draws of 1,000 records at each of two rates, five standard errors."""
    sampler = PoissonSampler(1000, lambda number: 0.1 if number < 200 else 0.4, 400)
    sizes = [len(draw) for draw in sampler]
    for part, q in ((sizes[:200], 0.1), (sizes[200:], 0.4)):
        assert abs(sum(part) - 200_000 * q) < 5 * math.sqrt(200_000 * q * (1 - q))


# ---- runs ------------------------------------------------------------------------------------------------------------


class Gradients(TrainerCallback):
    """All of a step's gradients as one vector, step by step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.seen.append({name: p.grad.clone() for name, p in reference.trainable(model).items()})


def test_every_step_is_clipped_at_its_own_c(tmp_path: Path) -> None:
    """Against brute force: weights that stand still (rate 0), all records in each step, no noise."""
    model, seen = M.with_lora(M.llama), Gradients()
    privacy = {**runs.NOISELESS, "clip_norm": 0.1, "clip_schedule": "step:0.25:3"}
    runs.trainer(tmp_path, model, privacy, max_steps=6, learning_rate=0.0, callbacks=[seen]).train()
    rows = runs.text_rows()
    for step, clip_norm in enumerate([0.1, 0.1, 0.05, 0.05, 0.025, 0.025]):
        sums = [reference.clipped_sum(model, runs.collate([row]), reference.causal_lm_loss, clip_norm) for row in rows]
        expected = {name: sum(s[name] for s in sums) / 24 for name in sums[0]}
        assert reference.relative_difference(seen.seen[step], expected) < 1e-5  # float32


def test_every_step_has_its_own_noise_and_divisor(tmp_path: Path) -> None:
    """Two-sided: sigma_t x C_t / B_t, which differs by 4.8 times between the first and the second half."""
    model, seen = M.with_lora(partial(M.llama, hidden_size=64, intermediate_size=128), r=16), Gradients()
    privacy = {"noise_multiplier": 20.0, "clip_norm": 0.5, "expected_batch_size": 6, "target_delta": 1e-3}
    privacy |= {"noise_schedule": "step:0.5", "clip_schedule": "step:0.625", "batch_schedule": "step:1.5"}
    trainer = runs.trainer(tmp_path, model, privacy, max_steps=4, learning_rate=0.0, callbacks=[seen])
    trainer.train()
    for step, std in enumerate([20 * 0.5 / 6] * 2 + [10 * 0.3125 / 9] * 2):
        noise = torch.cat([g.flatten() for g in seen.seen[step].values()])
        # five standard errors, and the signal: a norm of at most 24 x 0.5 / 6 over all coordinates
        assert abs(float(noise.std()) / std - 1) < 5 / math.sqrt(2 * noise.numel()) + 0.005
    executed = read_ledger(tmp_path / LEDGER_NAME).executed
    assert [(s.num_steps, s.joint_noise_multiplier, s.clip_norm, s.expected_batch_size) for s in executed] == [
        (2, 20.0, 0.5, 6),
        (2, 10.0, 0.3125, 9),
    ]


@pytest.mark.slow
def test_what_is_executed_is_what_was_planned_and_the_card_says_so(tmp_path: Path) -> None:
    privacy = {"target_epsilon": 5.0, **SETTINGS, "noise_schedule": "linear:0.5", "log_loss_up_to": 4.0}
    privacy |= {"clip_schedule": "step:0.5", "batch_schedule": "step:2"}
    trainer = runs.trainer(tmp_path, None, privacy, max_steps=10, learning_rate=0.1)
    trainer.train()
    trainer.save_model()
    assert read_ledger(tmp_path / LEDGER_NAME).segments == trainer.mechanism.segments()
    assert 4.9 < trainer.privacy_spent().epsilon <= 5
    record = json.loads((tmp_path / "privacy.json").read_text())
    stated = [(x["num_steps"], x["clip_norm"], x["expected_batch_size"]) for x in record["mechanism"]["levels"]]
    assert stated == [(x.num_steps, x.clip_norm, x.expected_batch_size) for x in trainer.mechanism.levels]
    checks = verify(tmp_path)
    assert all(check.holds for check in checks), [c for c in checks if not c.holds]
    assert "runs of steps" in (tmp_path / "README.md").read_text()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 10
    assert [entry["epsilon"] for entry in logged] == sorted(entry["epsilon"] for entry in logged)


LEVEL = ["noise_multiplier", "sample_rate", "num_steps", "clip_norm", "expected_batch_size"]


@pytest.mark.parametrize("name", quick(("noise_multiplier",), LEVEL))
def test_a_level_that_was_changed_is_found(name: str, tmp_path: Path) -> None:
    privacy = {"noise_multiplier": 1.0, **SETTINGS, "noise_schedule": "step:0.5", "batch_schedule": "step:2"}
    trainer = runs.trainer(tmp_path, None, privacy, max_steps=2)
    trainer.train()
    trainer.save_model()
    path = tmp_path / "privacy.json"
    record = json.loads(path.read_text())
    for level in (0, -1):
        changed = json.loads(json.dumps(record))
        changed["mechanism"]["levels"][level][name] *= 2
        path.write_text(json.dumps(changed))
        assert not all(check.holds for check in verify(tmp_path)), level


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [2, 3, 4])
def test_resuming_goes_on_at_the_right_level(stopped: int, tmp_path: Path) -> None:
    """Epochs have 3 steps, levels 2: whichever step is next, weights, segments and epsilon are those of one piece."""
    privacy = {**runs.NOISELESS, "clip_schedule": "step:0.25:3", "expected_batch_size": 24}
    start = M.with_lora(M.llama).state_dict()

    def trained(folder: Path, resume: bool = False, callbacks: tuple[Any, ...] = ()) -> Any:
        model = M.with_lora(M.llama)
        model.load_state_dict(start)
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.5}
        trainer = runs.trainer(folder, model, privacy, **settings, callbacks=list(callbacks))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **k: Any) -> None:
            control.should_training_stop = state.global_step == stopped

    whole = trained(tmp_path / "whole")
    trained(tmp_path / "parts", callbacks=(Stop(),))
    resumed = trained(tmp_path / "parts", resume=True)
    for name, p in reference.trainable(whole.model).items():
        assert torch.allclose(p, resumed.model.get_parameter(name), atol=1e-6)  # float32
    executed = [read_ledger(tmp_path / folder / LEDGER_NAME).executed for folder in ("whole", "parts")]
    assert [(s.clip_norm, s.num_steps) for s in executed[0]] == [(0.1, 2), (0.05, 2), (0.025, 2)]
    assert executed[0] == executed[1]


@pytest.mark.slow
def test_within_an_epoch_too_with_draws_read_ahead(tmp_path: Path) -> None:
    """N = 24, B = 4 to 8: 4 steps an epoch, stopped in the second; the draws passed over are charged nothing."""
    privacy = {"noise_multiplier": 1.0, **SETTINGS, "expected_batch_size": 4, "batch_schedule": "step:2:4"}

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **k: Any) -> None:
            control.should_training_stop = state.global_step == 6

    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "dataloader_num_workers": 2}
    runs.trainer(tmp_path, None, privacy, **settings, callbacks=[Stop()]).train()
    resumed = runs.trainer(tmp_path, None, privacy, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert read_ledger(tmp_path / LEDGER_NAME).segments == resumed.mechanism.segments()


@pytest.mark.slow
def test_training_stops_before_the_step_that_would_exceed_the_target(tmp_path: Path) -> None:
    """The second train() has what the first left: nothing."""
    privacy = {"target_epsilon": 3.0, **SETTINGS, "noise_schedule": "exponential:0.5"}
    trainer = runs.trainer(tmp_path, None, privacy, max_steps=4)
    trainer.train()
    assert trainer.privacy_spent().epsilon <= 3
    with pytest.raises(ConfigError, match="the budget is spent"):
        trainer.train()
    assert trainer.privacy_spent().num_steps == 4


@pytest.mark.slow
def test_a_plain_loop_follows_the_schedule(tmp_path: Path) -> None:
    x = torch.randn(400, 5)
    model = nn.Linear(5, 1)
    config = PrivacyConfig(
        target_epsilon=4.0,
        expected_batch_size=40,
        noise_schedule="linear:2",
        clip_schedule="step:0.5",
        batch_schedule="step:2",
    )
    mechanism = accounting.plan_mechanism(config, 400, num_train_epochs=0.0, max_steps=12)
    loop = PrivateLoop(
        model,
        optimizer := torch.optim.SGD(model.parameters(), lr=0.1),
        lambda m, batch: (m(batch[0]).squeeze(1) - batch[1]).square(),
        mechanism,
        tmp_path,
    )
    for draw in loop.draws(TensorDataset(x, x.sum(1))):
        loop.backward(draw)
        optimizer.step()
    executed = read_ledger(tmp_path / LEDGER_NAME)
    assert executed.segments == mechanism.segments()
    assert loop.privacy_spent().epsilon <= 4


def test_it_is_printed_level_by_level() -> None:
    config = PrivacyConfig(noise_multiplier=2.0, expected_batch_size=100, noise_schedule="step:0.5:3")
    m = accounting.plan_mechanism(config, 1000, num_train_epochs=3)
    rows = {row.name: row for row in accounting.derivation(config, m, num_train_epochs=3)}
    assert rows["sigma, level by level"].value == "2, 1.4142, 1"
    assert "C, level by level" not in rows
    assert asdict(m)["levels"][0] == (10, 2.0, 1.0, 100)


def test_the_level_with_the_greatest_batch_is_what_memory_is_planned_for() -> None:
    first = Mechanism(1000, 10, 20, 1.0, 0.5, 1e-5)
    assert first.largest == first.at(0)
    for text, greatest in (("linear:4", 40), ("linear:0.5", 10), ("cosine:2", 20)):
        course = levels(Level(20, 1.0, 0.5, 10), Schedules(batch=text))
        assert replace(first, levels=course).largest.expected_batch_size == greatest
