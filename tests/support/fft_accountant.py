"""Segments and delta -> epsilon, by direct numerical convolution: a twin of the accountants, with none of their code.

The privacy loss of one step, log(P/Q) under P, has a distribution function in closed form. It is put on a grid by
rounding to the nearest point, the mean is corrected (Gopi et al. 2021, "PRV"), and steps are added up by the power of a
Fourier transform. It is an estimate, neither an upper nor a lower bound: off by about half a grid cell for a step, in
random directions.

P and Q differ by one record: (1 - q) N(0, sigma²) + q N(1, sigma²) against N(0, sigma²), and the other way round.
"""

import numpy as np
from scipy.special import ndtr
from scipy.stats import norm

POINTS = 1 << 18


def epsilon(segments: list[tuple[float, float, int]], delta: float, points: int = POINTS) -> float:
    """Epsilon at delta of [(q, sigma, steps), ...], the worse of both directions."""
    return max(_one_direction(segments, delta, adding, points) for adding in (False, True))


def _one_direction(segments: list[tuple[float, float, int]], delta: float, adding: bool, points: int) -> float:
    reach = _reach(segments)
    losses = (np.arange(points) - points // 2) * (2 * reach / points)
    spectrum, mean = np.ones(points // 2 + 1, dtype=complex), 0.0
    for q, sigma, steps in segments:
        masses, shift = _one_step(losses, q, sigma, adding)
        spectrum *= np.fft.rfft(np.fft.ifftshift(masses)) ** steps
        mean += steps * shift
    total = np.fft.fftshift(np.fft.irfft(spectrum, points)).clip(0)
    return _epsilon_of(losses + mean, total, delta)


def _one_step(losses: np.ndarray, q: float, sigma: float, adding: bool) -> tuple[np.ndarray, float]:
    """Masses on the grid, and how much the grid has to be moved so that the mean is right."""
    h = losses[1] - losses[0]
    masses = np.diff(_distribution(np.append(losses - h / 2, losses[-1] + h / 2), q, sigma, adding))
    x = np.linspace(
        -12 * sigma, 1 + 12 * sigma, 20_001
    )  # the mean over x itself: twelve deviations, nothing is left beyond
    density = norm.pdf(x, 0, sigma) if adding else (1 - q) * norm.pdf(x, 0, sigma) + q * norm.pdf(x, 1, sigma)
    exact = float(np.sum(density * _loss(x, q, sigma)) * (x[1] - x[0])) * (-1 if adding else 1)
    return masses, exact - float(masses @ losses)


def _loss(x: np.ndarray, q: float, sigma: float) -> np.ndarray:
    """log of (1 - q) N(0) + q N(1) over N(0), at x."""
    exponent = (2 * x - 1) / (2 * sigma**2)
    return np.where(exponent > 600, exponent + np.log(q), np.log1p(q * np.expm1(np.minimum(exponent, 600))))


def _distribution(losses: np.ndarray, q: float, sigma: float, adding: bool) -> np.ndarray:
    """P[loss <= l] for each l, under P."""
    level = -losses if adding else losses
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = np.log(np.maximum(np.expm1(np.minimum(level, 600)) + q, 0) / q)
    x = sigma**2 * np.where(level > 600, level - np.log(q), inside) + 0.5
    if adding:
        return 1 - ndtr(x / sigma)
    return (1 - q) * ndtr(x / sigma) + q * ndtr((x - 1) / sigma)


def _reach(segments: list[tuple[float, float, int]]) -> float:
    """Half the width of the grid: beyond it the sum of losses has a mass below 1e-13, by Chernoff's bound."""
    a = np.geomspace(0.5, 100, 40)
    total = np.zeros_like(a)
    for q, sigma, steps in segments:
        x = np.linspace(-14 * sigma, 60 / sigma + 1 + 14 * sigma, 20_001)[:, None]
        density = np.log((1 - q) * norm.pdf(x, 0, sigma) + q * norm.pdf(x, 1, sigma) + 1e-300)
        top = a * _loss(x, q, sigma) + density
        total += steps * (np.log(np.exp(top - top.max(0)).sum(0) * (x[1, 0] - x[0, 0])) + top.max(0))
    return 1.2 * float(np.min((total + np.log(1e13)) / a))


def _epsilon_of(losses: np.ndarray, masses: np.ndarray, delta: float) -> float:
    """The least eps with E[(1 - exp(eps - loss))+] <= delta, by bisection."""
    low, high = 0.0, float(losses[-1])
    for _ in range(60):
        middle = (low + high) / 2
        above = losses > middle
        too_much = float(masses[above] @ -np.expm1(middle - losses[above])) > delta
        low, high = (middle, high) if too_much else (low, middle)
    return high
