"""What the steps released -> figures for the log: how loud the gradient is in it against the noise, and noised metrics.

A release is v + n, with n ~ N(0, (sigma C)² I_d), so E |v + n|² = |v|² + (sigma C)² d. The ratio of |v| to the noise's
norm follows from the release and public settings alone (post-processing). Its square has a standard deviation of about
sqrt(2 / (k d)) over k steps where there is no signal.
"""

import math

import torch
from torch import Tensor

from hf_dp.mechanism import METRICS, Mechanism, StepSettings
from hf_dp.step.coordinates import Coordinates
from hf_dp.step.metrics import ReleasedMetrics

SIGNAL_TO_NOISE = "signal_to_noise"
MARGIN = 3.0  # standard deviations


class _Ratio:
    """Squared norms of releases and of their noise, over some steps."""

    def __init__(self) -> None:
        self.excess = 0.0  # |v + n|² over (sigma C)² d, less 1, added up
        self.num_steps, self.num_coordinates = 0, 0

    def add(self, excess: float, num_coordinates: int) -> None:
        self.excess += excess
        self.num_steps += 1
        self.num_coordinates = num_coordinates

    def estimate(self, margin: float = 0.0) -> float:
        """|v| over the noise's norm, in a step (a root mean square); with `margin`, an upper limit of it."""
        error = math.sqrt(2 / (self.num_steps * self.num_coordinates))
        return math.sqrt(max(0.0, self.excess / self.num_steps + margin * error))


class ReleasedFigures:
    """Releases of a run of `mechanism`, step by step -> their figures since they were last taken."""

    def __init__(self, mechanism: Mechanism) -> None:
        self._metrics = ReleasedMetrics.of(mechanism)
        self._lately, self._in_all = _Ratio(), _Ratio()

    def add(self, released: Tensor, m: StepSettings, coordinates: Coordinates | None = None) -> None:
        """Adds what a step of `m` released, [P], or [P + 2] with metrics; or the shards of these coordinates."""
        gradient = released
        if self._metrics is not None:
            gradient = released[: -len(METRICS)]
            self._metrics.add(released[-len(METRICS) :], m)
        if m.noise_std > 0 and (len(gradient) or coordinates is not None):
            squared, size = torch.linalg.vector_norm(gradient, dtype=torch.float64) ** 2, len(gradient)
            if coordinates is not None:
                squared, size = coordinates.added_up(squared), coordinates.total - coordinates.shared
            for ratio in (self._lately, self._in_all):
                ratio.add(float(squared) / (m.noise_std**2 * size) - 1, size)

    def take(self) -> dict[str, float]:
        """Name -> mean over the steps since the last call; empty if there was no step."""
        found = {} if self._metrics is None else self._metrics.take()
        if self._lately.num_steps:
            found[SIGNAL_TO_NOISE] = self._lately.estimate()
            self._lately = _Ratio()
        return found

    def at_most(self) -> tuple[int, float]:
        """(steps seen, an upper limit of the signal's norm over the noise's in a step); infinite before the first."""
        ratio = self._in_all
        return ratio.num_steps, ratio.estimate(MARGIN) if ratio.num_steps else math.inf
