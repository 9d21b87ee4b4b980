"""Attacks on private models and on others, and a guarantee -> a picture: true against false positives, both axes logarithmic."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np

from hf_dp.accounting import spent
from hf_dp.audit.membership import Attack, ceilings
from hf_dp.errors import ConfigError
from hf_dp.mechanism import Segment


def draw_attacks(
    attacks: Mapping[str, Attack], guarantees: Sequence[Sequence[Segment]], delta: float, path: Path
) -> None:
    """Writes the picture; the format is the file name's ending (png, svg, pdf).

    Args:
        attacks: by the name in the legend.
        guarantees: steps, each with a limit of its own; infinite ones have none.
        delta: of the epsilons that stand beside them.
        path: of the picture.

    Raises:
        ConfigError: the picture cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.6, 5.0), layout="constrained")
    rates = np.geomspace(1e-4, 1, 200)
    for segments, style in zip(guarantees, cycle(("-", "--", "-.")), strict=False):
        epsilon = spent(segments, delta).epsilon
        if math.isfinite(epsilon):
            most = ceilings(segments, delta, [float(a) for a in rates])
            axes.fill_between(rates, most, 1, color="0.5", alpha=0.15, linewidth=0)
            axes.plot(rates, most, color="0.3", linewidth=1, linestyle=style, label=f"limit at epsilon {epsilon:.3g}")
    axes.plot(rates, rates, color="0.6", linestyle=":", label="guessing")
    for name, attack in attacks.items():
        label = f"{name}: area {attack.area.estimate:.3f}"
        axes.plot(attack.false_positives, attack.true_positives, drawstyle="steps-post", label=label)
    axes.set(
        xscale="log", yscale="log", xlim=(1e-4, 1), ylim=(1e-4, 1), xlabel="false positives", ylabel="true positives"
    )
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the picture {path}: {error}") from None
    finally:
        pyplot.close(figure)
