"""The one exit: charged, then noised, then reduced, once; the right noise; nothing of a refused release leaves."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hf_dp.accounting.epsilon import spent
from hf_dp.errors import LedgerError, ReleaseError
from hf_dp.ledger.ledger import LEDGER_NAME, Ledger, LedgerHeader, read_ledger
from hf_dp.randomness.noise import NoiseSource
from hf_dp.step import release as release_module
from hf_dp.step.release import EXACT, Releaser, _modulus
from tests.support.noise_checks import assert_gaussian, assert_uncorrelated

HEADER = LedgerHeader(num_examples=1000, unit="record", relation="zero-out", delta=1e-5)
C, SIGMA = 0.5, 1.3
ARGUMENTS = {"sensitivity": C, "noise_multiplier": SIGMA}
D = 100_000


@pytest.fixture
def ledger(tmp_path: Path) -> Any:
    with Ledger.open(tmp_path / LEDGER_NAME, HEADER) as opened:
        opened.begin(sample_rate=0.05, joint_noise_multiplier=SIGMA, clip_norm=C, expected_batch_size=50)
        yield opened


@pytest.fixture
def releaser(ledger: Ledger) -> Releaser:
    return Releaser(ledger, NoiseSource())


# ---- the noise (M2) --------------------------------------------------------------------------------------------------


def test_what_is_released_is_the_sum_and_gaussian_noise_of_sigma_times_c(releaser: Releaser) -> None:
    """Two-sided, on what leaves minus what went in: an error of 2 % is caught, and so is 2/3 or 3/2."""
    clipped_sum = torch.linspace(-0.01, 0.01, D)
    calls = [(releaser(clipped_sum, **ARGUMENTS) - clipped_sum).numpy() for _ in range(3)]
    for noise in calls:
        assert_gaussian(noise, SIGMA * C)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert_uncorrelated(calls[a], calls[b])
    assert_uncorrelated(calls[0][: D // 2], calls[0][D // 2 :])  # of one parameter and of another


def test_every_coordinate_gets_noise_in_every_step(releaser: Releaser) -> None:
    steps = torch.stack([releaser(torch.zeros(50), **ARGUMENTS) for _ in range(1000)]).numpy()
    assert_gaussian(steps.flatten(), SIGMA * C)
    deviations = steps.std(axis=0) / (SIGMA * C)
    assert np.abs(deviations - 1).max() < 5 / math.sqrt(2 * 1000)  # five standard errors, each coordinate
    correlation = np.corrcoef(steps.T) - np.eye(50)
    assert np.abs(correlation).max() < 6 / math.sqrt(1000)  # six: the greatest of 1,225 pairs


def test_the_same_seeds_everywhere_give_other_noise(ledger: Ledger) -> None:
    released = []
    for _ in range(2):
        torch.manual_seed(42)
        np.random.seed(42)
        released.append(Releaser(ledger, NoiseSource())(torch.zeros(D), **ARGUMENTS).numpy())
    assert_uncorrelated(*released)


def test_the_argument_is_left_as_it_was_and_the_result_is_new(releaser: Releaser) -> None:
    clipped_sum = torch.ones(5, requires_grad=True)
    released = releaser(clipped_sum, **ARGUMENTS)
    assert torch.equal(clipped_sum, torch.ones(5))
    assert (released.dtype, released.shape, released.requires_grad) == (torch.float32, (5,), False)
    assert released.data_ptr() != clipped_sum.data_ptr()


def test_an_empty_sum_is_charged_as_any(releaser: Releaser, ledger: Ledger) -> None:
    assert releaser(torch.zeros(0), **ARGUMENTS).shape == (0,)
    assert releaser(torch.zeros(7), **ARGUMENTS).abs().min() > 0  # no record was drawn: noise alone
    assert ledger.num_steps == 2


# ---- the order -------------------------------------------------------------------------------------------------------


class Recorder:
    """A stand-in for torch.distributed: this process is one of `world`, and the others send zeros at the same draw."""

    def __init__(self, events: list[Any], world: int) -> None:
        self.events, self.world = events, world

    def all_reduce(self, buffer: torch.Tensor) -> None:
        self.events.append("reduce")
        self.sent = buffer.clone()
        buffer[-3:] *= self.world


@pytest.fixture
def events(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What charge and noise do, in their order."""
    happened: list[Any] = []
    charge = ledger.charge
    monkeypatch.setattr(ledger, "charge", lambda *a: (happened.append("charge"), charge(*a))[1])
    gaussian = NoiseSource.gaussian
    monkeypatch.setattr(NoiseSource, "gaussian", lambda *a, **k: (happened.append("noise"), gaussian(*a, **k))[1])
    return happened


