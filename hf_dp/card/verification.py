"""A model folder -> what its card, `privacy.json` and ledger claim, each claim checked against a computation of our own.

Nothing in the folder is believed: epsilon is computed again from the steps, the ledger's hash chain is followed, and the card is rendered
again and compared. The form is that of privacy.schema.json, which knows all versions ever written.

What no computation can tell:

- whether the training did what its ledger says, on the data that were declared, with weights that are these;
- a folder in which everything (record, card, picture, ledger with its hashes) was made anew to fit together. Without the ledger, which
  may be left out, it is enough to make record, card and picture anew;
- whether a model that was selected from several runs was selected as it says, and from no other runs than it lists;
- what touches no other number: scores behind an audit's counts, a higher target, another number of steps planned in `mechanism`, levels
  of a schedule that are not the last taken, versions of libraries, the words of a declaration when card and record are both changed.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from hf_dp import accounting
from hf_dp.accounting import RATES, Selection, selection
from hf_dp.audit import computed_again
from hf_dp.card.readme import read_readme, section_of, yaml_of
from hf_dp.card.record import (
    EPSILON_OF_SELECTION,
    GENERATORS,
    INFINITE,
    PRIVACY_JSON,
    SCHEMA_VERSION,
    TAGS,
    WHOLE_NUMBERS,
    bounds_of_selection,
    further_bounds,
    kind_of,
    sampler,
    sentences,
)
from hf_dp.card.words import PICTURE, picture, released, section, yaml_block
from hf_dp.errors import AccountingError, AuditError, ConfigError, LedgerError
from hf_dp.ledger import LEDGER_NAME, LedgerRecord, read_ledger
from hf_dp.mechanism import DISCRETE, RELATION, Segment, generator_of, release_norm, united

ROUNDING = 1e-6  # relative; another version's grid may round the other way
SCHEMA = "privacy.schema.json"
PLANNED = ("sample_rate", "noise_multiplier", "clip_norm", "expected_batch_size", "loss_bound")
LEVEL = PLANNED[:4]
SEGMENT_OF_VERSION_1 = ("sample_rate", "noise_multiplier", "clip_norm", "expected_batch_size", "num_steps")
LOOSER = 1e-2  # a stated epsilon may be looser than ours by this part: another accountant version's upper bound


class Check(NamedTuple):
    """One thing that was looked at: what, whether it holds, and what was found (and expected, where it does not)."""

    name: str
    holds: bool
    found: str


def verify(folder: Path) -> list[Check]:
    """Every check of a folder that holds `privacy.json`, a README.md, and perhaps the ledger. Reads only.

    Raises:
        ConfigError: the folder has no readable privacy.json at all.
    """
    record = read_record(folder)
    problems = schema_problems(record)
    checks = [
        Check("the form of privacy.json", not problems, "; ".join(problems) or f"schema {record['schema_version']}")
    ]
    if problems:
        return checks
    parts = (_settings(record), _epsilon(record), _audit(record), _ledger(folder, record), _readme(folder, record))
    return [*checks, *(check for part in parts for check in part)]


def schema_problems(record: Any) -> list[str]:
    """What keeps `record` from being a privacy.json of a version that is known here: every place, with what is wrong."""
    from jsonschema import Draft202012Validator

    version = record.get("schema_version") if isinstance(record, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        return [f"schema_version is {version}, at most {SCHEMA_VERSION} is known here: use a newer version of hf_dp"]
    schema = json.loads(files("hf_dp.card").joinpath(SCHEMA).read_text(encoding="utf-8"))
    wrong = Draft202012Validator(schema).iter_errors(record)
    return sorted(f"{'.'.join(map(str, e.absolute_path)) or 'the record'}: {_shortened(e.message)}" for e in wrong)


def read_record(folder: Path) -> Any:
    """privacy.json as it stands, whatever it says.

    Raises:
        ConfigError: missing, or no JSON.
    """
    path = folder / PRIVACY_JSON
    try:
        text = path.read_text(encoding="utf-8")
        # NaN and infinities are no JSON: as words they fail the schema at their place
        return json.loads(text, parse_constant=str, object_pairs_hook=_without_repetition)
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} has no {PRIVACY_JSON}: expected the folder of a model saved by hf_dp") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{', '.join(repeated)} stands there more than once, and readers would disagree on its value")
    return dict(pairs)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _settings(record: Mapping[str, Any]) -> Iterator[Check]:
    mechanism, segments = record["mechanism"], record["segments"]
    n, delta = mechanism["num_examples"], record["delta"]
    yield _equal("steps of the segments add up", sum(s["num_steps"] for s in segments), record["num_steps"])
    yield Check("delta is below 1 / N", 0 < delta < 1 / n, f"delta = {delta:g}, 1 / N = {1 / n:g}")
    wrong = [s for s in segments if not math.isclose(s["sample_rate"], s["expected_batch_size"] / n, rel_tol=1e-12)]
    yield Check("q = B / N in every segment", not wrong, f"{len(wrong)} of {len(segments)} segments differ")
    yield _equal("the neighbouring relation is the one accounted for", record["relation"], RELATION)
    planned = math.isclose(mechanism["sample_rate"], mechanism["expected_batch_size"] / n, rel_tol=1e-12)
    if record["schema_version"] > 2:
        begun = bool(record["plans"]) == bool(segments) and all(record["plans"])
        yield Check("steps taken have a plan", begun, f"{len(record['plans'])} plans, {record['num_steps']} steps")
    yield Check("q = B / N in the plan", planned, f"q = {mechanism['sample_rate']:g}")
    yield from _plan(mechanism, segments)
    if record["schema_version"] > 1:
        yield _release(record, segments)
        noises = [s["noise"] for s in segments] or [planned_noise(mechanism)]
        selected = "selection" in record
        ours = sentences(record["declared"], noises, record["unit"], selected=selected)
        different = [name for name in ours if record[name] != ours[name]]
        yield Check("what is assumed, covered and not", not different, ", ".join(different) or "as it should be")
        epsilon_is = EPSILON_OF_SELECTION if selected else kind_of(noises)["epsilon_is"]
        yield _equal("how epsilon is computed", record["accountant"]["epsilon_is"], epsilon_is)


def _plan(mechanism: Mapping[str, Any], segments: Sequence[Mapping[str, Any]]) -> Iterator[Check]:
    """The last steps are of the plan; where it has levels, of one of them, and they are those of one plan."""
    levels = mechanism.get("levels", [mechanism])
    if segments:
        last = {name: segments[-1].get(name) for name in PLANNED}
        plans = [{"loss_bound": mechanism.get("loss_bound")} | {k: x[k] for k in last if k in x} for x in levels]
        yield _equal("the last steps are the plan's", last, last if last in plans else plans[0])
    if "levels" in mechanism:
        n, first = mechanism["num_examples"], {name: mechanism[name] for name in LEVEL}
        same = first == {name: levels[0][name] for name in LEVEL}
        right = all(math.isclose(x["sample_rate"], x["expected_batch_size"] / n, rel_tol=1e-12) for x in levels)
        steps = sum(x["num_steps"] for x in levels) == mechanism["num_steps_planned"]
        yield Check("the schedule's levels are one plan", same and right and steps, f"{len(levels)} levels")


def planned_noise(mechanism: Mapping[str, Any]) -> str:
    """The kind of noise of a record without steps, from the words for it."""
    if mechanism["noise_precision"] == WHOLE_NUMBERS["noise_precision"]:
        return DISCRETE
    return "gaussian" if mechanism["generator"] == "philox" else "gaussian-chacha20"


def _release(record: Mapping[str, Any], segments: Sequence[Mapping[str, Any]]) -> Check:
    """Who is drawn, what a step releases, its sensitivity, the noise and its source follow from the settings."""
    mechanism = record["mechanism"]
    bound, generator = mechanism["loss_bound"], mechanism["generator"]
    noise = segments[-1]["noise"] if segments else planned_noise(mechanism)
    words = kind_of([noise])
    expected = {name: words[name] for name in ("name", "noise", "noise_precision")} | {
        "sampler": sampler(record["unit"]),
        "released": released(bound),
        "sensitivity": mechanism["clip_norm"] * release_norm(bound),
        "noise_generator": GENERATORS[generator],
        "generator": generator_of(noise),
    }
    return _equal(
        "the sampler, what a step releases, and the noise", {name: mechanism[name] for name in expected}, expected
    )


def _epsilon(record: Mapping[str, Any]) -> Iterator[Check]:
    if not record["private"]:
        yield Check("a run without a guarantee says so", True, f"epsilon {record['epsilon']}, {record['reason']}")
        return
    segments = segments_of(record)
    try:
        claimed = claimed_of(record)
        ours, of_steps = accounting.spent(claimed, record["delta"]), accounting.spent(segments, record["delta"])
    except AccountingError as error:
        yield Check("epsilon can be computed from the segments", False, str(error))
        return
    if record["schema_version"] > 2:
        yield _agrees("epsilon of the steps taken", record["epsilon_of_steps_taken"], of_steps.epsilon)
    yield from _within(ours.epsilon, record["mechanism"]["target_epsilon"], "epsilon")
    if "selection" in record:
        yield from _selection(record, segments)
        return
    for name, value in (("epsilon", ours.epsilon), ("epsilon_pld", ours.pld), ("epsilon_rdp", ours.rdp)):
        yield _agrees(name, record[name], value)
    if record["schema_version"] > 1:
        yield _further_bounds(record, further_bounds(claimed, record["delta"], claimed=True))


def segments_of(record: Mapping[str, Any]) -> list[Segment]:
    """The steps that were taken, for accounting."""
    return [Segment.of(s) for s in record["segments"]]


def claimed_of(record: Mapping[str, Any]) -> tuple[Segment, ...]:
    """The steps whose epsilon is claimed: before version 3 those that were taken.

    Raises:
        AccountingError: they can't be accounted.
    """
    plans = [[Segment.of(s) for s in plan] for plan in record.get("plans", ())]
    return accounting.claimed(segments_of(record), plans, record["delta"])


def _selection(record: Mapping[str, Any], segments: Sequence[Segment]) -> Iterator[Check]:
    """Epsilon of the whole, from the runs that were planned; the one that was kept is one of them, as its own segments say."""
    stated, delta = record["selection"], record["delta"]
    try:
        selected = Selection.of(stated)
        ours, again = selection.spent(selected, delta), selected.stated(delta)
    except AccountingError as error:
        yield Check("epsilon of the selection can be computed", False, str(error))
        return
    yield from _within(ours, stated["target_epsilon"], "epsilon of the selection")
    for name, value in (("epsilon", ours), ("epsilon_pld", math.inf), ("epsilon_rdp", ours)):
        yield _agrees(name, record[name], value)
    yield _agrees("epsilon of one run", stated["epsilon_of_one_run"], again["epsilon_of_one_run"])
    yield _equal("shape of the distribution", stated["shape"], again["shape"])
    kept = any(_is_begun(segments, run) for run in selected.mechanisms)
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


def _audit(record: Mapping[str, Any]) -> Iterator[Check]:
    """The bounds follow from the counts, and do not contradict the claim. Counts and areas under curves are taken as they are."""
    if "audit" not in record:
        return
    claim = record["epsilon"] if record["private"] else math.inf
    try:
        claimed = claimed_of(record) if record["private"] else segments_of(record)
        ours = computed_again(record["audit"], claimed, record["delta"], claim)
    except (AuditError, AccountingError) as error:
        yield Check("the audit's bounds, computed again", False, str(error))
        return
    wrong = [name for name, value in ours.items() if not math.isclose(record["audit"][name], value, rel_tol=ROUNDING)]
    yield Check("the audit's bounds, computed again", not wrong, ", ".join(wrong) or "as stated")
    found = f"at least {ours['epsilon_at_least']:.4g}, claimed {record['epsilon']}"
    yield Check("the audit does not refute the claim", not ours["refuted"], found)


def _further_bounds(record: Mapping[str, Any], computed: Mapping[str, Any]) -> Check:
    """Epsilon at other deltas and the attacker's rates, each as `_agrees` has it."""
    stated, ours, expected = record["tradeoff"], computed["tradeoff"], computed["epsilon_at"]
    pairs = [(stated["advantage"], ours["advantage"])]
    pairs += zip(stated["true_positive_rates"], ours["true_positive_rates"], strict=False)
    pairs += ((a["epsilon"], b["epsilon"]) for a, b in zip(record["epsilon_at"], expected, strict=False))
    same = (
        stated["false_positive_rates"] == list(RATES)
        and len(stated["true_positive_rates"]) == len(RATES)
        and [at["delta"] for at in record["epsilon_at"]] == [at["delta"] for at in expected]
    )
    wrong = sum(not b * (1 - ROUNDING) - 1e-9 <= a <= b * (1 + LOOSER) + 1e-6 for a, b in pairs)
    return Check(
        "epsilon at other deltas and the attacker's rates, computed again",
        same and not wrong,
        f"{wrong} of {len(pairs)} differ" if same else "other deltas or rates than those of this schema",
    )


