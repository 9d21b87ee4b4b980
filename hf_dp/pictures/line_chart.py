"""Points and axis labels -> an inline SVG line chart in the colours of the page's style sheet.

Lines have the classes `line-0`, `line-1`, ...; a legend stands beneath. A dashed `guide` may be drawn with them. Text
is as large as the page's, nothing is loaded, and every word is escaped.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]
WIDTH, HEIGHT = 400, 262
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 12, 46  # of the frame, in pixels
MOST_POINTS, MOST_DOTS = 300, 25


@dataclass(frozen=True)
class Axes:
    """Labels and limits of the axes. `limits` are (left, right, low, high); None takes them from the data. `percent`
    writes 0.5 as 50%.
    """

    title: str
    x: str
    y: str
    limits: tuple[float, float, float, float] | None = None
    percent: bool = False


def line_chart(
    lines: Mapping[str, Sequence[Point]], axes: Axes, guide: tuple[str, Sequence[Point]] | None = None
) -> str:
    """An <svg> with a line for each name. Points are in order of x; of very many points, only every k-th is drawn."""
    drawn = {name: _thinned(points) for name, points in lines.items()}
    every = [p for points in [*drawn.values(), guide[1] if guide else []] for p in points]
    limits = axes.limits or _limits(every)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" class="chart" xmlns="http://www.w3.org/2000/svg">',
        f"<title>{escape(axes.title)}</title>",
        _grid(limits, percent=axes.percent),
        _words(axes),
    ]
    if guide:
        parts.append(f'<path class="guide" d="{_path(guide[1], limits)}"/>')
    for number, points in enumerate(drawn.values()):
        parts.append(f'<path class="line line-{number}" d="{_path(points, limits)}"/>')
        if len(points) <= MOST_DOTS:
            parts += [_dot(point, limits, number) for point in points]
    return "\n".join([*parts, "</svg>", _legend(list(drawn), guide[0] if guide else None)])


def _legend(names: Sequence[str], guide: str | None) -> str:
    keys = [(f"line line-{number}", name) for number, name in enumerate(names)]
    keys += [("guide", guide)] if guide else []
    items = [
        f'<li><svg class="key" viewBox="0 0 24 10" aria-hidden="true"><path class="{kind}" d="M 0 5 H 24"/></svg>'
        f"{escape(name)}</li>"
        for kind, name in keys
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _thinned(points: Sequence[Point]) -> list[Point]:
    every = max(1, math.ceil(len(points) / MOST_POINTS))
    kept = list(points[::every])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def _limits(points: Sequence[Point]) -> tuple[float, float, float, float]:
    """x from 0 to the last point; y includes 0 and all points."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min([0.0, *ys]), max([0.0, *ys])
    room = 0.06 * (high - low) or 1.0
    return 0.0, max([1.0, *xs]), low - room * (low < 0), high + room


def _at(point: Point, limits: tuple[float, float, float, float]) -> tuple[float, float]:
    left, right, low, high = limits
    x = LEFT + (WIDTH - LEFT - RIGHT) * (point[0] - left) / (right - left)
    return x, TOP + (HEIGHT - TOP - BOTTOM) * (1 - (point[1] - low) / (high - low))


def _path(points: Sequence[Point], limits: tuple[float, float, float, float]) -> str:
    return "M " + " L ".join("{:.1f} {:.1f}".format(*_at(point, limits)) for point in points) if points else ""


def _dot(point: Point, limits: tuple[float, float, float, float], number: int) -> str:
    x, y = _at(point, limits)
    return f'<circle class="dot-{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>'


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high, spaced by 1, 2 or 5 times a power of ten; at least two and at most `most`."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    while (high - low) / step > most - 1e-9:
        step *= 2.5 if f"{step:e}"[0] == "2" else 2
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _grid(limits: tuple[float, float, float, float], *, percent: bool) -> str:
    left, right, low, high = limits
    parts = []
    for x in ticks(left, right):
        at = _at((x, low), limits)
        parts.append(f'<text x="{at[0]:.1f}" y="{at[1] + 17:.1f}" text-anchor="middle">{_number(x, percent)}</text>')
    for y in ticks(low, high):
        at = _at((left, y), limits)
        parts.append(f'<path class="grid" d="M {at[0]:.1f} {at[1]:.1f} H {WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{at[0] - 7:.1f}" y="{at[1] + 4:.1f}" text-anchor="end">{_number(y, percent)}</text>')
    bottom = HEIGHT - BOTTOM
    return "\n".join([*parts, f'<path class="axis" d="M {LEFT} {TOP} V {bottom} H {WIDTH - RIGHT}"/>'])


def _number(value: float, percent: bool) -> str:
    if percent:
        return f"{value:.0%}"
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:g}"


def _words(axes: Axes) -> str:
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    return (
        f'<text x="{middle_x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(axes.x)}</text>\n'
        f'<text transform="translate(13 {middle_y:.1f}) rotate(-90)" text-anchor="middle">{escape(axes.y)}</text>'
    )
