"""What the user asks for, from flags or keywords; out comes `PrivacyConfig`, frozen and checked."""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from numbers import Real
from typing import Any, Literal, TypeGuard, TypeVar, cast, get_args

from hf_dp import schedule
from hf_dp.errors import ConfigError

T = TypeVar("T")
Noise = Literal["gaussian", "gaussian-chacha20", "discrete"]
NOISES: tuple[str, ...] = get_args(Noise)
IfUnset = Literal["fitted", "trainer"]
CanaryKind = Literal["gradient", "new-token", "random-token"]
CANARY_KINDS: tuple[str, ...] = get_args(CanaryKind)
LEFT_ALONE = float("1")  # the default C: an object of its own, so that a given 1.0 can be told from none (by `is`)
BY_RULE = float("0.1")  # the C that takes its place in training with Adam, see `training/fitted.py`
_COLUMN = re.compile(r"\w([\w .-]*\w)?")  # the name is printed on the card
ELSEWHERE = {  # what other libraries call a setting of ours -> our name
    "max_grad_norm": "clip_norm",
    "per_sample_max_grad_norm": "clip_norm",
    "l2_norm_clip": "clip_norm",
    "sigma": "noise_multiplier",
}
MOST_RECORDS = 1024  # of a unit in a step; each is a row of passes, so that more would take days
MOST_CONTRIBUTED = 256  # records of a unit that are drawn one by one; accounting for more takes minutes
MIN_DELTA = 1e-12  # below it the PLD accountant is too coarse: at 1e-14 it gives 8.59 for a true epsilon of 4.25


