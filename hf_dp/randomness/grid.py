r"""sigma, C and the number of coordinates -> the grid of whole numbers that discrete noise lives on, and its proof.

**The release.** Let d be the number of coordinates, and

    S = 2**22                               standard deviation of the noise, in steps of the grid
    D = floor(S / sigma)                    in exact fractions: the sensitivity, in steps
    R = D - floor(sqrt(d)) / 2 - 2          the norm to which a gradient is clipped before it is rounded, in steps
    step = sigma C / S                      the distance of two grid points, in the gradient's units

Example b's integer vector is z_b = round(g_b min(1 / step, R / |g_b|)), from a forward and backward pass of its own.
The proof needs |z_b| <= D, and does not rely on floating point for it: the coordinates are clamped to [-D, D] *as
integers*, the sum of their squares is formed exactly, and where it exceeds D**2 the example counts as zero. (With
accurate floats that never happens: rounding d coordinates adds at most sqrt(d) / 2 to a norm of at most R.) Sums of
int64 do not depend on their order. The release is v = sum_b z_b + X with X from N_Z(0, S**2)^d. Computing v step / B
is post-processing, however it is rounded. So D step <= C is the sensitivity, and S step = sigma C the noise.

**Assumption.** z_b is a function of its example, of the weights (known from earlier releases) and of random bits of
its own, such as a dropout mask; it depends on no other example. Which function it is does not matter. The random bits
are independent and uniform.

**One step.** Let P be the law of v without the record and Q its law with the record in the draw, both given the other
records drawn and all masks. Q is P shifted by an integer vector z with |z| <= D. For whole j, completing the square in
(Q/P)^j P leaves a Gaussian sum over the lattice shifted by j z, which is the lattice itself. Hence, exactly,

    E_P[(Q/P)^j] = exp(j (j-1) |z|^2 / 2 S^2)     (Canonne, Kamath, Steinke 2020, proposition 5)
                <= exp(j (j-1) / 2 sigma^2)       because |z| <= D <= S / sigma: the continuous Gaussian's own value

With M = (1-q) P + q Q, for whole a >= 2:

    E_P[(M/P)^a] = sum_j binom(a, j) (1-q)^(a-j) q^j E_P[(Q/P)^j]        all terms positive

so the Rényi divergence of M from P is at most that of the continuous subsampled Gaussian (Mironov, Talwar, Zhang 2019,
section 3.3). At fractional orders the series has terms of both signs: nothing is claimed there.

**The other direction**, the divergence of P from M, is no greater. Let L = Q/P, f(r) = 1 - q + q r and
h = f^a - f^(1-a). Then E_P[h(L)] is the difference of the two moments, and it has to be shown to be >= 0. The map
v -> 2 s + z - v, with s the sum without the record, maps the lattice onto itself and swaps P and Q. Therefore

    E_P[h(L)] = 1/2 E_P[h(L) + L h(1/L)]

and it is enough that H(r) = h(r) + r h(1/r) >= 0 for r >= 1, since H(r) = r H(1/r). Write A = log f(r) >= 0,
B = -log f(1/r) >= 0 and t = a - 1/2:

    H(r) = 2 (f(r)^(1/2) sinh(t A) - r f(1/r)^(1/2) sinh(t B))

H is 0 at t = 1/2, because f(r) - 1 = r (1 - f(1/r)). And sinh(t A) / sinh(t B) grows with t, because A >= B, which
follows from f(r) f(1/r) = 1 + q (1-q) (r-1)^2 / r >= 1.

**All steps.** Rényi divergences of one order add up over adaptive steps, and mixing over the other records drawn and
the masks does not raise exp((a-1) divergence), which is jointly convex. So the epsilon of dp-accounting's Rényi
accountant *at whole orders from 2* is an upper bound, under the zero-out relation as under add-or-remove. Nothing is
claimed from privacy loss distributions, which are those of the continuous Gaussian in one dimension.
"""

import math
from fractions import Fraction
from typing import NamedTuple

from hf_dp.errors import ConfigError

STD = 1 << 22  # S: standard deviation of the noise, in steps of the grid
MIN_SIGMA = 0.25  # then D <= 2**24: squares stay below 2**48, and sums of 2**38 examples within int64


class Grid(NamedTuple):
    """The grid that the numbers of a release lie on.

    Attributes:
        step: distance of two grid points, in the gradient's units.
        sensitivity: D, the greatest Euclidean norm of one example's integer vector.
        radius: R, the norm to which gradients are clipped before rounding, in steps.
    """

    step: float
    sensitivity: int
    radius: float


def integer_sensitivity(noise_multiplier: float) -> int:
    """D = floor(S / sigma), so that S / D >= sigma exactly."""
    return math.floor(Fraction(STD) / Fraction(noise_multiplier))


def sigma_problem(noise_multiplier: float) -> str | None:
    """Why this sigma is too small for discrete noise, or None."""
    if math.isfinite(noise_multiplier) and noise_multiplier >= MIN_SIGMA:
        return None
    return (
        f"noise='discrete' needs a noise_multiplier of at least {MIN_SIGMA} (got {noise_multiplier:g}): use more "
        "noise, or 'gaussian'"
    )


def grid_for(noise_multiplier: float, clip_norm: float, num_coordinates: int) -> Grid:
    """The grid of a run.

    Raises:
        ConfigError: sigma below MIN_SIGMA, or so much noise on so many coordinates that rounding would take half of C.
    """
    problem = sigma_problem(noise_multiplier)
    if problem:
        raise ConfigError(problem)
    most = integer_sensitivity(noise_multiplier)
    radius = most - math.isqrt(num_coordinates) / 2 - 2
    if radius < most / 2:
        raise ConfigError(
            f"noise='discrete' has no room for {num_coordinates:,} coordinates at noise_multiplier "
            f"{noise_multiplier:g}: rounding would take more than half of clip_norm. Train fewer parameters, use less "
            "noise, or noise='gaussian'"
        )
    return Grid(noise_multiplier * clip_norm / STD, most, radius)
