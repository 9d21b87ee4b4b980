"""A folder, its record and the results of verification -> the report as one HTML page; every word from a file is
escaped.

If a check failed, the page claims nothing. It shows what is wrong and what the folder states, but no sentence and no
curve that is made from it.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from hf_dp.card.assumptions import COVERED
from hf_dp.card.record import Record, RecordedSelection, in_json
from hf_dp.card.report.curves import curves
from hf_dp.card.report.training import trained
from hf_dp.card.schema import PRIVACY_JSON
from hf_dp.card.verification import Check, claimed_of
from hf_dp.card.words import (
    attackers_limits,
    counted,
    ended_early,
    in_turn,
    in_words,
    selection_in_short,
    settings,
    steps_claimed,
)
from hf_dp.card.writing import further_bounds, library_versions
from hf_dp.errors import LedgerError
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.mechanism import DISCRETE

Cell = tuple[str, object]
CARD = "README.md"


class Html(str):
    """Text that is HTML already; all other text is escaped before it gets on the page."""


def page(folder: Path, name: str, record: Record | None, checks: Sequence[Check]) -> str:
    """The whole page. `record` is None where privacy.json does not have the form of a record."""
    verified = record is not None and all(check.holds for check in checks)
    parts: dict[str, str] = {
        "name": name,
        "verdict": _verdict(record, checks),
        "trained": _table(trained(folder).items()),
        "checks": _checks(folder, checks),
        "audit": _audit(record),
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "ledger": _table(_ledger(folder)),
        "figures": Html(),
        "claim": Html(),
        "curves": Html(),
        "mechanism": Html("<p>Unknown: the record cannot be read.</p>"),
        "versions": _table(_versions(record)),
        "again": _again(folder, record, verified=verified),
    }
    if record is not None:
        words = "" if verified else "<p>As the record states it, which is not verified.</p>\n"
        parts["mechanism"] = Html(words + _table(_mechanism(record)))
    if record is not None and verified and record.private:
        record = _with_bounds(record)
        parts |= {"figures": _figures(record), "claim": _claim(record)}
    if record is not None and verified:
        parts["curves"] = Html(curves(folder, record, attackers_limits(record)))
    return _filled("page.html", parts)


def _filled(template: str, parts: Mapping[str, str]) -> Html:
    text = files("hf_dp.card.report").joinpath(template).read_text(encoding="utf-8")
    return Html(Template(text).substitute({name: _html(value) for name, value in parts.items()}))


def _html(value: object) -> str:
    return value if isinstance(value, Html) else escape(str(value))


def _table(rows: Iterable[Cell]) -> Html:
    cells = "\n".join(f"<tr><th>{_html(name)}</th><td>{_html(value)}</td></tr>" for name, value in rows)
    return Html(f"<table><tbody>\n{cells}\n</tbody></table>")


def _list(items: Iterable[str]) -> Html:
    return Html(f"<ul>{''.join(f'<li>{_html(item)}</li>' for item in items)}</ul>")


def _verdict(record: Record | None, checks: Sequence[Check]) -> Html:
    failed = [check.name for check in checks if not check.holds]
    if failed:
        words = "What this folder states of its privacy does not hold together. Rely on none of it. What failed:"
        return Html(
            f'<div class="verdict bad" role="alert"><strong>NOT VERIFIED.</strong> {words}{_list(failed)}</div>'
        )
    if record is None or not record.private:
        reason = escape((record and record.reason) or "")
        words = f"This model carries no privacy guarantee: {reason}. Treat it like the training data itself."
        return Html(f'<div class="verdict bad" role="alert"><strong>NOT PRIVATE.</strong> {words}</div>')
    words = f"All {len(checks)} checks passed: epsilon computed again is the one that is stated."
    return Html(f'<div class="verdict"><strong>Verified.</strong> {words}</div>')


def _with_bounds(record: Record) -> Record:
    """The record with the bounds and sentences that version 1 did not have."""
    if record.schema_version > 1:
        return record
    epsilon_at, curve = further_bounds(record.charged, record.delta)
    return replace(record, covered=COVERED, epsilon_at=epsilon_at, tradeoff=curve)


def _figures(record: Record) -> Html:
    words = in_words(record)
    shown = (
        ("epsilon", words["epsilon"]),
        ("delta", words["delta"]),
        ("unit of privacy", f"one {record.unit}"),
        (f"training {words['counted']}", words["num_examples"]),
        ("noisy steps", f"{record.num_steps:,}{f' of {steps_claimed(record):,}' if ended_early(record) else ''}"),
        ("best guess at a fair coin", f"{words['best_guess']}"),
    )
    return Html(f'<ul class="figures">{"".join(f"<li><b>{_html(v)}</b>{_html(k)}</li>" for k, v in shown)}</ul>')


def _claim(record: Record) -> Html:
    lists = {
        "covered": _list(record.covered),
        "assumptions": _list(record.assumptions),
        "not_covered": _list(record.not_covered),
    }
    selected = (
        f"<p><b>Selected</b>: {escape(selection_in_short(record.selection))}. Epsilon is that of the whole, the choice "
        "included.</p>\n"
        if record.selection
        else ""
    )
    return _filled("claim.html", in_words(record) | lists | {"selected": Html(selected)})


def _mechanism(record: Record) -> list[Cell]:
    m, each = record.mechanism, settings(record)
    rows = [
        ("mechanism", m.name),
        ("unit of privacy", f"one {record.unit}"),
        ("neighbouring data sets", f"{record.relation}: one {record.unit} is replaced by an empty one"),
        ("training set's size N (public)", f"{m.num_examples:,}"),
        ("expected batch size B", in_turn(s.expected_batch_size for s in each)),
        ("sample rate q = B / N", in_turn(s.sample_rate for s in each)),
        ("sampler", m.sampler),
        ("clipping bound C", f"{in_turn(s.clip_norm for s in each)}: {m.clipping}"),
        ("released in each step", m.released),
        ("noise multiplier sigma", in_turn(s.joint_noise_multiplier for s in each)),
        ("noise", m.noise),
        ("source of randomness", m.noise_generator),
        ("steps charged", f"{record.num_steps:,} (planned: {m.num_steps_planned:,})"),
        ("epsilon", f"{in_json(record.epsilon)} (stated)"),
        *_steps_taken(record),
        (
            "by privacy loss distributions; by Rényi accounting",
            f"{in_json(record.epsilon_pld)}; {in_json(record.epsilon_rdp)}",
        ),
        ("delta", record.delta),
        ("target epsilon", _target(record)),
        ("accountant", f"{record.accountant.name} {record.accountant.version}"),
    ]
    if record.selection:
        of_one = f"{record.selection.epsilon_of_one_run:.4g}"
        rows.append(("selected", f"{selection_in_short(record.selection)}; a run by itself has epsilon {of_one}"))
    further = "; ".join(f"{at.epsilon:.4g} at {at.delta:.3g}" for at in record.epsilon_at[1:])
    return [*rows, ("epsilon at other deltas", further)] if further else rows


def _steps_taken(record: Record) -> list[Cell]:
    alone = "epsilon of the steps charged alone, had their number been fixed beforehand"
    return [(alone, in_json(record.epsilon_of_steps_taken or 0.0))] if ended_early(record) else []


def _target(record: Record) -> object:
    if record.selection:
        return f"{record.selection.target_epsilon} of the whole, {record.mechanism.target_epsilon} of a run"
    return "none" if record.mechanism.target_epsilon is None else record.mechanism.target_epsilon


def _ledger(folder: Path) -> list[Cell]:
    try:
        ledger = read_ledger(folder / LEDGER_NAME)
    except LedgerError as error:
        missing = not (folder / LEDGER_NAME).exists()
        return [("ledger", "not in this folder" if missing else _without(folder, str(error)))]
    header = ledger.header
    return [
        ("steps charged", f"{ledger.num_steps:,}"),
        ("settings in turn", f"{len([s for s in ledger.executed if s.num_steps]):,}"),
        ("about", f"{header.num_examples:,} {counted(header.unit)}, {header.relation}, delta {header.delta:g}"),
        ("last line", "cut short, and counted as a step" if ledger.torn else "whole"),
        ("hash of the last line", Html(f"<code>{escape(ledger.head)}</code>")),
    ]


def _audit(record: Record | None) -> Html:
    """What the record says of an audit, number by number."""
    if record is None or record.audit is None:
        return Html("<p>No audit was run: nobody tried to find out from this model who was in its training data.</p>")
    return _table(
        (name.replace("_", " "), value)
        for name, value in record.audit.stated().items()
        if not isinstance(value, list | dict)
    )


def _checks(folder: Path, checks: Sequence[Check]) -> Html:
    rows = [
        f"<tr><td{'' if c.holds else ' class=no'}>{'ok' if c.holds else 'FAILED'}</td><td>{_html(c.name)}</td>"
        f"<td>{_html(_without(folder, c.found))}</td></tr>"
        for c in checks
    ]
    head = "<thead><tr><th>result</th><th>check</th><th>found</th></tr></thead>"
    return Html(f'<table class="checks">{head}<tbody>\n' + "\n".join(rows) + "\n</tbody></table>")


def _without(folder: Path, message: str) -> str:
    """The message without the folder's place on this machine."""
    return message.replace(f"{folder}/", "")


