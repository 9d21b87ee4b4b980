"""A model folder -> what its card, `privacy.json` and ledger claim, each claim checked against our own computation.

Nothing in the folder is believed. Epsilon is computed again from the steps, the ledger's hash chain is followed, and
the card is rendered again and compared. The form is checked by privacy.schema.json, which knows all versions.

What no computation can tell:

- whether the training did what its ledger says, on the declared data, and produced these weights;
- a folder in which everything (record, card, picture, ledger with its hashes) was forged consistently. The ledger may
  be missing; then a forger needs only record, card and picture;
- whether a model that was selected from several runs was selected as it says, and from no other runs than it lists;
- fields that no other number depends on: the scores behind an audit's counts, a higher target, the number of steps
  planned in `mechanism`, levels of a schedule after the last one taken, versions of libraries, and a declaration that
  was changed in card and record alike.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from hf_dp import accounting
from hf_dp.accounting import RATES, Epsilon, selection
from hf_dp.audit import computed_again
from hf_dp.card.assumptions import GENERATORS, WHOLE_NUMBERS, epsilon_is, kind_of, sampler, sentences
from hf_dp.card.description import wrong_claims
from hf_dp.card.readme import read_readme, said_twice, section_of, tags_of, words_of, yaml_of
from hf_dp.card.record import INFINITE, Record, RecordedLevel, RecordedMechanism, RecordedSelection, in_json
from hf_dp.card.schema import PRIVACY_JSON, read_record, schema_problems
from hf_dp.card.words import PICTURE, picture, released, section, yaml_block
from hf_dp.card.writing import TAGS, Bounds, bounds_of_selection, further_bounds
from hf_dp.errors import AccountingError, AuditError, ConfigError, LedgerError
from hf_dp.ledger import LEDGER_NAME, ExecutedSegment, LedgerRecord, read_ledger
from hf_dp.mechanism import DISCRETE, Segment, bound_in, generator_of, relation_of, release_norm, united

ROUNDING = 1e-6  # relative; another version of the accountant may round the other way
LOOSER = 1e-2  # a stated epsilon may be looser than ours by this part: another accountant version's upper bound
OLD_TAGS = ("differential-privacy", "dp-sgd")  # cards of earlier times have no others
Settings = RecordedMechanism | RecordedLevel | ExecutedSegment


class Check(NamedTuple):
    """One check: its name, whether it holds, and what was found (and expected, where it does not hold)."""

    name: str
    holds: bool
    found: str


def verify(folder: Path) -> list[Check]:
    """All checks of a folder that holds `privacy.json`, a README.md, and perhaps the ledger. Only reads.

    Raises:
        ConfigError: the folder has no readable privacy.json at all.
    """
    stated = read_record(folder)
    problems = schema_problems(stated)
    if problems:
        return [Check("the form of privacy.json", False, "; ".join(problems))]
    record = Record.of(stated)
    checks = [Check("the form of privacy.json", True, f"schema {record.schema_version}")]
    parts = (_settings(record), _epsilon(record), _audit(record), _ledger(folder, record), _readme(folder, record))
    return [*checks, *(check for part in parts for check in part)]


def _settings(record: Record) -> Iterator[Check]:
    mechanism, segments = record.mechanism, record.segments
    n, delta = mechanism.num_examples, record.delta
    yield _equal("steps of the segments add up", sum(s.num_steps for s in segments), record.num_steps)
    yield Check("delta is below 1 / N", 0 < delta < 1 / n, f"delta = {delta:g}, 1 / N = {1 / n:g}")
    wrong = [s for s in segments if not _is_rate(s, n)]
    yield Check("q = B / N in every segment", not wrong, f"{len(wrong)} of {len(segments)} segments differ")
    yield _equal("the neighbouring relation is the one accounted for", record.relation, relation_of(record.unit))
    if record.schema_version > 2:
        begun = bool(record.plans) == bool(segments) and all(record.plans)
        number = len(record.plans)
        yield Check("steps taken have a plan", begun, f"{number} plan{'s' * (number != 1)}, {record.num_steps} steps")
    yield Check("q = B / N in the plan", _is_rate(mechanism, n), f"q = {mechanism.sample_rate:g}")
    yield from _plan(mechanism, segments)
    yield from _bound(record)
    if record.schema_version > 1:
        yield _release(record, segments)
        noises = [s.noise for s in segments] or [planned_noise(mechanism)]
        selected = record.selection is not None
        version = record.schema_version
        ours = sentences(record.public_eval, noises, record.unit, selected=selected, version=version)._asdict()
        different = [name for name in ours if getattr(record, name) != ours[name]]
        yield Check("what is assumed, covered and not", not different, ", ".join(different) or "as it should be")
        expected = epsilon_is(noises, record.unit, selected=selected)
        yield _equal("how epsilon is computed", record.accountant.epsilon_is, expected)


def _plan(mechanism: RecordedMechanism, segments: Sequence[ExecutedSegment]) -> Iterator[Check]:
    """The last steps must be those planned, by one of the levels where there are levels; and the levels must be one
    plan.
    """
    levels = mechanism.levels
    if segments:
        whole = {"loss_bound": mechanism.loss_bound, "records_per_unit": mechanism.records_per_unit}
        plans = [_of_a_step(x) | whole for x in levels or [mechanism]]
        end = segments[-1]
        last = {**_of_a_step(end), "loss_bound": end.loss_bound, "records_per_unit": end.records_per_unit or 1}
        yield _equal("the last steps are the plan's", last, last if last in plans else plans[0])
    if levels:
        same = _of_a_step(mechanism) == _of_a_step(levels[0])
        right = all(_is_rate(x, mechanism.num_examples) for x in levels)
        steps = sum(x.num_steps for x in levels) == mechanism.num_steps_planned
        yield Check("the schedule's levels are one plan", same and right and steps, f"{len(levels)} levels")


def _bound(record: Record) -> Iterator[Check]:
    """How many records of a unit may each be drawn must be the same wherever it is said, or said nowhere."""
    stated = bound_in(record.unit)
    of_plans = {s.contribution_bound for plan in record.plans for s in plan}
    found = {record.mechanism.contribution_bound, *(s.contribution_bound for s in record.segments)}
    if found != {None} or of_plans - {1} or stated is not None:
        holds = found == {stated} and of_plans <= {stated or 1}
        words = f"at most {stated}" if holds else f"{found} and {of_plans}, the unit's name says {stated}"
        yield Check("the records of a unit that are drawn", holds, words)


def _of_a_step(settings: Settings) -> dict[str, float | None]:
    return {
        "sample_rate": settings.sample_rate,
        "noise_multiplier": settings.joint_noise_multiplier,
        "clip_norm": settings.clip_norm,
        "expected_batch_size": settings.expected_batch_size,
    }


def _is_rate(settings: Settings, num_examples: int) -> bool:
    """Whether q is B / N."""
    return math.isclose(settings.sample_rate, settings.expected_batch_size / num_examples, rel_tol=1e-12)


def planned_noise(mechanism: RecordedMechanism) -> str:
    """The kind of noise of a record without steps, from the words that describe it."""
    if mechanism.noise_precision == WHOLE_NUMBERS["noise_precision"]:
        return DISCRETE
    return "gaussian" if mechanism.generator == "philox" else "gaussian-chacha20"


def _release(record: Record, segments: Sequence[ExecutedSegment]) -> Check:
    """Sampler, released vector, sensitivity, noise and its source must follow from the settings."""
    mechanism = record.mechanism
    bound, generator = mechanism.loss_bound, mechanism.generator
    noise = segments[-1].noise if segments else planned_noise(mechanism)
    words = kind_of([noise])
    expected: dict[str, object] = {name: words[name] for name in ("name", "noise", "noise_precision")}
    expected |= {
        "sampler": sampler(record.unit, mechanism.records_per_unit),
        "released": released(bound),
        "sensitivity": mechanism.clip_norm * release_norm(bound),
        "noise_generator": GENERATORS[generator],
        "generator": generator_of(noise),
    }
    check = _equal(
        "the sampler, what a step releases, and the noise",
        {name: getattr(mechanism, name) for name in expected},
        expected,
    )
    return check._replace(found=f"as {words['name']} has them") if check.holds else check


def _epsilon(record: Record) -> Iterator[Check]:
    if not record.private:
        yield Check("a run without a guarantee says so", True, f"epsilon {in_json(record.epsilon)}, {record.reason}")
        return
    try:
        claimed = claimed_of(record)
        ours, of_steps = accounting.spent(claimed, record.delta), accounting.spent(record.charged, record.delta)
    except AccountingError as error:
        yield Check("epsilon can be computed from the segments", False, str(error))
        return
    if record.schema_version > 2:
        yield _agrees("epsilon of the steps taken", record.epsilon_of_steps_taken or 0.0, of_steps.epsilon)
    yield from _within(ours.epsilon, record.mechanism.target_epsilon, "epsilon")
    if record.selection is not None:
        yield from _selection(record, record.selection)
        return
    yield from _agree(record, ours)
    if record.schema_version > 1:
        yield _further_bounds(record, further_bounds(claimed, record.delta))


def claimed_of(record: Record) -> tuple[Segment, ...]:
    """The steps whose epsilon is claimed; before version 3, those that were taken.

    Raises:
        AccountingError: they can't be accounted.
    """
    return accounting.claimed(record.charged, record.plans, record.delta)


def _selection(record: Record, stated: RecordedSelection) -> Iterator[Check]:
    """Epsilon of the whole, from the planned runs; and the kept run must be one of these, by its own segments."""
    delta = record.delta
    try:
        selected = stated.selection()
        ours, again = selection.spent(selected, delta), RecordedSelection.of(selected, delta)
    except AccountingError as error:
        yield Check("epsilon of the selection can be computed", False, str(error))
        return
    yield from _within(ours, stated.target_epsilon, "epsilon of the selection")
    yield from _agree(record, Epsilon(ours, math.inf, ours))
    yield _agrees("epsilon of one run", stated.epsilon_of_one_run, again.epsilon_of_one_run)
    yield _equal("shape of the distribution", stated.shape, again.shape)
    kept = any(_is_begun(record.charged, run) for run in selected.mechanisms)
    yield Check("the run that was kept is one of the runs planned", kept, f"{len(selected.mechanisms)} kinds of run")
    yield _further_bounds(record, bounds_of_selection(selected, delta))


def _is_begun(segments: Sequence[Segment], run: Sequence[Segment]) -> bool:
    """Whether `segments` are the plan `run`, or its beginning."""
    segments, run = united(segments), united(run)
    if len(segments) > len(run):
        return False
    pairs = list(zip(segments, run, strict=False))
    whole = all(s == planned for s, planned in pairs[:-1])
    return whole and all(
        s.num_steps <= p.num_steps and s._replace(num_steps=0) == p._replace(num_steps=0) for s, p in pairs
    )


def _within(epsilon: float, target: float | None, name: str) -> Iterator[Check]:
    if target is not None:
        within = epsilon <= target * (1 + ROUNDING)
        yield Check(f"{name} is within the target", within, f"{epsilon:.6g} of {target}")


def _audit(record: Record) -> Iterator[Check]:
    """The bounds must follow from the counts and not contradict the claim. Counts and areas are taken as they are."""
    if record.audit is None:
        return
    claim = record.epsilon if record.private else math.inf
    try:
        claimed = claimed_of(record) if record.private else record.charged
        ours = computed_again(record.audit, claimed, record.delta, claim)
    except (AuditError, AccountingError) as error:
        yield Check("the audit's bounds, computed again", False, str(error))
        return
    stated = record.audit.figures
    wrong = [
        name for name, a, b in zip(ours._fields, stated, ours, strict=True) if not math.isclose(a, b, rel_tol=ROUNDING)
    ]
    yield Check("the audit's bounds, computed again", not wrong, ", ".join(wrong) or "as stated")
    found = f"at least {ours.epsilon_at_least:.4g}, claimed {in_json(record.epsilon)}"
    yield Check("the audit does not refute the claim", not ours.refuted, found)


def _further_bounds(record: Record, computed: Bounds) -> Check:
    """Epsilon at other deltas and the attacker's rates must agree with the computation, as in `_agrees`."""
    stated, (expected, ours) = record.tradeoff, computed
    assert stated is not None, "the schema wants a curve of a private record"
    assert ours is not None, "further_bounds has one"
    pairs = [(stated.advantage, ours.advantage)]
    pairs += zip(stated.true_positive_rates, ours.true_positive_rates, strict=False)
    pairs += ((a.epsilon, b.epsilon) for a, b in zip(record.epsilon_at, expected, strict=False))
    same = (
        stated.false_positive_rates == RATES
        and len(stated.true_positive_rates) == len(RATES)
        and [at.delta for at in record.epsilon_at] == [at.delta for at in expected]
    )
    wrong = sum(not b * (1 - ROUNDING) - 1e-9 <= a <= b * (1 + LOOSER) + 1e-6 for a, b in pairs)
    return Check(
        "epsilon at other deltas and the attacker's rates, computed again",
        same and not wrong,
        f"{wrong} of {len(pairs)} differ" if same else "other deltas or rates than those of this schema",
    )


