"""What will be run: the settings of the subsampled Gaussian mechanism, all of them public, in frozen objects."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import NamedTuple

from hf_dp.schedule import Level

UNIT = "record"  # one row of the training set
PAIR = "pair of answers"  # one row of the training set, where it has two answers of which one is preferred
SHARED = "record of several owners"  # one row of the training set, where a column has lists of owners
GROUP = 'group of records with the same "{column}"'  # all rows with one value in a column, protected together
BOUNDED = 'group of at most {bound:,} records with the same "{column}"'  # those of them that are kept
OWNED = 'group of at most {bound:,} records that name the same owner in "{column}"'  # of those kept, where several may
_BOUND = re.compile(r'group of at most ([\d,]+) records (with the same|that name the same owner in) "')
METRIC_NOISE = 10.0  # k: a released metric has k times the noise, over its own sensitivity, that the gradient has
METRICS = ("loss", "batch_size")  # may be released with the gradient, as further coordinates of one vector
DISCRETE = "discrete"  # the kind of noise that consists of whole numbers (see `randomness/grid.py`)
RELATION = "zero-out"  # neighbours differ in one record, replaced by one that contributes nothing; N is public
FIXED_OWNERS = "zero-out, where who owns which record is fixed and not protected"  # as `sampling/owners.py` says


class Segment(NamedTuple):
    """`num_steps` consecutive steps of the Poisson-subsampled Gaussian mechanism: all that accounting needs to know of
    them.

    Attributes:
        sample_rate: q.
        joint_noise_multiplier: standard deviation of the noise over the sensitivity of everything that a step releases.
            It
            equals the gradient's sigma (`Mechanism.noise_multiplier`) where the gradient alone is released. In files it
            is called `noise_multiplier`.
        num_steps: how many steps.
        noise: kind of noise, one of `config.NOISES`.
        contribution_bound: G, of how many records of a unit each may join a step by itself.
    """

    sample_rate: float
    joint_noise_multiplier: float
    num_steps: int
    noise: str = "gaussian"
    contribution_bound: int = 1

    @classmethod
    def of(cls, stated: Mapping[str, object]) -> "Segment":
        """Reads a segment from a file; other keys are ignored.

        Raises:
            KeyError: a field is missing.
        """
        q, sigma, steps = (stated[name] for name in ("sample_rate", "noise_multiplier", "num_steps"))
        beside = stated.get("noise", "gaussian"), stated.get("contribution_bound", 1)
        return cls(q, sigma, steps, *beside)  # type: ignore[arg-type]  # `spent` checks them

    def stated(self) -> dict[str, object]:
        """Field -> value, as files have it."""
        return {
            "sample_rate": self.sample_rate,
            "noise_multiplier": self.joint_noise_multiplier,
            "num_steps": self.num_steps,
            "noise": self.noise,
            **({"contribution_bound": self.contribution_bound} if self.contribution_bound > 1 else {}),
        }


def united(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """Run-length encoding: neighbours that differ only in their number of steps become one; none has length 0."""
    runs = groupby((s for s in segments if s.num_steps), key=lambda s: s._replace(num_steps=0))
    return tuple(kind._replace(num_steps=sum(s.num_steps for s in run)) for kind, run in runs)


def first_steps(segments: Iterable[Segment], num_steps: int) -> tuple[Segment, ...]:
    """The first `num_steps` steps of `segments`, or all of them where they have fewer; none has length 0."""
    found = []
    for s in segments:
        found.append(s._replace(num_steps=min(num_steps, s.num_steps)))
        num_steps -= found[-1].num_steps
    return tuple(s for s in found if s.num_steps)


class _Noisy:
    """What follows from the settings of a step, or from those of a whole run: the first level's where it has levels."""

    noise_multiplier: float
    clip_norm: float
    noise: str
    loss_bound: float | None

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on the clipped *sum*: sigma x C."""
        return self.noise_multiplier * self.clip_norm

    @property
    def sensitivity(self) -> float:
        """The most, in Euclidean norm, by which one record moves the vector that a step releases; C without metrics."""
        return self.clip_norm * release_norm(self.loss_bound)

    @property
    def joint_noise_multiplier(self) -> float:
        """Noise over the sensitivity of all that a step releases, from which epsilon follows; sigma without metrics."""
        return self.noise_multiplier / release_norm(self.loss_bound)

    @property
    def is_discrete(self) -> bool:
        """Whether sums and noise are whole numbers, and each example has a pass of its own."""
        return self.noise == DISCRETE


@dataclass(frozen=True)
class StepSettings(_Noisy):
    """The settings of one step: those of the whole run, or of the schedule's level that the step belongs to.

    The attributes have the names and meanings of `Mechanism`'s.
    """

    expected_batch_size: int
    sample_rate: float
    noise_multiplier: float
    clip_norm: float
    noise: str = "gaussian"
    loss_bound: float | None = None
    records_per_unit: int = 1
    contribution_bound: int | None = None

    def steps(self, num_steps: int) -> Segment:
        """The segment of `num_steps` steps with these settings."""
        bound = self.contribution_bound or 1
        return Segment(self.sample_rate, self.joint_noise_multiplier, num_steps, self.noise, bound)


@dataclass(frozen=True)
class Mechanism(_Noisy):
    """DP-SGD as it will run (Abadi et al. 2016, algorithm 1, with Poisson sampling).

    Each of `num_steps` steps keeps every one of `num_examples` records with probability `sample_rate`, clips each kept
    example's gradient to `clip_norm` in Euclidean norm, adds N(0, noise_std² I) to the sum, and divides by
    `expected_batch_size`, a public constant.

    Attributes:
        num_examples: N, the number of units, or of the records that are kept where each is drawn by itself; public
            under the zero-out relation.
        expected_batch_size: B, over all processes; 1 <= B <= N.
        num_steps: T, planned.
        noise_multiplier: sigma. 0 means no noise: epsilon is infinite.
        clip_norm: C.
        delta: of (epsilon, delta).
        target_epsilon: what sigma was calibrated to, or None where sigma was given.
        loss_bound: L: training loss, clamped to [0, L], and batch size are released in the same vector (see
            `step/metrics.py`); None where the gradient alone is released.
        unit: what is protected as one: "record", "pair of answers", or a group of records.
        relation: when two data sets are neighbours.
        debug: the randomness comes from a fixed seed, so nothing about the run is private.
        noise: the kind of noise, one of `config.NOISES`.
        records_per_unit: k: of a drawn group the mean gradient of at most k records is clipped; 1 where records are
            units.
        contribution_bound: G: records are drawn by themselves, of each group at most G that are kept; None where units
            are drawn.
        levels: the levels of a schedule, T steps in all; sigma, C and B above are those of the first level. Empty where
            sigma, C and B are constant.
    """

    num_examples: int
    expected_batch_size: int
    num_steps: int
    noise_multiplier: float
    clip_norm: float
    delta: float
    target_epsilon: float | None = None
    loss_bound: float | None = None
    unit: str = UNIT
    relation: str = RELATION
    debug: bool = False
    noise: str = "gaussian"
    records_per_unit: int = 1
    contribution_bound: int | None = None
    levels: tuple[Level, ...] = ()

    @property
    def sample_rate(self) -> float:
        """q = B / N, the probability with which a record enters a step."""
        return self.expected_batch_size / self.num_examples

    @property
    def generator(self) -> str:
        """Where the random bits of sampling and noise come from: "philox" or "chacha20"."""
        return generator_of(self.noise)

    @property
    def is_private(self) -> bool:
        """Whether any guarantee can be stated at all."""
        return self.noise_multiplier > 0 and not self.debug

    def at(self, step: int) -> StepSettings:
        """The settings of step number `step`, counted from 0. Steps after the last one have those of the last level."""
        ends = accumulate(level.num_steps for level in self.levels)
        level = next((level for level, end in zip(self.levels, ends, strict=True) if step < end), None)
        level = level or (self.levels[-1] if self.levels else self._as_level())
        return StepSettings(
            expected_batch_size=level.expected_batch_size,
            sample_rate=level.expected_batch_size / self.num_examples,
            noise_multiplier=level.noise_multiplier,
            clip_norm=level.clip_norm,
            noise=self.noise,
            loss_bound=self.loss_bound,
            records_per_unit=self.records_per_unit,
            contribution_bound=self.contribution_bound,
        )

    @property
    def largest(self) -> StepSettings:
        """The settings of the steps with the greatest expected batch size."""
        sizes = [level.expected_batch_size for level in self.levels] or [0]
        return self.at(sum(level.num_steps for level in self.levels[: sizes.index(max(sizes))]))

    def segments(self, start: int = 0, num_steps: int | None = None) -> tuple[Segment, ...]:
        """`num_steps` steps from step number `start` on, run-length encoded; by default all T.

        Steps after the last one have the settings of the last level.
        """
        levels = self.levels or (self._as_level(),)
        left, found = self.num_steps if num_steps is None else num_steps, []
        for begin, level in zip(accumulate((x.num_steps for x in levels), initial=0), levels, strict=False):
            end = math.inf if level is levels[-1] else begin + level.num_steps
            taken = int(max(0, min(left, end - max(begin, start))))
            left -= taken
            found.append(self.at(begin).steps(taken))
        return united(found)

    def _as_level(self) -> Level:
        return Level(self.num_steps, self.noise_multiplier, self.clip_norm, self.expected_batch_size)


def release_norm(loss_bound: float | None) -> float:
    """Sensitivity of a step's release in units of C: 1, or sqrt(1 + 2 / k²) with both metrics (proof:
    `step/metrics.py`).
    """
    return 1.0 if loss_bound is None else math.sqrt(1 + len(METRICS) / METRIC_NOISE**2)


def unit_of(column: str | None, row: str = UNIT, contribution_bound: int | None = None) -> str:
    """What is protected as one, as card and ledger name it: a `row` of the training set, or all records with one value
    in `column`; of these at most `contribution_bound` that are kept, if there is one. Where rows are `SHARED`, the
    value is one of those in a record's list of owners.
    """
    if column is None:
        return row
    if contribution_bound is None:
        return GROUP.format(column=column)
    return (OWNED if row == SHARED else BOUNDED).format(column=column, bound=contribution_bound)


def bound_in(unit: str) -> int | None:
    """The contribution bound that a unit's name states; None where units are drawn."""
    found = _BOUND.match(unit)
    return None if found is None else int(found[1].replace(",", ""))