def _versions(record: Record | None) -> list[Cell]:
    now = library_versions(("hf_dp", "dp-accounting"))
    stated = ", ".join(f"{name} {version}" for name, version in (record.libraries if record else {}).items())
    return [
        ("as recorded when the model was saved", stated or "not recorded"),
        ("that checked it for this page", ", ".join(f"{name} {version}" for name, version in now.items())),
    ]


def _again(folder: Path, record: Record | None, *, verified: bool) -> Html:
    names = [name for name in (PRIVACY_JSON, CARD, LEDGER_NAME) if (folder / name).is_file()]
    digests = _table(
        (f"SHA-256 of {name}", Html(f"<code>{hashlib.sha256((folder / name).read_bytes()).hexdigest()}</code>"))
        for name in names
    )
    by_hand = _by_hand(record) if record and verified and record.private and record.segments else ""
    return Html(
        "<p><code>hf-dp verify FOLDER_OR_REPOSITORY</code> repeats the checks, and <code>hf-dp report "
        f"FOLDER_OR_REPOSITORY</code> makes this page again. The files that were looked at:</p>\n{digests}\n{by_hand}"
    )


def _by_hand(record: Record) -> Html:
    if record.selection is not None:
        return _selection_by_hand(record, record.selection)
    if any(s.contribution_bound > 1 for s in claimed_of(record)):
        return _mixture_by_hand(record)
    steps = [(s.sample_rate, s.joint_noise_multiplier, s.num_steps) for s in claimed_of(record)]
    package, made, stated = (
        ("rdp", "RdpAccountant([*range(2, 64), 128, 256, 512, 1024], ", record.epsilon_rdp)
        if math.isinf(record.epsilon_pld)  # as with discrete noise, which is accounted at whole orders
        else ("pld", "PLDAccountant(value_discretization_interval=1e-4, neighboring_relation=", record.epsilon_pld)
    )
    code = f"""\
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.{package} import {made.partition("(")[0]}

accountant = {made}NeighboringRelation.REPLACE_SPECIAL)
for q, sigma, steps in {steps}:
    accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), steps)
print(accountant.get_epsilon({record.delta}))  # {stated:.6g}, but for rounding"""
    return _as_code(code)