def _agree(record: Record, computed: Epsilon) -> Iterator[Check]:
    yield _agrees("epsilon", record.epsilon, computed.epsilon)
    yield _agrees("epsilon_pld", record.epsilon_pld, computed.pld)
    yield _agrees("epsilon_rdp", record.epsilon_rdp, computed.rdp)


def _agrees(name: str, stated: float, computed: float) -> Check:
    """A stated epsilon may exceed ours by the part LOOSER, but must not be lower: that would be the lie."""
    if not math.isfinite(computed):
        return _equal(f"{name}, computed again", in_json(stated), INFINITE)
    holds = computed * (1 - ROUNDING) <= stated <= computed * (1 + LOOSER)
    return Check(f"{name}, computed again", holds, f"stated {in_json(stated)}, computed {computed:.6g}")


def _ledger(folder: Path, record: Record) -> Iterator[Check]:
    path = folder / LEDGER_NAME
    if not path.is_file():
        yield Check("the ledger", True, f"not in this folder; {PRIVACY_JSON} names head {record.ledger_head}")
        return
    try:
        ledger = read_ledger(path)
    except LedgerError as error:
        yield Check("the ledger's hash chain holds", False, str(error))
        return
    yield Check("the ledger's hash chain holds", True, f"{ledger.num_steps} steps, head {ledger.head[:12]}...")
    yield _equal("steps in the ledger and in privacy.json", ledger.num_steps, record.num_steps)
    yield _equal("head of the ledger and in privacy.json", ledger.head, record.ledger_head)
    executed = tuple(s for s in ledger.executed if s.num_steps)
    yield Check(
        "segments in the ledger and in privacy.json", executed == record.segments, f"{len(executed)} in the ledger"
    )
    if record.schema_version > 2:
        missing = [plan for plan in ledger.plans if plan not in record.plans]
        yield Check("plans in the ledger and in privacy.json", not missing, f"{len(ledger.plans)} in the ledger")
    else:
        yield _equal("plans in a ledger from before there were any", len(ledger.planned), 0)
    yield from _header(ledger, record)