def is_owned(unit: str) -> bool:
    """Whether a unit's name is that of an owner of records that may have others too."""
    found = _BOUND.match(unit)
    return found is not None and found[2] != "with the same"


def relation_of(unit: str) -> str:
    """When two data sets are neighbours, where this is the unit."""
    return FIXED_OWNERS if is_owned(unit) else RELATION


def taken_of_a_group(records_per_unit: int) -> str:
    """What a step takes of a drawn group, in words."""
    if records_per_unit == 1:
        return "of a drawn group one record, each as likely as another"
    return (
        f"of a drawn group at most {records_per_unit:,} of its records, each choice as likely as another, whose mean "
        "gradient is clipped"
    )


def generator_of(noise: str) -> str:
    """Where the random bits of sampling and noise of this kind come from: "philox" or "chacha20"."""
    return "philox" if noise == "gaussian" else "chacha20"


def steps_per_epoch(num_examples: int, expected_batch_size: float) -> int:
    """round(N / B), at least 1: how many logical batches count as one pass over the data."""
    return max(1, round(num_examples / expected_batch_size))


def default_delta(num_examples: int) -> float:
    """1 / N**1.1, rounded *down* to two significant digits, so that it stays below 1 / N."""
    exact = 1.0 / max(2, num_examples) ** 1.1
    unit = 10.0 ** (math.floor(math.log10(exact)) - 1)
    return float(f"{math.floor(exact / unit) * unit:.1e}")
