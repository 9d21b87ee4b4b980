"""`privacy.json` of any version -> `Record`, frozen and typed, as the newest version has it; and back to JSON.

What a file of an older version lacks is filled in here and nowhere else. `schema_version` keeps the file's value,
because a record is written back in its own version, and because the claim depends on the version.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, cast

from hf_dp.accounting import Selection
from hf_dp.audit import AuditRecord
from hf_dp.card.schema import schema_problems
from hf_dp.errors import ConfigError
from hf_dp.ledger import ExecutedSegment
from hf_dp.mechanism import Segment

INFINITE = "infinite"  # stands for an infinite epsilon in JSON and YAML, which have no portable word for infinity
SINCE = {
    "epsilon_at": 2,
    "tradeoff": 2,
    "covered": 2,
    "plans": 3,
    "epsilon_of_steps_taken": 3,
}  # field -> first version
MECHANISM_SINCE = 2  # the version that brought the five fields below
OF_VERSION_1 = {"released": "the gradient", "loss_bound": None, "generator": "philox", "noise_precision": "float32"}
JSON_NAMES = {"joint_noise_multiplier": "noise_multiplier"}  # Python's name -> the file's, where they differ
_Values = dict[str, Any]  # of JSON that the schema has accepted


class EpsilonAt(NamedTuple):
    """An upper bound on epsilon at a further delta."""

    delta: float
    epsilon: float


class TradeoffCurve(NamedTuple):
    """The best attacker's limits: see `accounting.Tradeoff`."""

    advantage: float
    false_positive_rates: tuple[float, ...]
    true_positive_rates: tuple[float, ...]


class Accountant(NamedTuple):
    """The library that computed epsilon, and how its numbers make up the epsilon that is claimed."""

    name: str
    version: str
    epsilon_is: str


@dataclass(frozen=True)
class RecordedLevel:
    """A level of a schedule."""

    num_steps: int
    sample_rate: float
    joint_noise_multiplier: float
    clip_norm: float
    expected_batch_size: int


@dataclass(frozen=True)
class RecordedMechanism:
    """What was planned; the schema explains each field. The noise multiplier is that of everything that a step
    releases.
    """

    name: str
    num_examples: int
    num_examples_is_public: bool
    expected_batch_size: int
    clip_norm: float
    clipping: str
    sampler: str
    released: str
    loss_bound: float | None
    sensitivity: float
    noise: str
    generator: str
    noise_generator: str
    noise_precision: str
    sample_rate: float
    joint_noise_multiplier: float
    target_epsilon: float | None
    num_steps_planned: int
    records_per_unit: int = 1
    contribution_bound: int | None = None
    levels: tuple[RecordedLevel, ...] = ()


@dataclass(frozen=True)
class RecordedSelection:
    """How the model was selected from a random number of runs."""

    distribution: str
    mean: float
    shape: float
    method: str
    target_epsilon: float
    epsilon_of_one_run: float
    mechanisms: tuple[tuple[Segment, ...], ...]

    @classmethod
    def of(cls, selected: Selection, delta: float) -> "RecordedSelection":
        """What a record says of `selected`."""
        return _selection(selected.stated(delta))

    def selection(self) -> Selection:
        """For accounting.

        Raises:
            AccountingError: a value out of range.
        """
        return Selection(self.distribution, self.mean, self.mechanisms, self.target_epsilon)


