"""A verified record and the folder's log -> the page's plots: loss and epsilon over steps, and the best attacker's
limits.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from hf_dp import accounting
from hf_dp.card.record import Record
from hf_dp.card.report.training import losses
from hf_dp.card.verification import claimed_of
from hf_dp.card.words import ended_early
from hf_dp.mechanism import Segment, first_steps
from hf_dp.pictures import Axes, Point, line_chart

POINTS = 8  # of the curve of epsilon; each costs a computation by two accountants


def curves(folder: Path, record: Record, limits: Sequence[tuple[str, str]]) -> str:
    """Two sections of HTML; for a run without a guarantee, only the notes that stand in place of the losses."""
    parts = []
    if record.private:
        parts.append(f"<h2>The best attacker</h2>\n{_attacker(record, limits)}")
    found = losses(folder, record)
    drawn = []
    if found.lines:
        drawn.append(_figure("Loss", line_chart(found.lines, Axes("Loss over steps", "optimizer step", "loss"))))
    if record.private and record.segments:
        drawn.append(_figure("Epsilon", _epsilon(record)))
    notes = "".join(f"<p>{escape(note)}</p>" for note in found.notes)
    return "\n".join([*parts, f"<h2>The course of the training</h2>\n{_side_by_side(drawn)}{notes}"])


def _side_by_side(figures: Sequence[str]) -> str:
    return f'<div class="plots">{"".join(figures)}</div>\n' if figures else ""


def _figure(caption: str, chart: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>\n{chart}</figure>"


def _attacker(record: Record, limits: Sequence[tuple[str, str]]) -> str:
    assert record.tradeoff is not None, "only a record with a guarantee has a curve"
    curve = record.tradeoff
    points = [(0.0, 0.0), *zip(curve.false_positive_rates, curve.true_positive_rates, strict=True)]
    axes = Axes("The most that any attacker can find", "wrongly accused", "rightly found", (0, 1, 0, 1), percent=True)
    chart = line_chart({"limit for this model": points}, axes, guide=("guessing", [(0, 0), (1, 1)]))
    rows = "".join(f"<tr><td>{escape(share)}</td><td>{escape(limit)}</td></tr>" for share, limit in limits)
    table = (
        "<table><thead><tr><th>of those who were not in the data, wrongly accused</th><th>of those who were, found at "
        f"most</th></tr></thead><tbody>{rows}</tbody></table>"
    )
    words = (
        "These are limits for the worst case, computed from the steps claimed, not results of an attack that was "
        "tried. The further the line is from the diagonal, the more an attacker may learn."
    )
    return _side_by_side([_figure("Found against wrongly accused", chart), f"<div>{table}<p>{words}</p></div>"])


def _epsilon(record: Record) -> str:
    delta = record.delta
    points = epsilons(claimed_of(record), delta)
    axes = Axes(
        "Epsilon over steps", "steps planned" if ended_early(record) else "steps charged", f"epsilon at delta {delta:g}"
    )
    target = record.mechanism.target_epsilon
    guide = None if target is None else (f"target {target:g}", [(0.0, target), (points[-1][0], target)])
    name = "epsilon of this run by itself" if record.selection else "epsilon spent, computed from the record"
    return line_chart({name: points}, axes, guide)


def epsilons(segments: Sequence[Segment], delta: float) -> list[Point]:
    """(steps, epsilon) from 0 to all steps, denser at the start, where epsilon rises fastest."""
    total = sum(s.num_steps for s in segments)
    at = sorted({max(1, round(total * (i / POINTS) ** 2)) for i in range(1, POINTS + 1)})
    return [(0.0, 0.0), *((float(t), accounting.spent(first_steps(segments, t), delta).epsilon) for t in at)]
