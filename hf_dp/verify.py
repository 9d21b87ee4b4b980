"""A model folder -> what its card, `privacy.json` and ledger claim, each claim checked against a computation of our own.

Nothing in the folder is believed: epsilon is computed again from the steps, the ledger's hash chain is followed, and the card is rendered
again and compared. What no computation can tell is whether the training did what its ledger says.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hf_dp import accounting
from hf_dp.card import INFINITE, PRIVACY_JSON, SCHEMA_VERSION, TAGS
from hf_dp.card_files import read_readme, section_of, yaml_of
from hf_dp.card_words import section, yaml_block
from hf_dp.config import NOISES
from hf_dp.errors import AccountingError, ConfigError, LedgerError
from hf_dp.ledger import LEDGER_NAME, LedgerRecord, read_ledger
from hf_dp.mechanism import RELATION, Segment, generator_of

ROUNDING = 1e-6  # relative; another version's grid may round the other way
LOOSER = 1e-2  # a stated epsilon may be looser than ours by this part: another accountant version's upper bound
FIELDS: dict[str, type | tuple[type, ...]] = {
    "schema_version": int,
    "private": bool,
    "epsilon": (float, int, str),
    "epsilon_pld": (float, int, str),
    "epsilon_rdp": (float, int, str),
    "delta": float,
    "accountant": dict,
    "unit": str,
    "relation": str,
    "mechanism": dict,
    "num_steps": int,
    "segments": list,
    "ledger": dict,
    "declared": dict,
    "assumptions": list,
    "not_covered": list,
    "libraries": dict,
}
SEGMENT_FIELDS = {"sample_rate", "noise_multiplier", "clip_norm", "expected_batch_size", "num_steps"}


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
    record = _record(folder)
    problems = list(_schema_problems(record))
    checks = [Check("privacy.json has the form of schema 1", not problems, "; ".join(problems) or "as it should be")]
    if problems:
        return checks
    parts = (_settings(record), _epsilon(record), _ledger(folder, record), _readme(folder, record))
    return [*checks, *(check for part in parts for check in part)]


def _record(folder: Path) -> Any:
    path = folder / PRIVACY_JSON
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} has no {PRIVACY_JSON}: expected the folder of a model saved by hf_dp") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error


def _schema_problems(record: Any) -> Iterator[str]:
    if not isinstance(record, dict):
        yield f"expected an object, found {type(record).__name__}"
        return
    if record.get("schema_version") != SCHEMA_VERSION:
        found = record.get("schema_version")
        yield f"expected schema_version {SCHEMA_VERSION}, found {found!r}: use the version of hf_dp that knows it"
        return
    for name, kind in FIELDS.items():
        if name not in record:
            yield f"{name} is missing"
        elif not isinstance(record[name], kind) or (isinstance(record[name], bool) and kind is not bool):
            yield f"{name} is {record[name]!r}"
    unknown = sorted(set(record) - set(FIELDS) - {"reason"})
    if unknown:
        yield f"unknown fields {', '.join(unknown)}"
    if isinstance(record.get("mechanism"), dict) and not _is_count(record["mechanism"].get("num_examples")):
        yield f"the number of examples is {record['mechanism'].get('num_examples')!r}"
    for name in ("epsilon", "epsilon_pld", "epsilon_rdp"):
        stated: Any = record.get(name)
        if not (_is_number(stated) and stated >= 0) and (record.get("private") or stated != INFINITE):
            yield f"{name} is {stated!r} where private is {record.get('private')!r}"
    segments = record.get("segments")
    for segment in segments if isinstance(segments, list) else []:
        if (
            not isinstance(segment, dict)
            or set(segment) - {"loss_bound", "noise"} != SEGMENT_FIELDS
            or segment.get("noise", "gaussian") not in NOISES
            or not all(_is_number(value) for name, value in segment.items() if name != "noise")
        ):
            yield f"a segment is {segment!r}"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


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
    if segments:
        generator = generator_of(segments[-1].get("noise", "gaussian"))
        yield _equal("the generator is that of the last segment", mechanism.get("generator"), generator)
    unclipped = [s for s in segments if s["clip_norm"] <= 0]
    yield Check("every segment clips", not unclipped, f"{len(unclipped)} of {len(segments)} have no clip norm above 0")


def _epsilon(record: Mapping[str, Any]) -> Iterator[Check]:
    if not record["private"]:
        infinite = record["epsilon"] == record["epsilon_pld"] == record["epsilon_rdp"] == INFINITE
        reason = record.get("reason")
        yield Check(
            "a run without a guarantee says so", infinite and bool(reason), f"epsilon {record['epsilon']}, {reason}"
        )
        return
    segments = [Segment(**{name: s[name] for name in Segment._fields if name in s}) for s in record["segments"]]
    try:
        ours = accounting.spent(segments, record["delta"])
    except AccountingError as error:
        yield Check("epsilon can be computed from the segments", False, str(error))
        return
    for name, value in (("epsilon", ours.epsilon), ("epsilon_pld", ours.pld), ("epsilon_rdp", ours.rdp)):
        yield _agrees(name, record[name], value)
    target = record["mechanism"].get("target_epsilon")
    if target is not None:
        within = _is_number(target) and ours.epsilon <= target * (1 + ROUNDING)
        yield Check("epsilon is within the target", within, f"{ours.epsilon:.6g} of {target}")


def _agrees(name: str, stated: Any, computed: float) -> Check:
    """Stated may be the looser by LOOSER, never the tighter: an epsilon that is too small is the lie to look for."""
    if not math.isfinite(computed):
        return _equal(f"{name}, computed again", stated, INFINITE)
    holds = _is_number(stated) and computed * (1 - ROUNDING) <= stated <= computed * (1 + LOOSER)
    return Check(f"{name}, computed again", holds, f"stated {stated}, computed {computed:.6g}")


def _ledger(folder: Path, record: Mapping[str, Any]) -> Iterator[Check]:
    path = folder / LEDGER_NAME
    if not path.is_file():
        yield Check("the ledger", True, f"not in this folder; {PRIVACY_JSON} names head {record['ledger'].get('head')}")
        return
    try:
        ledger = read_ledger(path)
    except LedgerError as error:
        yield Check("the ledger's hash chain holds", False, str(error))
        return
    yield Check("the ledger's hash chain holds", True, f"{ledger.num_steps} steps, head {ledger.head[:12]}...")
    yield _equal("steps in the ledger and in privacy.json", ledger.num_steps, record["num_steps"])
    yield _equal("head of the ledger and in privacy.json", ledger.head, record["ledger"].get("head"))
    executed = [s.stated() for s in ledger.executed if s.num_steps]
    yield Check(
        "segments in the ledger and in privacy.json", executed == record["segments"], f"{len(executed)} in the ledger"
    )
    yield from _header(ledger, record)


def _header(ledger: LedgerRecord, record: Mapping[str, Any]) -> Iterator[Check]:
    header = ledger.header
    stated = (record["mechanism"].get("num_examples"), record["unit"], record["relation"], record["delta"])
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
    yield Check(
        "the card's section in words",
        same,
        "as privacy.json has it" if same else "missing, edited, or of another version",
    )


def _equal(name: str, found: Any, expected: Any) -> Check:
    return Check(name, found == expected, f"{found}" if found == expected else f"found {found}, expected {expected}")


def _short(value: Any) -> str:
    return "missing" if value is None else ", ".join(f"{k} {v}" for k, v in list(dict(value).items())[:2])
