"""Passes over examples -> what a step releases, before noise is added: a sum in float32, or a sum of whole numbers.

Both kinds are one flat vector, set to zero at the start of a step, with a view for each trainable parameter, or for
this process's shard of it. The two coordinates of noised metrics (see `metrics`) come last. The run's mechanism decides
which kind is needed, and `new_sum` is the only place that asks for it.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from hf_dp.errors import CaptureError
from hf_dp.mechanism import METRICS, StepSettings
from hf_dp.per_example import (
    Owned,
    Pass,
    PerExample,
    UnitUnderWay,
    clipped_gradient_sum,
    clipped_gradients,
    of_units,
    per_example_factors,
    trains_shards,
    views,
)
from hf_dp.step.coordinates import Coordinates, Shards, local
from hf_dp.step.integers import add_integer_gradient, grid_of, refuse_several
from hf_dp.step.metrics import contribution


class ClippedSum(Protocol):
    """The vector of one step.

    Attributes:
        flat: [P], or [P + 2] with metrics: P trainable numbers, in the order of the model's parameters; or of all
            shards of this process.
        coordinates: of `flat` in the whole; None where it is the whole.
    """

    flat: Tensor
    coordinates: Coordinates | None

    def add(
        self,
        model: nn.Module,
        losses: Callable[[], Tensor],
        size: int,
        level: StepSettings,
        owned: Owned | None = None,
    ) -> None:
        """Adds the clipped gradients of `size` examples, or of the units that own them.

        Args:
            model: with the parameters that `flat` has views for.
            losses: runs the forward pass and returns one loss an example, [size].
            size: number of examples.
            level: the settings of the step.
            owned: which units the examples belong to; None where each is one. Of a unit in parts nothing is added
                before its last one.

        Raises:
            UnsupportedParameterError, CaptureError: as `per_example_factors`, or `UnitUnderWay`.
        """

    def begin(self) -> None:
        """Sets everything to zero."""

    def add_nothing(self) -> None:
        """Where all processes add together, takes part with nothing of its own."""

    def refuse_rest(self) -> None:
        """Raises CaptureError if a unit has not come to its last example."""


class _OfUnits:
    """What both kinds of sums do alike: `flat`, and the unit under way."""

    def __init__(self, flat: Tensor, model: nn.Module) -> None:
        self.flat, self._unit = flat, None
        self._shapes = trainable(model)
        self._parts = views(flat, self._shapes)

    _unit: UnitUnderWay | None
    coordinates: Coordinates | None = None

    def add_nothing(self) -> None:
        """See `ClippedSum.add_nothing`."""

    def begin(self) -> None:
        """See `ClippedSum.begin`."""
        self.flat.zero_()
        self._unit = None

    def refuse_rest(self) -> None:
        """See `ClippedSum.refuse_rest`."""
        if self._unit is not None and self._unit.is_begun:
            raise CaptureError("some examples of a unit are missing, so that its gradient is not known")

    def _part(self, model: nn.Module, losses: Callable[[], Tensor], owned: Owned, factors_of: Pass) -> Pass | None:
        """Adds a pass to the unit under way; if it is whole then, a pass over one example that gives what it found."""
        if self._unit is None:
            dtype = torch.float32 if self.flat.dtype == torch.int64 else self.flat.dtype
            self._unit = UnitUnderWay({n: p.detach().to(self.flat.device, dtype) for n, p in self._shapes.items()})
        found = factors_of(model, losses, sum(owned.counts))
        with torch.no_grad(), torch.autocast(self.flat.device.type, enabled=False):
            whole = self._unit.add(found, owned)
        return None if whole is None else lambda *_: whole


class FloatSum(_OfUnits):
    """sum_b min(1, C / |g_b|) g_b in float32 (Abadi et al. 2016, algorithm 1), and the metrics where there are some."""

    def __init__(
        self, model: nn.Module, level: StepSettings, device: torch.device, factors_of: Pass = per_example_factors
    ) -> None:
        extra = 0 if level.loss_bound is None else len(METRICS)
        super().__init__(torch.zeros(_size(model) + extra, device=device), model)
        self._factors_of = factors_of

    def add(
        self,
        model: nn.Module,
        losses: Callable[[], Tensor],
        size: int,
        level: StepSettings,
        owned: Owned | None = None,
    ) -> None:
        """See `ClippedSum.add`."""
        factors_of: Pass | None = self._factors_of
        if owned is not None and owned.of:
            factors_of, size = self._part(model, losses, owned, self._factors_of), 1
        elif owned is not None:
            factors_of = of_units(self._factors_of, owned.counts)
        if factors_of is None:
            return
        seen = clipped_gradient_sum(model, losses, size, level.clip_norm, self._parts, factors_of)
        self._add_metrics(seen, level)

    def _add_metrics(self, seen: PerExample, level: StepSettings) -> None:
        if level.loss_bound is not None:
            metrics = contribution(seen.losses, clip_norm=level.clip_norm, loss_bound=level.loss_bound)
            self.flat[-len(METRICS) :] += metrics


class ShardedSum(FloatSum):
    """As `FloatSum`, of this process's shards alone: each pass adds all processes' clipped gradients, scattered."""

    def __init__(
        self, model: nn.Module, level: StepSettings, device: torch.device, factors_of: Pass = per_example_factors
    ) -> None:
        extra = 0 if level.loss_bound is None else len(METRICS)
        self._shards, self._factors_of, self._device = Shards(trainable(model)), factors_of, device
        own = {name: local(p) for name, p in trainable(model).items()}
        self.flat = torch.zeros(sum(p.numel() for p in own.values()) + extra, device=device)
        self._parts, self._unit = views(self.flat, own), None
        self.coordinates = self._shards.coordinates(extra)

    def add(
        self,
        model: nn.Module,
        losses: Callable[[], Tensor],
        size: int,
        level: StepSettings,
        owned: Owned | None = None,
    ) -> None:
        """See `ClippedSum.add`; a unit in parts is an error."""
        if owned is not None and owned.of:
            raise CaptureError("units of several records are not summed in shards: leave unit_column out, or use DDP")
        factors_of = self._factors_of if owned is None else of_units(self._factors_of, owned.counts)
        seen, add = clipped_gradients(model, losses, size, level.clip_norm, factors_of)
        self._shards.add_reduced(add, self._parts, self._device)
        self._add_metrics(seen, level)

    def add_nothing(self) -> None:
        """See `ClippedSum.add_nothing`."""
        self._shards.add_reduced(lambda name, whole: None, self._parts, self._device)


class IntegerSum(_OfUnits):
    """The sum for `noise='discrete'`: int64 vectors of bounded norm, one example a pass (see `randomness.grid`)."""

    def __init__(self, model: nn.Module, level: StepSettings, device: torch.device) -> None:
        self._grid = grid_of(model, level.noise_multiplier, level.clip_norm)
        super().__init__(torch.zeros(_size(model), dtype=torch.int64, device=device), model)

    def add(
        self,
        model: nn.Module,
        losses: Callable[[], Tensor],
        size: int,
        level: StepSettings,
        owned: Owned | None = None,
    ) -> None:
        """See `ClippedSum.add`; a pass with more than one example is an error."""
        refuse_several(size)
        factors_of: Pass | None = per_example_factors
        if owned is not None and owned.of:
            factors_of = self._part(model, losses, owned, per_example_factors)
        if factors_of is not None:
            add_integer_gradient(model, losses, size, self._grid, self._parts, factors_of)


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in trainable(model).values())


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
    if trains_shards(model):
        return ShardedSum(model, level, device, factors_of)
    return FloatSum(model, level, device, factors_of)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