def test_charged_then_noised_then_reduced_once(
    ledger: Ledger, events: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Recorder(events, world=2)
    monkeypatch.setattr(release_module, "dist", network)
    monkeypatch.setattr(release_module, "_world_size", lambda: 2)
    released = Releaser(ledger, NoiseSource(), num_processes=2)(torch.zeros(D), **ARGUMENTS)
    assert events == ["charge", "noise", "reduce"]
    assert_gaussian(network.sent[:-3].numpy(), SIGMA * C)  # noise is in before anything leaves
    assert torch.equal(released, network.sent[:-3])


def test_the_other_processes_neither_charge_nor_add_noise(events: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    network = Recorder(events, world=3)
    monkeypatch.setattr(release_module, "dist", network)
    monkeypatch.setattr(release_module, "_world_size", lambda: 3)
    part = torch.arange(5.0)
    Releaser(None, None, process_index=1, num_processes=3)(part, **ARGUMENTS)
    assert events == ["reduce"]
    assert torch.equal(network.sent[:-3], part)


def test_the_step_is_on_disk_before_the_noise_is_drawn(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, seen = NoiseSource(), []
    draw = source.gaussian

    def watching(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(read_ledger(tmp_path / LEDGER_NAME).num_steps)
        return draw(*args, **kwargs)

    monkeypatch.setattr(source, "gaussian", watching)
    release = Releaser(ledger, source)
    for _ in range(4):
        release(torch.ones(3), **ARGUMENTS)
    assert seen == [1, 2, 3, 4]


def test_without_noise_the_step_is_charged_as_what_it_is(ledger: Ledger, events: list[Any]) -> None:
    ledger.begin(sample_rate=0.05, joint_noise_multiplier=0.0, clip_norm=C, expected_batch_size=50)
    part = torch.randn(20)
    released = Releaser(ledger, NoiseSource())(part, sensitivity=C, noise_multiplier=0.0)
    assert torch.equal(released, part)
    assert events == ["charge"]
    assert spent(ledger.segments(), 1e-5).epsilon == math.inf


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clipped_sum", "changed", "message"),
    [
        (torch.zeros(2, 3), {}, "flat float32 or int64 sum"),
        (torch.zeros(3, dtype=torch.float64), {}, "flat float32 or int64 sum"),
        (torch.zeros(3, dtype=torch.bfloat16), {}, "flat float32 or int64 sum"),
        *((torch.zeros(3), {"sensitivity": x}, "finite sensitivity") for x in (0.0, -1.0, math.nan, math.inf)),
        *((torch.zeros(3), {"noise_multiplier": x}, "finite noise_multiplier") for x in (-1.0, math.nan, math.inf)),
        (torch.zeros(3), {"sensitivity": 2 * C}, r"the ledger would charge \(sigma, C\)"),
        (torch.zeros(3), {"noise_multiplier": SIGMA / 2}, r"the ledger would charge \(sigma, C\)"),
        (torch.zeros(3), {"noise_multiplier": 0.0}, r"the ledger would charge \(sigma, C\)"),
        (torch.zeros(3), {"draw_number": -1}, "expected a draw after number -1, got -1"),
    ],
    ids=range(14),
)
def test_arguments_out_of_range_are_refused_and_cost_nothing(
    clipped_sum: torch.Tensor,
    changed: dict[str, Any],
    message: str,
    releaser: Releaser,
    ledger: Ledger,
    events: list[Any],
) -> None:
    with pytest.raises(ReleaseError, match=message) as refusal:
        releaser(clipped_sum, **{**ARGUMENTS, **changed})
    assert "nothing was charged or released" in str(refusal.value)
    assert events == []
    releaser(torch.zeros(3), **ARGUMENTS)  # and the next one is as good as ever
    assert ledger.num_steps == 1


def test_everything_wrong_is_named_at_once(releaser: Releaser) -> None:
    with pytest.raises(ReleaseError) as refusal:
        releaser(torch.zeros(2, 2), sensitivity=-1.0, noise_multiplier=-1.0, draw_number=-5)
    assert all(w in str(refusal.value) for w in ("flat float32", "sensitivity", "noise_multiplier", "expected a draw"))


def test_a_draw_is_released_once(releaser: Releaser, ledger: Ledger) -> None:
    for number in (0, 1, 7):
        releaser(torch.zeros(3), **ARGUMENTS, draw_number=number)
    for number in (7, 3):
        with pytest.raises(ReleaseError, match=f"expected a draw after number 7, got {number}"):
            releaser(torch.zeros(3), **ARGUMENTS, draw_number=number)
    assert ledger.num_steps == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_sum_that_is_not_finite_is_charged_and_stays_inside(
    bad: float, releaser: Releaser, ledger: Ledger, events: list[Any]
) -> None:
    """That it is not finite says something of the data, so it is not to be seen for nothing."""
    with pytest.raises(ReleaseError, match=r"not finite.*The step is charged, nothing was released") as refusal:
        releaser(torch.tensor([1.0, bad]), **ARGUMENTS)
    assert events == ["charge"]
    assert ledger.num_steps == 1
    assert "nan" not in str(refusal.value)  # which coordinate, and how it failed, is nobody's business


def test_nothing_is_released_when_the_charge_fails(ledger: Ledger, events: list[Any], monkeypatch: Any) -> None:
    def refuse(*args: Any) -> None:
        raise LedgerError("the disk is full")

    network = Recorder(events, world=2)
    monkeypatch.setattr(ledger, "charge", refuse)
    monkeypatch.setattr(release_module, "dist", network)
    monkeypatch.setattr(release_module, "_world_size", lambda: 2)
    with pytest.raises(LedgerError, match="the disk is full"):
        Releaser(ledger, NoiseSource(), num_processes=2)(torch.ones(50), **ARGUMENTS)
    assert events == ["reduce"]  # no noise; the others are told, and get zeros
    assert not network.sent[:-3].any()
    assert network.sent[-1] == 1


def test_nothing_is_released_when_the_noise_fails(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    network, source = Recorder(events, world=2), NoiseSource()
    monkeypatch.setattr(source, "gaussian", lambda *a, **k: 1 / 0)
    monkeypatch.setattr(release_module, "dist", network)
    monkeypatch.setattr(release_module, "_world_size", lambda: 2)
    with pytest.raises(ZeroDivisionError):
        Releaser(ledger, source, num_processes=2)(torch.ones(50), **ARGUMENTS)
    assert not network.sent[:-3].any()
    assert ledger.num_steps == 1


def test_another_process_that_failed_stops_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Recorder):
        def all_reduce(self, buffer: torch.Tensor) -> None:
            buffer[-1] = 1

    monkeypatch.setattr(release_module, "dist", Failing([], 2))
    monkeypatch.setattr(release_module, "_world_size", lambda: 2)
    with pytest.raises(ReleaseError, match="1 of 2 processes could not release this step; see their messages"):
        Releaser(None, None, process_index=1, num_processes=2)(torch.ones(5), **ARGUMENTS)


@pytest.mark.parametrize("mine", [0, 1, 5, 4095, 4096, 10**9 + 7])
@pytest.mark.parametrize("apart", [1, -1, 2, 1000])
def test_processes_at_different_draws_do_not_add_up(mine: int, apart: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two others, of which one is at another draw: the sum of squares tells, to any distance within the tag's range."""
    modulus = _modulus(3)

    class Others(Recorder):
        def all_reduce(self, buffer: torch.Tensor) -> None:
            for number in (mine, mine + apart):
                tag = number % modulus
                buffer[-3:] += torch.tensor([tag, tag * tag, 0.0])

    monkeypatch.setattr(release_module, "dist", Others([], 3))
    monkeypatch.setattr(release_module, "_world_size", lambda: 3)
    with pytest.raises(ReleaseError, match="at different draws"):
        Releaser(None, None, process_index=1, num_processes=3)(torch.ones(5), **ARGUMENTS, draw_number=mine)


def test_tags_that_balance_each_other_do_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """This one at 5, the others at 4 and 6: the sum is right, and the sum of squares is not."""

    class Others(Recorder):
        def all_reduce(self, buffer: torch.Tensor) -> None:
            buffer[-3:] += torch.tensor([4.0 + 6.0, 16.0 + 36.0, 0.0])

    monkeypatch.setattr(release_module, "dist", Others([], 3))
    monkeypatch.setattr(release_module, "_world_size", lambda: 3)
    with pytest.raises(ReleaseError, match="at different draws"):
        Releaser(None, None, process_index=1, num_processes=3)(torch.ones(5), **ARGUMENTS, draw_number=5)


@pytest.mark.parametrize("processes", [1, 2, 3, 8, 100, 4096])
def test_tags_stay_exact_in_float32(processes: int) -> None:
    largest = _modulus(processes) - 1
    total = torch.zeros((), dtype=torch.float32)
    for _ in range(min(processes, 200)):
        total += torch.tensor(float(largest) ** 2)
    assert float(total) == min(processes, 200) * largest**2
    assert processes * largest**2 <= EXACT


def test_who_needs_what(ledger: Ledger) -> None:
    for arguments in ((None, NoiseSource()), (ledger, None), (None, None)):
        with pytest.raises(ReleaseError, match="needs a ledger and a noise source"):
            Releaser(*arguments)
    for index in (-1, 2):
        with pytest.raises(ReleaseError, match="expected a process_index from 0 to 1"):
            Releaser(ledger, NoiseSource(), process_index=index, num_processes=2)


def test_a_missing_process_group_is_refused_before_charging(ledger: Ledger) -> None:
    assert not dist.is_initialized()
    with pytest.raises(ReleaseError, match=r"expected 2 processes in torch\.distributed, found 1"):
        Releaser(ledger, NoiseSource(), num_processes=2)(torch.ones(5), **ARGUMENTS)
    assert ledger.num_steps == 0
