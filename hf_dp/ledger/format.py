r"""The bytes of a ledger <-> what they say: a hash chain of JSON lines in which every value is checked.

    {"kind":"header","version":2,"num_examples":N,"unit":...,"relation":...,"delta":...,"data_fingerprint":...,
     "debug":...,"hash":...}                                                                            (one line)
    {"kind":"plan","segments":[{"sample_rate":q,"noise_multiplier":sigma,"num_steps":T,"noise":...}],"hash":...}
    {"kind":"segment","sample_rate":q,"noise_multiplier":sigma,"clip_norm":C,"expected_batch_size":B,"noise":...,
     "hash":...}                                                                                        (one line)
    {"kind":"step","n":1,"hash":...}

The noise multiplier is the joint one: noise over the sensitivity of everything that a step releases. A segment whose
steps also release training loss and batch size has "loss_bound":L behind its other fields (`step/metrics.py`); it is
accounted like any other. Where a step takes k > 1 records of a drawn unit, "records_per_unit":k stands there too; where
records are drawn one by one, at most G of a unit, "contribution_bound":G does, in plans if it is above 1.
Without "noise" the noise is "gaussian".

A plan says which steps are to follow upon those before it. A run claims the epsilon of its plan, however early it ends:
when it ends may depend on what it released, and the epsilon of the steps taken holds only for a number fixed beforehand
(Rogers et al. 2016). A run that is resumed may have another plan; then it claims the costliest plan under which a step
was taken. Ledgers of version 1 have no plans.

A line's hash is SHA-256 over the previous line's hash (64 zeros for the first line) and the line without its hash. `n`
counts the steps from 1. A step of older ledgers may have the trainer's own number too, as "step". Only the last line
can have been cut short; it counts as one more step. Numbers are checked even where the hashes are right, because
accountants answer nonsense with epsilon 0.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple, cast

from hf_dp.errors import LedgerError
from hf_dp.ledger.rules import HEADER, PLAN, STEP, check, check_planned, check_settings
from hf_dp.mechanism import Segment, release_norm, united

VERSION = 2
READ = (1, VERSION)  # what is read here
GENESIS = "0" * 64
HASH_FIELD = ',"hash":"'


@dataclass(frozen=True)
class LedgerHeader:
    """What may not change while a ledger lasts.

    Attributes:
        num_examples: N.
        unit: unit of privacy, such as "record".
        relation: neighbouring relation, such as "zero-out".
        delta: at which epsilon is stated.
        data_fingerprint: keyed hash of the training set, or None where none was taken.
        debug: the randomness is fixed, so nothing in the ledger is private.
    """

    num_examples: int
    unit: str
    relation: str
    delta: float
    data_fingerprint: str | None = None
    debug: bool = False


class ExecutedSegment(NamedTuple):
    """Consecutive steps with the same settings, as the ledger has them.

    `joint_noise_multiplier` is noise over the sensitivity of everything that a step releases; in files it is
    `noise_multiplier`.
    """

    sample_rate: float
    joint_noise_multiplier: float
    clip_norm: float
    expected_batch_size: int
    num_steps: int
    noise: str = "gaussian"
    loss_bound: float | None = None
    records_per_unit: int | None = None  # None for 1
    contribution_bound: int | None = None  # None where units are drawn

    @property
    def accounted(self) -> Segment:
        """As accounting needs it."""
        bound = self.contribution_bound or 1
        return Segment(self.sample_rate, self.joint_noise_multiplier, self.num_steps, self.noise, bound)

    @property
    def sensitivity(self) -> float:
        """The most by which one record moves the vector that a step releases."""
        return self.clip_norm * release_norm(self.loss_bound)

    @classmethod
    def of(cls, stated: Mapping[str, object], num_steps: int = 0) -> "ExecutedSegment":
        """Reads a segment from a file whose values were checked; where it does not say `num_steps`, they are as given
        here.
        """
        values = {
            "joint_noise_multiplier" if name == "noise_multiplier" else name: value for name, value in stated.items()
        }
        return cls(**{"num_steps": num_steps, **values})  # type: ignore[arg-type]

    def stated(self) -> dict[str, object]:
        """Field -> value, as files have it, without those that do not apply."""
        values = {"noise_multiplier" if k == "joint_noise_multiplier" else k: v for k, v in self._asdict().items()}
        return {name: value for name, value in values.items() if value is not None}


class Planned(NamedTuple):
    """A plan: after how many steps it was made, and all of its steps, including those before it."""

    after: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class LedgerRecord:
    """The content of a ledger.

    Attributes:
        header: what the whole ledger is about.
        segments: consecutive steps with the same q and sigma, for accounting; none of length 0.
        head: hash of the last whole line, in hex.
        num_steps: steps charged, including a torn last line.
        torn: whether the last line was cut short; it counts as one step.
        executed: the segments as they were begun, with clip norm and batch size; the last one may have no steps yet.
        planned: all plans, in order.
    """

    header: LedgerHeader
    segments: tuple[Segment, ...]
    head: str
    num_steps: int
    torn: bool
    executed: tuple[ExecutedSegment, ...] = ()
    planned: tuple[Planned, ...] = ()

    @property
    def plans(self) -> tuple[tuple[Segment, ...], ...]:
        """All steps of each plan under which a step was taken; equal plans once.

        A plan that was replaced before a step was taken under it costs nothing.
        """
        ends = [plan.after for plan in self.planned[1:]] + [self.num_steps]
        begun = (plan.segments for plan, end in zip(self.planned, ends, strict=False) if plan.after < end)
        return tuple(dict.fromkeys(begun))


def encode(record: dict[str, object], previous: str) -> tuple[bytes, str]:
    """The line of `record` that follows the line with the hash `previous`, and the line's own hash."""
    body = json.dumps(record, separators=(",", ":"), allow_nan=False)
    digest = hashlib.sha256(f"{previous}{body}".encode()).hexdigest()
    return f'{body[:-1]}{HASH_FIELD}{digest}"}}\n'.encode(), digest


