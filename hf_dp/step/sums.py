"""Passes over examples -> what a step releases, before noise is added: a sum in float32, or a sum of whole numbers.

Both kinds are one flat vector, set to zero at the start of a step, with a view for each trainable parameter. The two
coordinates of noised metrics (see `metrics`) come last. The run's mechanism decides which kind is needed, and `new_sum`
is the only place that asks for it.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from hf_dp.mechanism import METRICS, StepSettings
from hf_dp.per_example import Pass, clipped_gradient_sum, per_example_factors, views
from hf_dp.step.integers import add_integer_gradient, grid_of
from hf_dp.step.metrics import contribution


class ClippedSum(Protocol):
    """The vector of one step.

    Attributes:
        flat: [P], or [P + 2] with metrics: P trainable numbers, in the order of the model's parameters.
    """

    flat: Tensor

    def add(self, model: nn.Module, losses: Callable[[], Tensor], size: int, level: StepSettings) -> None:
        """Adds the clipped gradients of `size` examples.

        Args:
            model: with the parameters that `flat` has views for.
            losses: runs the forward pass and returns one loss an example, [size].
            size: number of examples.
            level: the settings of the step.

        Raises:
            UnsupportedParameterError, CaptureError: as `per_example_factors`.
        """


class FloatSum:
    """sum_b min(1, C / |g_b|) g_b in float32 (Abadi et al. 2016, algorithm 1), and the metrics where there are some."""

    def __init__(
        self, model: nn.Module, level: StepSettings, device: torch.device, factors_of: Pass = per_example_factors
    ) -> None:
        parameters = trainable(model)
        extra = 0 if level.loss_bound is None else len(METRICS)
        self.flat = torch.zeros(sum(p.numel() for p in parameters.values()) + extra, device=device)
        self._parts = views(self.flat, parameters)
        self._factors_of = factors_of

    def add(self, model: nn.Module, losses: Callable[[], Tensor], size: int, level: StepSettings) -> None:
        """See `ClippedSum.add`."""
        seen = clipped_gradient_sum(model, losses, size, level.clip_norm, self._parts, self._factors_of)
        if level.loss_bound is not None:
            metrics = contribution(seen.losses, clip_norm=level.clip_norm, loss_bound=level.loss_bound)
            self.flat[-len(METRICS) :] += metrics


class IntegerSum:
    """The sum for `noise='discrete'`: int64 vectors of bounded norm, one example a pass (see `randomness.grid`)."""

    def __init__(self, model: nn.Module, level: StepSettings, device: torch.device) -> None:
        parameters = trainable(model)
        self._grid = grid_of(model, level.noise_multiplier, level.clip_norm)
        self.flat = torch.zeros(sum(p.numel() for p in parameters.values()), dtype=torch.int64, device=device)
        self._parts = views(self.flat, parameters)

    def add(self, model: nn.Module, losses: Callable[[], Tensor], size: int, level: StepSettings) -> None:
        """See `ClippedSum.add`; a pass with more than one example is an error."""
        add_integer_gradient(model, losses, size, self._grid, self._parts)


def refuse_impossible_sum(model: nn.Module, level: StepSettings) -> None:
    """Checks, before anything is allocated, that the sum that these settings need can be kept.

    Raises:
        ConfigError: the grid of whole numbers cannot hold this sigma with so many parameters.
    """
    if level.is_discrete:
        grid_of(model, level.noise_multiplier, level.clip_norm)


def new_sum(
    model: nn.Module, level: StepSettings, device: torch.device, factors_of: Pass = per_example_factors
) -> ClippedSum:
    """A sum of the kind that the mechanism's noise needs, at zero."""
    if level.is_discrete:
        return IntegerSum(model, level, device)
    return FloatSum(model, level, device, factors_of)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