def _agrees(name: str, stated: Any, computed: float) -> Check:
    """Stated may be the looser by LOOSER, never the tighter: an epsilon that is too small is the lie to look for."""
    if not math.isfinite(computed):
        return _equal(f"{name}, computed again", stated, INFINITE)
    holds = _is_number(stated) and computed * (1 - ROUNDING) <= stated <= computed * (1 + LOOSER)
    return Check(f"{name}, computed again", holds, f"stated {stated}, computed {computed:.6g}")


def _ledger(folder: Path, record: Mapping[str, Any]) -> Iterator[Check]:
    path = folder / LEDGER_NAME
    if not path.is_file():
        yield Check("the ledger", True, f"not in this folder; {PRIVACY_JSON} names head {record['ledger']['head']}")
        return
    try:
        ledger = read_ledger(path)
    except LedgerError as error:
        yield Check("the ledger's hash chain holds", False, str(error))
        return
    yield Check("the ledger's hash chain holds", True, f"{ledger.num_steps} steps, head {ledger.head[:12]}...")
    yield _equal("steps in the ledger and in privacy.json", ledger.num_steps, record["num_steps"])
    yield _equal("head of the ledger and in privacy.json", ledger.head, record["ledger"]["head"])
    executed = [s.stated() for s in ledger.executed if s.num_steps]
    if record["schema_version"] == 1:
        executed = [{name: s[name] for name in SEGMENT_OF_VERSION_1} for s in executed]
    yield Check(
        "segments in the ledger and in privacy.json", executed == record["segments"], f"{len(executed)} in the ledger"
    )
    if record["schema_version"] > 2:
        missing = [plan for plan in ledger.plans if [s.stated() for s in plan] not in record["plans"]]
        yield Check("plans in the ledger and in privacy.json", not missing, f"{len(ledger.plans)} in the ledger")
    else:
        yield _equal("plans in a ledger from before there were any", len(ledger.planned), 0)
    yield from _header(ledger, record)