def header_record(header: LedgerHeader) -> dict[str, object]:
    """The first record of a ledger."""
    return {"kind": "header", "version": VERSION, **asdict(header)}


def segment_record(segment: ExecutedSegment) -> dict[str, object]:
    """The record that begins a segment."""
    settings = segment.stated()
    del settings["num_steps"]
    return {"kind": "segment", **settings}


def plan_record(upcoming: Sequence[Segment]) -> dict[str, object]:
    """The record of a plan: the steps that are to follow."""
    return {"kind": "plan", "segments": [s.stated() for s in upcoming]}


def step_record(count: int) -> dict[str, object]:
    """The record of the `count`-th step."""
    return {"kind": "step", "n": count}


def parse(data: bytes, name: str) -> LedgerRecord:
    """The content of the ledger `data`; errors call it `name`.

    A torn last line is recovered: it counts as one step.

    Raises:
        LedgerError: any other damage, naming line, expected, found and remedy; an unknown version; a value out of
            range.
    """
    *lines, rest = data.split(b"\n")
    reader = _Reader()
    torn = False
    for number, line in enumerate([*lines, rest] if rest else lines, start=1):
        try:
            reader.take(line)
        except (ValueError, RecursionError) as error:
            if number > len(lines) and b"}" not in line and reader.header is not None:  # '}' ends every whole record
                torn = True
                break
            raise _damaged(name, number, str(error)) from error
    if reader.header is None:
        raise _damaged(name, 1, "expected a header, found an empty file")
    segments = reader.segments
    if torn and segments:
        segments[-1] = segments[-1]._replace(num_steps=segments[-1].num_steps + 1)
    return LedgerRecord(
        header=reader.header,
        segments=for_accounting(segments),
        head=reader.head,
        num_steps=sum(s.num_steps for s in segments),
        torn=torn,
        executed=tuple(segments),
        planned=tuple(reader.planned),
    )


def plan_after(executed: Sequence[ExecutedSegment], upcoming: Sequence[Segment]) -> Planned:
    """The plan by which `upcoming` steps follow upon those that were executed."""
    return Planned(sum(s.num_steps for s in executed), united([*for_accounting(executed), *upcoming]))