@dataclass(frozen=True)
class PrivacyConfig:
    """The privacy that a run must have. Settings of speed and memory are not here: they never change the guarantee.

    Give exactly one of `target_epsilon` and `noise_multiplier`. The class stands beside `TrainingArguments`, as in
    `HfArgumentParser((TrainingArguments, PrivacyConfig))`.

    Raises:
        ConfigError: a value out of range, or both or neither of the two. Names everything wrong at once.
    """

    target_epsilon: float | None = field(
        default=None, metadata={"help": "Calibrate the noise so that the planned run spends at most this epsilon."}
    )
    noise_multiplier: float | None = field(
        default=None,
        metadata={"help": "Or give sigma: noise standard deviation over clip_norm. 0 is for debugging: NOT PRIVATE."},
    )
    target_delta: float | None = field(
        default=None, metadata={"help": "delta of (epsilon, delta); default 1 / N**1.1, rounded down to two digits."}
    )
    expected_batch_size: int = field(
        default=256,
        metadata={"help": "Mean size of the logical batch, over all processes. A record joins with q = B / N."},
    )
    clip_norm: float = field(
        default=LEFT_ALONE, metadata={"help": "C: no example moves the gradient sum by more than this."}
    )
    log_loss_up_to: float | None = field(
        default=None,
        metadata={
            "help": "Log training loss, each example's clamped to [0, this], and batch size: noised, inside epsilon."
        },
    )
    noise: Noise = field(
        default="gaussian",
        metadata={
            "help": "gaussian: random bits from numpy's Philox; gaussian-chacha20: from the cipher ChaCha20; discrete: "
            "whole numbers, with bits from ChaCha20, one example a pass."
        },
    )
    unit_column: str | None = field(
        default=None,
        metadata={
            "help": "Protect all records with the same value in this column as one: a person's, an author's; with "
            "contribution_bound also lists of owners."
        },
    )
    records_per_unit: int = field(
        default=1,
        metadata={
            "help": "With unit_column, k: of a drawn group at most k of its records, whose mean gradient is clipped."
        },
    )
    contribution_bound: int | None = field(
        default=None,
        metadata={
            "help": "With unit_column, G: draw records, not groups; the first G of each are kept (where the column has "
            "lists, records of which nobody owns more than G), each is clipped by itself, and epsilon is that of the "
            "group or owner."
        },
    )
    noise_schedule: str | None = field(
        default=None,
        metadata={
            "help": "How sigma changes, in levels, from its first value: SHAPE:RATIO; exponential:0.5 ends at half."
        },
    )
    clip_schedule: str | None = field(
        default=None, metadata={"help": "How clip_norm changes, written as noise_schedule is."}
    )
    batch_schedule: str | None = field(
        default=None, metadata={"help": "How expected_batch_size changes; linear:4 ends at four times the first."}
    )
    public_eval: bool = field(
        default=False, metadata={"help": "Declare the evaluation data public, so that checkpoints may be chosen by it."}
    )
    budget_file: str | None = field(
        default=None,
        metadata={
            "help": "Spend from this budget, which several runs on the same data share (`hf-dp budget` creates one)."
        },
    )
    debug_seed: int | None = field(
        default=None,
        metadata={"help": "For tests only: sampling and noise are fixed. Card and ledger say NOT PRIVATE."},
    )
    if_unset: IfUnset = field(
        default="fitted",
        metadata={
            "help": "Where learning rate and clip_norm were left alone: fitted, DPTrainer takes them from a rule for "
            "private training; trainer, it keeps TrainingArguments' learning rate, and C = 1."
        },
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> "PrivacyConfig":
        """As ever; a setting that does not exist is an error with the nearest name."""
        return _known(cls, kwargs)

    @property
    def schedules(self) -> schedule.Schedules:
        """How sigma, C and B change from their first values."""
        return schedule.Schedules(self.noise_schedule, self.clip_schedule, self.batch_schedule)

    def __post_init__(self) -> None:
        wrong = [*_broken(self, _RULES), *_contradictions(self)]
        if wrong:
            raise ConfigError("PrivacyConfig: " + "; ".join(wrong) + ".")


@dataclass(frozen=True)
class AuditConfig:
    """Canaries in a run, from which a lower bound on its epsilon is measured. They are made up, without any look at the
    records.

    Raises:
        ConfigError: a value out of range. Names everything wrong at once.
    """

    num_canaries: int = field(
        default=300,
        metadata={"help": "m: slots added to the N records. An audit of m canaries cannot show more than its ceiling."},
    )
    kind: CanaryKind = field(
        default="gradient",
        metadata={
            "help": "gradient: vectors of norm C added to the clipped sum, scored by every noisy sum; new-token and "
            "random-token: rows of tokens, scored by the finished model's loss."
        },
    )
    control: bool = field(
        default=False,
        metadata={
            "help": "A positive control: train on the canaries alone, reading no record; needs noise_multiplier=0."
        },
    )
    control_auc: float | None = field(
        default=None, metadata={"help": "Area under the curve of a positive control of the same kind."}
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> "AuditConfig":
        """As ever; a setting that does not exist is an error with the nearest name."""
        return _known(cls, kwargs)

    def __post_init__(self) -> None:
        wrong = list(_broken(self, _AUDIT_RULES))
        if wrong:
            raise ConfigError("AuditConfig: " + "; ".join(wrong) + ".")


Rule = tuple[str, Callable[[object], bool]]  # what is expected, and whether a value is that


def _is_whole(x: object, low: int, high: float = math.inf) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and low <= x <= high


_AUDIT_RULES: dict[str, Rule] = {
    "num_canaries": ("a whole number from 10 to 100,000", lambda x: _is_whole(x, 10, 100_000)),
    "kind": (f"one of {', '.join(CANARY_KINDS)}", lambda x: x in CANARY_KINDS),
    "control": ("true or false", lambda x: isinstance(x, bool)),
    "control_auc": ("a number from 0 to 1, or left out", lambda x: x is None or (is_number(x) and 0 <= x <= 1)),
}
_RULES: dict[str, Rule] = {
    "target_epsilon": ("a finite number above 0", lambda x: x is None or (is_number(x) and x > 0)),
    "noise_multiplier": ("a finite number, 0 or more", lambda x: x is None or (is_number(x) and x >= 0)),
    "target_delta": (
        f"a number, at least {MIN_DELTA} and below 1",
        lambda x: x is None or (is_number(x) and MIN_DELTA <= x < 1),
    ),
    "expected_batch_size": ("a whole number, 1 or more", lambda x: is_number(x) and x >= 1 and x == int(x)),
    "clip_norm": ("a finite number above 0", lambda x: is_number(x) and x > 0),
    "log_loss_up_to": (
        "a number from 0.001 to 1,000,000, or left out",
        lambda x: x is None or (is_number(x) and 1e-3 <= x <= 1e6),
    ),
    "noise": (f"one of {', '.join(NOISES)}", lambda x: x in NOISES),
    "unit_column": (
        "a column's name, of letters, digits and _ . - or spaces, or left out",
        lambda x: x is None or (isinstance(x, str) and _COLUMN.fullmatch(x) is not None),
    ),
    "records_per_unit": (f"a whole number from 1 to {MOST_RECORDS:,}", lambda x: _is_whole(x, 1, MOST_RECORDS)),
    "contribution_bound": (
        f"a whole number from 1 to {MOST_CONTRIBUTED}, or left out",
        lambda x: x is None or _is_whole(x, 1, MOST_CONTRIBUTED),
    ),
    **{f"{name}_schedule": (schedule.EXPECTED, schedule.is_schedule) for name in schedule.Schedules._fields},
    "public_eval": ("true or false", lambda x: isinstance(x, bool)),
    "budget_file": ("a path as text, or left out", lambda x: x is None or (isinstance(x, str) and x != "")),
    "debug_seed": ("a whole number, 0 or more, or left out", lambda x: x is None or _is_whole(x, 0)),
    "if_unset": (f"one of {', '.join(get_args(IfUnset))}", lambda x: x in get_args(IfUnset)),
}


def _broken(settings: object, rules: dict[str, Rule]) -> Iterator[str]:
    """A clause for each attribute of `settings` that breaks its rule: expected and got."""
    for name, (expected, holds) in rules.items():
        value = getattr(settings, name)
        if not holds(value):
            yield f"{name} must be {expected} (got {value!r})"


def _contradictions(c: PrivacyConfig) -> Iterator[str]:
    """A clause for each pair of settings that cannot stand together."""
    if (c.target_epsilon is None) == (c.noise_multiplier is None):
        given = "both" if c.target_epsilon is not None else "neither"
        yield f"give exactly one of target_epsilon and noise_multiplier (got {given})"
    if _is_infinite(c.target_epsilon):
        yield "for training without privacy use transformers.Trainer, or noise_multiplier=0 to debug"
    if c.records_per_unit != 1 and c.unit_column is None:
        yield "records_per_unit is of the groups that unit_column makes: name the column, or leave it at 1"
    if c.contribution_bound is not None and c.unit_column is None:
        yield "contribution_bound is of the groups that unit_column makes: name the column, or leave it out"
    if c.contribution_bound is not None and c.records_per_unit != 1:
        yield "records_per_unit is of drawn groups, contribution_bound of drawn records: leave one of them out"
    if c.contribution_bound is not None and c.noise == "discrete":
        yield "contribution_bound is not accounted with noise='discrete': leave it out, or choose another noise"
    if c.noise == "discrete" and c.log_loss_up_to is not None:
        yield "log_loss_up_to has no place on the grid of noise='discrete': leave it out, or choose another noise"
    if c.noise == "discrete" and any(c.schedules):
        yield "noise='discrete' has one grid for the whole run: leave the schedules out, or choose another noise"


def _is_infinite(x: object) -> bool:
    """Whether a number, or a text as people write it, means infinity: inf, .inf, Infinity."""
    try:
        return isinstance(x, (str, float)) and float(x.removeprefix(".") if isinstance(x, str) else x) == math.inf
    except ValueError:
        return False


def _known(cls: type[T], given: Iterable[str]) -> T:
    """A new object of the dataclass `cls`, not filled in yet.

    Raises:
        ConfigError: a name in `given` is none of its settings.
    """
    names = [f.name for f in fields(cast(Any, cls))]
    wrong = [f"there is no setting {name}{nearest(name, names)}" for name in given if name not in names]
    if wrong:
        raise ConfigError(f"{cls.__name__}: " + "; ".join(wrong))
    return object.__new__(cls)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing if no known name is similar."""
    known = list(known)
    elsewhere = [ELSEWHERE[name]] if ELSEWHERE.get(name) in known else []
    parts = [k for k in known if name in k and len(name) > 3]
    near = elsewhere or get_close_matches(name, known, n=1, cutoff=0.6) or parts
    return f"; did you mean {near[0]!r}?" if near else ""


def is_number(x: object) -> TypeGuard[float]:
    """Whether `x` is a finite number. YAML reads 1e-5 as a string, and yes as true."""
    return isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x)