def _mixture_by_hand(record: Record) -> Html:
    steps = [(s.sample_rate, s.joint_noise_multiplier, s.num_steps, s.contribution_bound) for s in claimed_of(record)]
    code = f"""\
from dp_accounting.pld.privacy_loss_distribution import from_mixture_gaussian_mechanism, identity
from scipy.stats import binom

total = identity(5e-3)
for q, sigma, steps, most in {steps}:
    counts = range(most + 1)  # of a unit's records in a step
    chances = binom.pmf(counts, most, q)
    step = from_mixture_gaussian_mechanism(sigma, counts, chances, value_discretization_interval=5e-3)
    total = total.compose(step.self_compose(steps))
print(total.get_epsilon_for_delta({record.delta}))  # {record.epsilon_pld:.6g}, but for rounding"""
    return _as_code(code)


def _selection_by_hand(record: Record, s: RecordedSelection) -> Html:
    runs = [[(g.sample_rate, g.joint_noise_multiplier, g.num_steps) for g in run] for run in s.mechanisms]
    whole = any(g.noise == DISCRETE for run in s.mechanisms for g in run)
    orders = "[*range(2, 64), 128, 256, 512, 1024]" if whole else "RdpAccountant().orders"
    shape = 'float("inf")' if math.isinf(s.shape) else s.shape
    code = f"""\
import numpy as np
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp.rdp_privacy_accountant import _compute_rdp_repeat_and_select, compute_epsilon

orders, curves = {orders}, []
for run in {runs}:
    accountant = RdpAccountant(orders, NeighboringRelation.REPLACE_SPECIAL)
    for q, sigma, steps in run:
        accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), steps)
    curves.append(accountant.rdp)
best = _compute_rdp_repeat_and_select(orders, np.max(curves, axis=0), mean={s.mean}, shape={shape})
print(compute_epsilon(orders, best, {record.delta})[0])  # {record.epsilon_rdp:.6g}, but for rounding"""
    return _as_code(code)


def _as_code(code: str) -> Html:
    return Html(f"<p>Epsilon without hf_dp, in Python with Google's dp-accounting:</p>\n<pre>{escape(code)}</pre>")
