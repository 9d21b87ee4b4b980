"""A mechanism and one quantity to vary -> epsilon against steps, sigma, batch size or delta, as numbers and as a
picture.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from hf_dp.accounting.advice import at_batch, loudness
from hf_dp.accounting.epsilon import Epsilon, spent
from hf_dp.config import MIN_DELTA
from hf_dp.errors import AccountingError, ConfigError
from hf_dp.mechanism import Mechanism, Segment
from hf_dp.pictures import Line, Panel, save_figure

POINTS = 16
AGAINST = ("steps", "sigma", "batch", "delta")


class Curve(NamedTuple):
    """The varied quantity's name, its planned value, (value, epsilon) in rising order, and whether it spans powers of
    ten.
    """

    name: str
    planned: float
    points: list[tuple[float, Epsilon]]
    logarithmic: bool = False


def plot_epsilon(
    mechanism: Mechanism, path: Path, against: str = "steps", num_train_epochs: float | None = None
) -> None:
    """Writes the picture; the file name's ending is the format (png, svg, pdf).

    Against batch, it is epsilon that stays: sigma is calibrated anew for each size, and the picture shows the noise.

    Args:
        mechanism: the plan.
        path: of the picture.
        against: one of AGAINST. Steps go up to the planned number; sigma and batch from a quarter to four times the
            planned value; delta from a ten-thousandth of the planned value up to 1 / N.
        num_train_epochs: passes over the data, so that another batch size means another number of steps; None keeps the
            number of steps.

    Raises:
        ConfigError: there is no noise and so no finite epsilon, an unknown quantity, or a path that cannot be written.
    """
    if not mechanism.noise_multiplier:
        raise ConfigError("cannot plot epsilon: without noise it is infinite after the first step")
    if against == "batch":
        _plot_sizes(mechanism, path, num_train_epochs)
        return
    curve = curve_of(mechanism, against)
    ticks = [(x, f"{x:.3g}") for x, _ in curve.points[:: POINTS // 4]]
    panel = Panel(
        lines=[
            Line([(x, e.rdp) for x, e in curve.points], "by RDP, looser", color="0.6"),
            Line([(x, e.epsilon) for x, e in curve.points], "epsilon", marker="o"),
        ],
        x=curve.name,
        y="epsilon" if against == "delta" else f"epsilon at delta {mechanism.delta:g}",
        title=_what_is_fixed(mechanism, against),
        log=("x" if curve.logarithmic else "") + ("y" if against == "sigma" else ""),
        ticks=ticks if against == "sigma" else None,
        across=None if mechanism.target_epsilon is None else (mechanism.target_epsilon, "target"),
        upright=None if against == "steps" else (curve.planned, "as planned"),
    )
    save_figure(path, [panel], width=6.4, height=4.0)


def sizes_of(m: Mechanism, num_train_epochs: float | None = None) -> list[Mechanism]:
    """The plan at expected batch sizes from a quarter to four times its own, each with the epsilon of the plan.

    Sizes for which no sigma gives that epsilon are left out.
    """
    found = []
    for size in sorted({max(1, min(m.num_examples, round(b))) for b in _around(m.expected_batch_size, POINTS // 2)}):
        with suppress(AccountingError):
            found.append(at_batch(m, size, num_train_epochs))
    return found


def _plot_sizes(m: Mechanism, path: Path, epochs: float | None) -> None:
    """Noise against the batch size, at one epsilon: what a step adds, and what all steps leave beside their signal."""
    found, planned = sizes_of(m, epochs), loudness(m, 1)
    at = [(float(x.expected_batch_size), loudness(x, 1)) for x in found]
    upright = (float(m.expected_batch_size), "as planned")
    all_steps = Panel(
        lines=[
            Line([(b, x.of_all_steps / planned.of_all_steps) for b, x in at], "of all steps", marker="o"),
            Line([(b, x.of_a_step / planned.of_a_step) for b, x in at], "of one step", marker="s"),
        ],
        x="expected batch size" + (" at first" if m.levels else ""),
        y="noise : signal, planned = 1",
        title=f"N = {m.num_examples:,}, epsilon = {spent(m.segments(), m.delta).epsilon:.4g} at every size, "
        + (f"{m.num_steps:,} steps" if epochs is None else f"{epochs:g} epochs"),
        log="x",
        ticks=[(b, f"{b:,.0f}") for b, _ in at[::2]],
        upright=upright,
    )
    sigma = Panel(
        lines=[Line([(float(x.expected_batch_size), x.noise_multiplier) for x in found], "sigma", marker="o")],
        x=all_steps.x,
        y="noise multiplier sigma",
        log="x",
        ticks=all_steps.ticks,
        upright=upright,
        legend="none",
    )
    save_figure(path, [all_steps, sigma], width=6.4, height=6.4)


def curve_of(m: Mechanism, against: str) -> Curve:
    """The points of the curve, for all of AGAINST but batch. Values at which no accountant has a finite answer are left
    out.

    Raises:
        ConfigError: `against` is not one of AGAINST.
    """
    if against not in AGAINST:
        raise ConfigError(f"cannot plot epsilon against {against!r}: expected {', '.join(AGAINST)}")
    first = " at first" if m.levels else ""
    if against == "steps":
        steps = sorted({max(1, round(m.num_steps * (i / POINTS) ** 2)) for i in range(1, POINTS + 1)})
        points = _points(steps, lambda t: spent(m.segments(0, round(t)), m.delta))
        return Curve("steps", m.num_steps, list(points))
    if against == "sigma":
        points = _points(_around(m.noise_multiplier), lambda s: spent(_with_sigma(m, s), m.delta))
        return Curve(f"noise multiplier sigma{first}", m.noise_multiplier, list(points), True)
    low, high = max(MIN_DELTA, m.delta * 1e-4), max(m.delta, 0.999 / m.num_examples)
    deltas = [low * (high / low) ** (i / POINTS) for i in range(POINTS + 1)]
    return Curve("delta", m.delta, list(_points(deltas, lambda d: spent(m.segments(), d))), True)


def _points(values: list[float] | list[int], epsilon_at: Callable[[float], Epsilon]) -> Iterator[tuple[float, Epsilon]]:
    for value in values:
        with suppress(AccountingError):
            found = epsilon_at(value)
            if math.isfinite(found.epsilon):
                yield float(value), found


def _around(value: float, points: int = POINTS) -> list[float]:
    return [value * 4 ** (2 * i / points - 1) for i in range(points + 1)]


def _with_sigma(m: Mechanism, sigma: float) -> list[Segment]:
    """Segments with another first sigma; the later sigmas of a schedule change in proportion."""
    factor = sigma / m.noise_multiplier
    return [s._replace(joint_noise_multiplier=s.joint_noise_multiplier * factor) for s in m.segments()]


def _what_is_fixed(m: Mechanism, against: str) -> str:
    fixed = {
        "steps": (f"q = {m.sample_rate:.4g}", f"sigma = {m.noise_multiplier:.4g}"),
        "sigma": (f"q = {m.sample_rate:.4g}", f"{m.num_steps:,} steps"),
        "delta": (f"q = {m.sample_rate:.4g}", f"sigma = {m.noise_multiplier:.4g}", f"{m.num_steps:,} steps"),
    }
    return ", ".join(fixed[against])
