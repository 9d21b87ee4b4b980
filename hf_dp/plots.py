"""A mechanism -> a picture of epsilon against steps."""

from pathlib import Path

from hf_dp import accounting
from hf_dp.errors import ConfigError
from hf_dp.mechanism import Mechanism

POINTS = 16


def draw_epsilon(mechanism: Mechanism, path: Path) -> None:
    """Writes the picture; the format is the file name's ending (png, svg, pdf).

    Raises:
        ConfigError: no noise, so that there is no epsilon to draw, or a path that cannot be written.
    """
    if not mechanism.noise_multiplier:
        raise ConfigError("cannot draw epsilon: without noise it is infinite after the first step")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = sorted({max(1, round(mechanism.num_steps * (i / POINTS) ** 2)) for i in range(1, POINTS + 1)})
    spent = [accounting.spent(mechanism.segments(0, t), mechanism.delta) for t in steps]
    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    axes.plot(steps, [e.rdp for e in spent], color="0.6", label="by RDP, looser")
    axes.plot(steps, [e.epsilon for e in spent], marker="o", markersize=3, label="epsilon")
    if mechanism.target_epsilon is not None:
        axes.axhline(mechanism.target_epsilon, color="0.3", linestyle=":", label="target")
    axes.set(xlim=(0, None), ylim=(0, None), xlabel="steps", ylabel=f"epsilon at delta {mechanism.delta:g}")
    axes.set_title(f"q = {mechanism.sample_rate:.4g}, sigma = {mechanism.noise_multiplier:.4g}", fontsize=10)
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the picture {path}: {error}") from None
    finally:
        pyplot.close(figure)
