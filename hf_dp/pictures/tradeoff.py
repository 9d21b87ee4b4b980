"""A trade-off curve -> a small SVG of it, the same to the byte for the same numbers, because `hf-dp verify` compares
bytes.

It has a light background of its own, so that it can be read on a page of any colour, and loads no script, style sheet
or font.
"""

from collections.abc import Sequence

from hf_dp.pictures.line_chart import Point

LEFT, TOP, SIDE = 62, 18, 220  # of the square in which the curve is drawn, in pixels
WIDTH, HEIGHT = 480, 296


def tradeoff_svg(curve: Sequence[Point], advantage: str) -> str:
    """A trade-off curve: the most true positives that can be reached, against false positives; the diagonal is
    guessing.

    Args:
        curve: (false-positive rate, true-positive rate) in rising order.
        advantage: the curve's advantage over guessing, as text.
    """
    line = _path([(0.0, 0.0), *curve])
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" \
viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="system-ui, sans-serif" font-size="12" fill="#222">
<title>The most that any attacker can find, against wrong accusations (advantage {advantage})</title>
<rect width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#fff"/>
<path d="{line} {_path([(1.0, 1.0), (0.0, 1.0)], start="L")} Z" fill="#e9edf2"/>
<path d="{_path([(0.0, 0.0), (1.0, 1.0)])}" stroke="#777" stroke-dasharray="4 4" fill="none"/>
<path d="{line}" stroke="#1f5fa8" stroke-width="2.5" fill="none"/>
<rect x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}" fill="none" stroke="#555"/>
{_ticks()}
<text x="{LEFT + SIDE / 2:g}" y="{HEIGHT - 16}" text-anchor="middle">wrongly accused</text>
<text transform="translate(18 {TOP + SIDE / 2:g}) rotate(-90)" text-anchor="middle">rightly found</text>
<g transform="translate({LEFT + SIDE + 18} {TOP + 20})">
{_legend(advantage)}
</g>
</svg>
"""


def _path(points: Sequence[Point], start: str = "M") -> str:
    at = [f"{LEFT + SIDE * x:.2f} {TOP + SIDE * (1 - y):.2f}" for x, y in points]
    return f"{start} {' L '.join(at)}"


def _ticks() -> str:
    lines = []
    for share in (0.0, 0.5, 1.0):
        x, y = LEFT + SIDE * share, TOP + SIDE * (1 - share)
        lines.append(f'<text x="{x:g}" y="{TOP + SIDE + 18}" text-anchor="middle">{share:.0%}</text>')
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4:g}" text-anchor="end">{share:.0%}</text>')
    return "\n".join(lines)


def _legend(advantage: str) -> str:
    return f"""<rect y="-10" width="20" height="12" fill="#e9edf2" stroke="#bbb"/>\
<text x="28">no attack gets here</text>
<path d="M 0 18 H 20" stroke="#1f5fa8" stroke-width="2.5"/><text x="28" y="22">limit for this model</text>
<path d="M 0 40 H 20" stroke="#777" stroke-dasharray="4 4"/><text x="28" y="44">guessing</text>
<text y="74">advantage at most {advantage}</text>"""