def _header(ledger: LedgerRecord, record: Record) -> Iterator[Check]:
    header = ledger.header
    stated = (record.mechanism.num_examples, record.unit, record.relation, record.delta)
    yield _equal("N, unit, relation, delta", (header.num_examples, header.unit, header.relation, header.delta), stated)
    claims = not (header.debug and record.private)
    yield Check("a debugging run claims nothing", claims, f"debug is {header.debug}, private is {record.private}")


def _readme(folder: Path, record: Record) -> Iterator[Check]:
    try:
        text = read_readme(folder / "README.md")
        front, written = yaml_of(text), section_of(text)
    except ConfigError as error:
        yield Check("README.md can be read", False, str(error))
        return
    yield Check("the card's YAML block", front.get("privacy") == yaml_block(record), f"{_short(front.get('privacy'))}")
    tagged = [tag for tag in TAGS if tag in tags_of(front)]
    needed = [tag for tag in TAGS if tag in OLD_TAGS or tag in tagged] if record.private else []
    yield _equal("the card's tags", tagged, needed)
    heads = [words for name in ("model", "claims") if (words := words_of(text, name)) is not None]
    if heads:
        wrong = wrong_claims(" ".join(heads), record)
        yield Check("the claim at the card's head", not wrong, ", ".join(wrong) or "as privacy.json has it")
    same = written is not None and written.split() == section(record).split()
    other = said_twice(text)
    name = "the card's section in words"
    yield Check(name, False, other) if other else _as_rendered(name, same)
    if record.private and record.schema_version > 1:
        path = folder / PICTURE
        yield _as_rendered("the card's picture", path.is_file() and path.read_text() == picture(record))


def _as_rendered(name: str, same: bool) -> Check:
    return Check(name, same, "as privacy.json has it" if same else "missing, edited, or of another version")


def _equal(name: str, found: object, expected: object) -> Check:
    if found == expected:
        return Check(name, True, _in_words(found))
    if isinstance(found, dict) and isinstance(expected, dict):  # only what differs
        expected = {key: value for key, value in expected.items() if found.get(key) != value}
        found = {key: found.get(key) for key in expected}
    return Check(name, False, f"found {_in_words(found)}, expected {_in_words(expected)}")


def _in_words(value: object) -> str:
    """A value as people read it: without braces, quotation marks and what is not there."""
    if isinstance(value, dict):
        return "; ".join(f"{k.replace('_', ' ')}: {_in_words(v)}" for k, v in value.items() if v is not None) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(_in_words(v) for v in value) or "none"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _short(value: object) -> str:
    return ", ".join(f"{k} {v}" for k, v in list(value.items())[:2]) if isinstance(value, dict) else "missing"
