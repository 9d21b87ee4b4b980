"""What will be run: the numbers of the subsampled Gaussian mechanism, all of them public, none of them changeable."""

import math
from dataclasses import dataclass
from typing import NamedTuple

UNIT = "record"  # one row of the training set
GROUP = 'group of records with the same "{column}"'  # all rows with one value in a column, protected together
METRIC_NOISE = 10.0  # a released metric's noise over its sensitivity, in units of the gradient's sigma
METRICS = ("loss", "batch_size")  # what may be released beside the gradient, as further coordinates of the same vector
DISCRETE = "discrete"  # the kind of noise that is drawn and added in whole numbers (`grid.py`)
RELATION = "zero-out"  # neighbours: one record replaced by one that contributes nothing; N is public


class Segment(NamedTuple):
    """`num_steps` steps in a row of the Poisson-subsampled Gaussian mechanism with the same q, sigma and kind of noise."""

    sample_rate: float
    noise_multiplier: float
    num_steps: int
    noise: str = "gaussian"


@dataclass(frozen=True)
class Mechanism:
    """DP-SGD as it will run (Abadi et al. 2016, algorithm 1, with Poisson sampling).

    Each of `num_steps` steps keeps every one of `num_examples` records with probability `sample_rate`, clips each kept
    example's gradient to `clip_norm` in Euclidean norm, adds N(0, noise_std² I) to the sum, and divides by
    `expected_batch_size`, a public constant.

    Attributes:
        num_examples: N, the number of units; public under the zero-out relation.
        expected_batch_size: B, over all processes; 1 <= B <= N.
        num_steps: T, planned.
        noise_multiplier: sigma. 0 means no noise: epsilon is infinite.
        clip_norm: C.
        delta: of (epsilon, delta).
        target_epsilon: what sigma was calibrated to, or None where sigma was given.
        loss_bound: L: training loss, clamped to [0, L], and batch size are released in the same vector (`metrics.py`);
            None where the gradient alone is.
        debug: the randomness came from a fixed seed; nothing about the run is private.
        noise: its kind, one of `config.NOISES`.
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

    @property
    def sample_rate(self) -> float:
        """Q = B / N, the probability with which a record enters a step."""
        return self.expected_batch_size / self.num_examples

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
        """Noise over the sensitivity of all that a step releases: what epsilon is computed from; sigma without metrics."""
        return self.noise_multiplier / release_norm(self.loss_bound)

    @property
    def generator(self) -> str:
        """Where the random bits of draws and noise come from: "philox" or "chacha20"."""
        return generator_of(self.noise)

    @property
    def is_discrete(self) -> bool:
        """Whether sums and noise are whole numbers (`grid.py`), and each example has a pass of its own."""
        return self.noise == DISCRETE

    @property
    def is_private(self) -> bool:
        """Whether any guarantee can be stated at all."""
        return self.noise_multiplier > 0 and not self.debug

    @property
    def planned(self) -> Segment:
        """The whole plan as one run-length segment."""
        return Segment(self.sample_rate, self.joint_noise_multiplier, self.num_steps, self.noise)


def release_norm(loss_bound: float | None) -> float:
    """Sensitivity of a step's release in units of C: 1, or sqrt(1 + 2 / 10**2) with both metrics (`metrics.py` has the proof)."""
    return 1.0 if loss_bound is None else math.sqrt(1 + len(METRICS) / METRIC_NOISE**2)


def unit_of(column: str | None) -> str:
    """What is protected as one, as the card and the ledger name it."""
    return UNIT if column is None else GROUP.format(column=column)


def generator_of(noise: str) -> str:
    """Where the random bits behind draws and noise of this kind come from: "philox" or "chacha20"."""
    return "philox" if noise == "gaussian" else "chacha20"


def steps_per_epoch(num_examples: int, expected_batch_size: int) -> int:
    """round(N / B), at least 1: the logical batches that count as one pass over the data."""
    return max(1, round(num_examples / expected_batch_size))


def default_delta(num_examples: int) -> float:
    """1 / N**1.1, rounded *down* to two significant digits, so that it stays below 1 / N."""
    exact = 1.0 / max(2, num_examples) ** 1.1
    unit = 10.0 ** (math.floor(math.log10(exact)) - 1)
    return float(f"{math.floor(exact / unit) * unit:.1e}")
