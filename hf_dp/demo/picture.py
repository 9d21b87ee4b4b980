"""Two fine-tunings -> a PNG: held-out loss over steps for both, and the epsilon that the private one had spent by then."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_dp.demo.compare import Tuned

BASE, PLAIN, PRIVATE = "#666666", "#b35900", "#1f5fa8"


def draw(path: Path, *, plain: Tuned, private: Tuned, target_epsilon: float | None) -> None:
    """Writes the picture: losses above, epsilon below, over the same steps."""
    figure = Figure(figsize=(7.2, 6.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    _losses(above, plain, private)
    _epsilons(below, private, target_epsilon)
    figure.align_ylabels()
    figure.savefig(path)


def _losses(axes: Any, plain: Tuned, private: Tuned) -> None:
    axes.axhline(private.losses[0][1], color=BASE, linestyle=":", label="base model")
    axes.plot(*zip(*private.losses, strict=True), color=PRIVATE, marker="o", markersize=3.5, label="private")
    axes.plot(*zip(*plain.losses, strict=True), color=PLAIN, marker="s", markersize=3.5, label="non-private")
    axes.set_ylabel("held-out loss\n(nats a character)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.92))
    _quiet(axes)


def _epsilons(axes: Any, private: Tuned, target: float | None) -> None:
    axes.plot(*zip(*private.epsilons, strict=True), color=PRIVATE, marker="o", markersize=3.5)
    last_step, last = private.epsilons[-1]
    axes.annotate(
        f"{last:.4g}", (last_step, last), xytext=(-4, -16), textcoords="offset points", ha="right", color=PRIVATE
    )
    if target is not None:
        axes.axhline(target, color=BASE, linestyle=":")
        axes.annotate(f"target {target:g}", (0, target), xytext=(4, 4), textcoords="offset points", color=BASE)
    axes.set_ylim(0, 1.2 * max(last, target or 0))
    axes.set_xlim(left=0)
    axes.set_ylabel("epsilon spent")
    axes.set_xlabel("optimizer step")
    _quiet(axes)


def _quiet(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