@dataclass(frozen=True)
class Record:
    """Everything that privacy.json says. The schema explains each field; an infinite epsilon is `math.inf`.

    Where a file's version has no such field: no `epsilon_at`, `covered` and `plans`, `tradeoff` and
    `epsilon_of_steps_taken` are None.
    """

    schema_version: int
    private: bool
    reason: str | None
    epsilon: float
    epsilon_pld: float
    epsilon_rdp: float
    delta: float
    epsilon_at: tuple[EpsilonAt, ...]
    tradeoff: TradeoffCurve | None
    accountant: Accountant
    unit: str
    relation: str
    mechanism: RecordedMechanism
    num_steps: int
    segments: tuple[ExecutedSegment, ...]
    plans: tuple[tuple[Segment, ...], ...]
    epsilon_of_steps_taken: float | None
    ledger_file: str
    ledger_head: str
    declared: Mapping[str, object]
    assumptions: tuple[str, ...]
    covered: tuple[str, ...]
    not_covered: tuple[str, ...]
    libraries: Mapping[str, str]
    audit: AuditRecord | None = None
    selection: RecordedSelection | None = None

    @classmethod
    def of(cls, stated: object) -> "Record":
        """Reads the JSON of any version.

        Raises:
            ConfigError: it is not of the form of a version that is known here. Names every place.
        """
        problems = schema_problems(stated)
        if problems:
            raise ConfigError("; ".join(problems))
        return _record(cast(_Values, stated))

    @property
    def public_eval(self) -> bool:
        """Whether the evaluation data were declared public."""
        return self.declared["public_eval"] is True

    @property
    def charged(self) -> tuple[Segment, ...]:
        """The steps that were taken, for accounting."""
        return tuple(s.accounted for s in self.segments)

    def stated(self) -> dict[str, object]:
        """The JSON, as its version has it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        head, file = values.pop("ledger_head"), values.pop("ledger_file")
        values |= {
            "epsilon_at": [at._asdict() for at in self.epsilon_at],
            "tradeoff": None if self.tradeoff is None else _plain(self.tradeoff._asdict()),
            "accountant": self.accountant._asdict(),
            "mechanism": self._mechanism_stated(),
            "segments": [self._segment_stated(s) for s in self.segments],
            "plans": [[s.stated() for s in plan] for plan in self.plans],
            "declared": dict(self.declared),
            "libraries": dict(self.libraries),
            "audit": None if self.audit is None else self.audit.stated(),
            "selection": None if self.selection is None else _selection_stated(self.selection),
        }
        stated: dict[str, object] = {}
        for name, value in values.items():
            is_left_out = name in ("audit", "selection") and value is None
            if SINCE.get(name, 1) <= self.schema_version and not is_left_out:
                stated[name] = _plain(value)
            if name == "epsilon_of_steps_taken":
                stated["ledger"] = {"file": file, "head": head}
        return stated

    def _mechanism_stated(self) -> dict[str, object]:
        values = _named(self.mechanism)
        if self.schema_version < MECHANISM_SINCE:
            values = {k: v for k, v in values.items() if k not in OF_VERSION_1 and k != "sensitivity"}
        levels = [_named(level) for level in self.mechanism.levels]
        del values["levels"]
        if values["records_per_unit"] == 1:
            del values["records_per_unit"]
        if values["contribution_bound"] is None:
            del values["contribution_bound"]
        return values | ({"levels": levels} if levels else {})

    def _segment_stated(self, segment: ExecutedSegment) -> dict[str, object]:
        values = segment.stated()
        return values if self.schema_version > 1 else {k: v for k, v in values.items() if k != "noise"}


def in_json(epsilon: float) -> float | str:
    """An epsilon as JSON and YAML have it."""
    return epsilon if math.isfinite(epsilon) else INFINITE


# ---- JSON that the schema has accepted -> the parts of a record ----------------------------------------------------


def _record(given: _Values) -> Record:
    ledger = given["ledger"]
    values = {name: value for name, value in given.items() if name != "ledger"}
    for name in ("epsilon", "epsilon_pld", "epsilon_rdp", "epsilon_of_steps_taken"):
        values[name] = math.inf if given.get(name) == INFINITE else given.get(name)
    tradeoff, audit, selection = (given.get(name) for name in ("tradeoff", "audit", "selection"))
    values |= {
        "epsilon_at": tuple(EpsilonAt(**at) for at in given.get("epsilon_at", ())),
        "tradeoff": tradeoff and _tradeoff(tradeoff),
        "accountant": Accountant(**given["accountant"]),
        "mechanism": _mechanism(given["mechanism"]),
        "segments": tuple(ExecutedSegment.of(s) for s in given["segments"]),
        "plans": tuple(tuple(Segment.of(s) for s in plan) for plan in given.get("plans", ())),
        "audit": None if audit is None else AuditRecord.of(audit),
        "selection": None if selection is None else _selection(selection),
    }
    for name in ("assumptions", "covered", "not_covered"):
        values[name] = tuple(given.get(name, ()))
    return Record(**values, ledger_file=ledger["file"], ledger_head=ledger["head"])


def _tradeoff(given: _Values) -> TradeoffCurve:
    rates = tuple(given["false_positive_rates"]), tuple(given["true_positive_rates"])
    return TradeoffCurve(given["advantage"], *rates)


def _mechanism(given: _Values) -> RecordedMechanism:
    values: _Values = {**OF_VERSION_1, "sensitivity": given["clip_norm"], **_renamed(given)}
    levels = tuple(RecordedLevel(**_renamed(level)) for level in given.get("levels", ()))
    return RecordedMechanism(**values | {"levels": levels})


def _selection(given: _Values) -> RecordedSelection:
    shape = math.inf if given["shape"] == INFINITE else given["shape"]
    runs = tuple(tuple(Segment.of(s) for s in run) for run in given["mechanisms"])
    return RecordedSelection(**given | {"shape": shape, "mechanisms": runs})


def _renamed(given: _Values) -> _Values:
    return {"joint_noise_multiplier" if k == "noise_multiplier" else k: v for k, v in given.items()}


# ---- and back ------------------------------------------------------------------------------------------------------


def _selection_stated(selection: RecordedSelection) -> dict[str, object]:
    runs = [[s.stated() for s in run] for run in selection.mechanisms]
    return _named(selection) | {"shape": in_json(selection.shape), "mechanisms": runs}


def _named(part: RecordedMechanism | RecordedLevel | RecordedSelection) -> dict[str, object]:
    return {JSON_NAMES.get(f.name, f.name): getattr(part, f.name) for f in fields(part)}


def _plain(value: object) -> object:
    """Tuples as lists, and an infinite epsilon as the word for it."""
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return in_json(value) if isinstance(value, float) else value
