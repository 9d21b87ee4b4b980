"""Attacks on private models and on others, and a guarantee -> a picture: true against false positives, both axes logarithmic."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hf_dp.audit.membership import Attack, ceilings
from hf_dp.errors import ConfigError
from hf_dp.mechanism import Segment


def draw_attacks(attacks: Mapping[str, Attack], segments: Sequence[Segment], delta: float, path: Path) -> None:
    """Writes the picture; the format is the file name's ending (png, svg, pdf).

    Args:
        attacks: by the name in the legend.
        segments: steps whose guarantee is drawn.
        delta: of the epsilon that stands beside it.
        path: of the picture.

    Raises:
        ConfigError: the picture cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from hf_dp.epsilon import spent

    figure, axes = pyplot.subplots(figsize=(5.6, 5.0), layout="constrained")
    rates = np.geomspace(1e-4, 1, 200)
    most = ceilings(segments, delta, [float(a) for a in rates])
    epsilon = spent(segments, delta).epsilon
    axes.fill_between(rates, most, 1, color="0.9", label=f"ruled out by epsilon {epsilon:.3g} at {delta:g}")
    axes.plot(rates, most, color="0.3")
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