def for_accounting(segments: Sequence[ExecutedSegment]) -> tuple[Segment, ...]:
    """The segments as accounting needs them, run-length encoded."""
    return united(s.accounted for s in segments)


def check_header(header: LedgerHeader) -> None:
    """Raises ValueError, naming everything that is wrong."""
    check(asdict(header), HEADER)


def check_segment(segment: ExecutedSegment, num_examples: int) -> None:
    """Raises ValueError, naming everything that is wrong; q must be B / N."""
    check_settings({k: v for k, v in segment.stated().items() if k != "num_steps"})
    expected = segment.expected_batch_size / num_examples
    if not math.isclose(segment.sample_rate, expected, rel_tol=1e-9):  # room for one rounding, none for another q
        raise ValueError(
            f"sample_rate: expected expected_batch_size / num_examples = {expected}, found {segment.sample_rate}"
        )


# ---- reading one line ------------------------------------------------------------------------------------------------


def _decode(line: bytes, previous: str) -> tuple[dict[str, object], str]:
    text = line.decode()
    body, found, tail = text.rpartition(HASH_FIELD)
    try:
        record = json.loads(body + "}")
    except json.JSONDecodeError:
        record = None
    if not found or not isinstance(record, dict):
        raise ValueError(f"expected a JSON object that ends with its hash, found {text[:60]!r}")
    try:
        again, digest = encode(record, previous)
    except ValueError as error:  # NaN and infinities are no JSON
        raise ValueError(f"expected finite numbers, found {text[:60]!r}") from error
    if again != line + b"\n":
        raise ValueError(f"expected hash {digest}, found {tail[:64]}")
    return record, digest


class _Reader:
    """Takes lines one after another; raises ValueError at the first line that may not follow upon the others."""

    def __init__(self) -> None:
        self.head = GENESIS
        self.header: LedgerHeader | None = None
        self.segments: list[ExecutedSegment] = []
        self.planned: list[Planned] = []
        self._steps = 0

    def take(self, line: bytes) -> None:
        record, head = _decode(line, self.head)
        kind = record.pop("kind", None)
        if self.header is None:
            self._take_header(kind, record)
        elif kind == "segment":
            check_settings(record)
            self.segments.append(ExecutedSegment.of(record))
            check_segment(self.segments[-1], self.header.num_examples)
        elif kind == "step":
            self._take_step(record)
        elif kind == "plan":
            self._take_plan(record)
        else:
            raise ValueError(f"expected a plan, a segment or a step, found {kind!r}")
        self.head = head

    def _take_header(self, kind: object, record: dict[str, object]) -> None:
        version = record.pop("version", None)
        if kind != "header":
            raise ValueError(f"expected the header, found {kind!r}")
        if type(version) is not int or version not in READ:
            raise ValueError(
                f"expected version {' or '.join(map(str, READ))}, found {version!r}; read it with the release of hf_dp "
                "that wrote it"
            )
        check(record, HEADER)
        self.header = LedgerHeader(**record)  # type: ignore[arg-type]  # the rules have checked the values

    def _take_plan(self, record: dict[str, object]) -> None:
        check(record, PLAN)
        segments = cast("list[dict[str, object]]", record["segments"])
        for segment in segments:
            check_planned(segment)
        self.planned.append(plan_after(self.segments, [Segment.of(segment) for segment in segments]))

    def _take_step(self, record: dict[str, object]) -> None:
        check({"step": 0} | record, STEP)
        if not self.segments:
            raise ValueError("expected a segment before the first step")
        self._steps += 1
        if record["n"] != self._steps:
            raise ValueError(f"expected step {self._steps}, found {record['n']}")
        self.segments[-1] = self.segments[-1]._replace(num_steps=self.segments[-1].num_steps + 1)


def _damaged(name: str, line: int, what: str) -> LedgerError:
    return LedgerError(
        f"{name}, line {line}: {what}. The ledger is not as hf_dp wrote it, so what was spent is not known. Put the "
        "newest undamaged copy back (a backup; a checkpoint's copy lacks the steps after it), or start anew in "
        "another output_dir"
    )