def _header(ledger: LedgerRecord, record: Mapping[str, Any]) -> Iterator[Check]:
    header = ledger.header
    stated = (record["mechanism"]["num_examples"], record["unit"], record["relation"], record["delta"])
    yield _equal("N, unit, relation, delta", (header.num_examples, header.unit, header.relation, header.delta), stated)
    claims = not (header.debug and record["private"])
    yield Check("a debugging run claims nothing", claims, f"debug is {header.debug}, private is {record['private']}")


def _readme(folder: Path, record: Mapping[str, Any]) -> Iterator[Check]:
    try:
        text = read_readme(folder / "README.md")
        front, written = yaml_of(text), section_of(text)
    except ConfigError as error:
        yield Check("README.md can be read", False, str(error))
        return
    yield Check("the card's YAML block", front.get("privacy") == yaml_block(record), f"{_short(front.get('privacy'))}")
    tags = front.get("tags") or []
    tagged = [tag for tag in TAGS if tag in tags]
    yield _equal("the card's tags", tagged, list(TAGS) if record["private"] else [])
    same = written is not None and written.split() == section(record).split()
    yield _as_rendered("the card's section in words", same)
    if record["private"] and record["schema_version"] > 1:
        path = folder / PICTURE
        yield _as_rendered("the card's picture", path.is_file() and path.read_text() == picture(record))


def _as_rendered(name: str, same: bool) -> Check:
    return Check(name, same, "as privacy.json has it" if same else "missing, edited, or of another version")


def _shortened(message: str) -> str:
    return message if len(message) <= 120 else f"{message[:70]} ... {message[-45:]}"


def _equal(name: str, found: Any, expected: Any) -> Check:
    return Check(name, found == expected, f"{found}" if found == expected else f"found {found}, expected {expected}")


def _short(value: Any) -> str:
    return "missing" if value is None else ", ".join(f"{k} {v}" for k, v in list(dict(value).items())[:2])
