"""Attacks and guarantees -> a picture: true against false positives, both axes logarithmic."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np

from hf_dp.accounting import spent
from hf_dp.audit.membership import Attack, ceilings
from hf_dp.mechanism import Segment
from hf_dp.pictures import PLAIN, PRIVATE, Line, Panel, save_figure

COLORS = {"private": PRIVATE, "without noise": PLAIN}


def plot_attacks(
    attacks: Mapping[str, Attack], guarantees: Sequence[Sequence[Segment]], delta: float, path: Path
) -> None:
    """Writes the picture; the file name's ending is the format (png, svg, pdf).

    Args:
        attacks: name in the legend -> attack; those named in COLORS have the colours of other pictures.
        guarantees: segments of steps; each finite guarantee is drawn as a limit.
        delta: at which the epsilons in the legend are stated.
        path: of the picture.

    Raises:
        ConfigError: the picture cannot be written.
    """
    rates = [float(a) for a in np.geomspace(1e-4, 1, 200)]
    lines = []
    for segments, style in zip(guarantees, cycle(("-", "--", "-.")), strict=False):
        epsilon = spent(segments, delta).epsilon
        if math.isfinite(epsilon):
            limits = list(zip(rates, ceilings(segments, delta, rates), strict=True))
            label = f"limit at epsilon {epsilon:.3g}"
            lines.append(Line(limits, label, color="0.3", width=1, style=style, shaded_above=True))
    lines.append(Line([(a, a) for a in rates], "guessing", color="0.6", style=":"))
    for name, attack in attacks.items():
        curve = list(zip(attack.false_positives.tolist(), attack.true_positives.tolist(), strict=True))
        label = f"{name}: area {attack.area.estimate:.3f}"
        lines.append(Line(curve, label, color=COLORS.get(name), steps=True))
    panel = Panel(lines, x="false positives", y="true positives", log="xy", limits=(1e-4, 1))
    save_figure(path, [panel], width=5.6, height=5.0)
