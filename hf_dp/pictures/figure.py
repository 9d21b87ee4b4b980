"""Lines and what stands at the axes -> a picture file: the only place that knows matplotlib."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_dp.errors import ConfigError
from hf_dp.pictures.line_chart import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes


PRIVATE, PLAIN = "#1f5fa8", "#b35900"  # of lines about runs with and without noise, in every picture


@dataclass(frozen=True)
class Line:
    """Points in order of x, and how they are joined; colours, markers and styles are matplotlib's."""

    points: Sequence[Point]
    label: str | None = None
    color: str | None = None
    marker: str = ""
    style: str = "-"
    width: float = 1.5
    steps: bool = False
    shaded_above: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        lines: drawn in this order.
        x: the label of the horizontal axis.
        y: the label of the vertical axis.
        title: above the panel.
        log: which axes are logarithmic: "", "x", "y" or "xy". A linear axis begins at 0.
        limits: (from, to) of both axes; None leaves them to the data.
        ticks: the horizontal axis' marks and their texts; None leaves them to matplotlib.
        across: height and label of a dotted horizontal line.
        upright: place and label of a thin vertical line.
        notes: (text, the point that it is about), written beside the point.
        legend: "inside", "below" or "none".
    """

    lines: Sequence[Line]
    x: str
    y: str
    title: str = ""
    log: str = ""
    limits: tuple[float, float] | None = None
    ticks: Sequence[tuple[float, str]] | None = None
    across: tuple[float, str] | None = None
    upright: tuple[float, str] | None = None
    notes: Sequence[tuple[str, Point]] = ()
    legend: str = "inside"


def save_figure(path: Path, panels: Sequence[Panel], *, width: float, height: float) -> None:
    """Writes the panels below each other, with one horizontal axis; the file name's ending is the format (png, svg,
    pdf).

    Args:
        path: of the picture.
        panels: from top to bottom.
        width: in inches.
        height: in inches.

    Raises:
        ConfigError: the picture cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
    for axes, panel in zip(grid[:, 0], panels, strict=True):
        _lines(axes, panel)
        _frame(axes, panel)
        if panel.legend == "below":
            figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    for axes in grid[:-1, 0]:
        axes.set_xlabel("")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the picture {path}: {error}") from None


def _lines(axes: "Axes", panel: Panel) -> None:
    for line in panel.lines:
        xs, ys = [x for x, _ in line.points], [y for _, y in line.points]
        axes.plot(
            xs,
            ys,
            label=line.label,
            color=line.color,
            marker=line.marker,
            markersize=14 if line.marker == "*" else 3,
            linestyle=line.style,
            linewidth=line.width,
            drawstyle="steps-post" if line.steps else "default",
        )
        if line.shaded_above:
            axes.fill_between(xs, ys, 1, color="0.5", alpha=0.15, linewidth=0)
    if panel.across:
        axes.axhline(panel.across[0], color="0.3", linestyle=":", label=panel.across[1])
    if panel.upright:
        axes.axvline(panel.upright[0], color="0.3", linewidth=0.8, label=panel.upright[1])
    for text, point in panel.notes:
        axes.annotate(text, point, xytext=(-4, -14), textcoords="offset points", ha="right")


def _frame(axes: "Axes", panel: Panel) -> None:
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.set_title(panel.title, fontsize=10)
    if "x" in panel.log:
        axes.set_xscale("log")
    if "y" in panel.log:
        axes.set_yscale("log")
    if panel.limits:
        axes.set_xlim(*panel.limits)
        axes.set_ylim(*panel.limits)
    else:
        axes.set_xlim(left=None if "x" in panel.log else 0)
        axes.set_ylim(bottom=None if "y" in panel.log else 0)
    if panel.ticks is not None:
        axes.set_xticks([], minor=True)
        axes.set_xticks([x for x, _ in panel.ticks], labels=[text for _, text in panel.ticks])
    if panel.legend == "inside":
        axes.legend(frameon=False, fontsize=9)
