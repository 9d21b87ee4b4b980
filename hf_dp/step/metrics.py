"""Losses of private examples -> two more coordinates of the vector that a step releases; their noisy values -> the log.

The training loss and the batch size are as private as the gradient. They are released together with it, as one vector
under one draw:

    v = (sum_b clip(g_b),  (C / k) sum_b min(max(l_b, 0), L) / L,  (C / k) sum_b 1)
    released: v + N(0, (sigma C)² I)

with k = METRIC_NOISE. In their own units, the loss sum has noise k sigma L and the count has noise k sigma: k times the
gradient's noise, relative to what one record contributes (C, L and 1).

**Claim.** A step is the Poisson-subsampled Gaussian mechanism with noise multiplier

    z = (sigma^-2 + 2 (k sigma)^-2)^-1/2 = sigma / sqrt(1 + 2 / k²)

**Proof.** Under zero-out neighbours v is a sum with one term for each record of the draw, and each term depends on its
record alone. A record's term has norm at most C in the gradient's coordinates (clipping) and at most C / k in each of
the other two, so at most Delta = C sqrt(1 + 2 / k²) in all. Hence a record's presence moves v by a vector of norm at
most Delta, and the noise is spherical with standard deviation sigma C = z Delta. All coordinates belong to one draw:
given the draw, this is a Gaussian mechanism with noise multiplier z. The draw keeps each record independently with
probability q, so it is the Poisson-subsampled one (Abadi et al. 2016), and it is charged as such, once. QED.

Two separate charges, one for the gradient and one for the metrics, would each assume an independent draw. But a record
that is in one is also in the other, so the two charges would add up to less than was spent. Dividing by the public B,
and taking means over steps, are post-processing.
"""

import torch
from torch import Tensor

from hf_dp.mechanism import METRIC_NOISE, METRICS, Mechanism, StepSettings


def contribution(losses: Tensor, *, clip_norm: float, loss_bound: float) -> Tensor:
    """What the examples with these losses add to the two coordinates, float32 [2].

    One example moves each coordinate by at most `clip_norm` / METRIC_NOISE. A loss that is not finite counts as 0.
    """
    losses = torch.where(torch.isfinite(losses), losses, 0.0).float().clamp(0.0, loss_bound)
    sums = torch.stack([(losses / loss_bound).sum(), losses.new_tensor(float(len(losses)))])
    return sums * (clip_norm / METRIC_NOISE)


class ReleasedMetrics:
    """Noisy coordinates, step by step -> their means over the steps since they were last taken."""

    def __init__(self) -> None:
        self._sum = torch.zeros(len(METRICS))
        self._steps = 0

    @classmethod
    def of(cls, m: Mechanism) -> "ReleasedMetrics | None":
        """The metrics of a run of `m`; None if its steps release the gradient alone."""
        return None if m.loss_bound is None else cls()

    def add(self, noisy: Tensor, m: StepSettings) -> None:
        """Adds the two coordinates that a step of `m` released, [2].

        They are kept in the units of the log: losses as a mean over B, and records.
        """
        assert m.loss_bound is not None
        units = METRIC_NOISE / m.clip_norm * noisy.new_tensor([m.loss_bound / m.expected_batch_size, 1.0])
        self._sum = self._sum.to(noisy.device) + noisy * units
        self._steps += 1

    def take(self) -> dict[str, float]:
        """Name -> mean over the steps since the last call; empty if there was no step."""
        if not self._steps:
            return {}
        means = (self._sum.cpu() / self._steps).tolist()
        self._sum, self._steps = torch.zeros(len(METRICS)), 0
        return dict(zip(METRICS, means, strict=True))
