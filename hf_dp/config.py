"""What the user asks for, from flags or keywords; out comes `PrivacyConfig`, frozen and checked."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal, TypeGuard, get_args

from hf_dp import schedule
from hf_dp.errors import ConfigError

Noise = Literal["gaussian", "gaussian-chacha20", "discrete"]
NOISES: tuple[str, ...] = get_args(Noise)
CanaryKind = Literal["gradient", "new-token", "random-token"]
CANARY_KINDS: tuple[str, ...] = get_args(CanaryKind)
_COLUMN = re.compile(r"\w([\w .-]*\w)?")  # it stands on the card
MIN_DELTA = 1e-12  # below it the PLD accountant loses its footing (8.59 for a true 4.25 at 1e-14)


@dataclass(frozen=True)
class PrivacyConfig:
    """The privacy that a run must have. Nothing in it is a matter of speed, and nothing of speed is in it.

    Exactly one of `target_epsilon` and `noise_multiplier` is given. Stands beside `TrainingArguments`, as in
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
        metadata={"help": "Mean size of the logical batch, over all processes. A record joins with q = B/N."},
    )
    clip_norm: float = field(default=1.0, metadata={"help": "C: no example moves the gradient sum by more than this."})
    log_loss_up_to: float | None = field(
        default=None,
        metadata={
            "help": "Log training loss, each example's clamped to [0, this], and batch size: noised, inside epsilon."
        },
    )
    noise: Noise = field(
        default="gaussian",
        metadata={
            "help": "gaussian: random bits from numpy's Philox; gaussian-chacha20: from the cipher ChaCha20; discrete: on whole "
            "numbers, from ChaCha20, one example a pass."
        },
    )
    unit_column: str | None = field(
        default=None,
        metadata={"help": "Protect all records with the same value in this column as one: a person's, an author's."},
    )
    noise_schedule: str | None = field(
        default=None,
        metadata={
            "help": "sigma goes on in levels from its first value: SHAPE:RATIO, such as exponential:0.5 (ends at half)."
        },
    )
    clip_schedule: str | None = field(default=None, metadata={"help": "The same of clip_norm."})
    batch_schedule: str | None = field(
        default=None, metadata={"help": "The same of expected_batch_size; linear:4 ends at four times the first."}
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
        default=None, metadata={"help": "For tests only: fixed sampling and noise. Card and ledger say NOT PRIVATE."}
    )

    @property
    def schedules(self) -> schedule.Schedules:
        """How sigma, C and B go on."""
        return schedule.Schedules(self.noise_schedule, self.clip_schedule, self.batch_schedule)

    def __post_init__(self) -> None:
        wrong = list(_problems(self))
        if wrong:
            raise ConfigError("PrivacyConfig: " + "; ".join(wrong) + ".")


@dataclass(frozen=True)
class AuditConfig:
    """Canaries in a run, from which a lower bound on its epsilon is measured. They are made up; no record is looked at for them.

    Raises:
        ConfigError: a value out of range. Names everything wrong at once.
    """

    num_canaries: int = field(
        default=300,
        metadata={"help": "m: slots added to the N records. No audit of m canaries shows more than its ceiling."},
    )
    kind: CanaryKind = field(
        default="gradient",
        metadata={
            "help": "gradient: vectors of norm C added to the clipped sum, scored by every noisy sum; new-token, random-token: "
            "rows of tokens, scored by the finished model's loss."
        },
    )
    control: bool = field(
        default=False,
        metadata={"help": "A positive control: canaries alone, no record is read; with noise_multiplier=0."},
    )
    control_auc: float | None = field(
        default=None, metadata={"help": "Area under the curve of a positive control of the same kind."}
    )

    def __post_init__(self) -> None:
        wrong = list(_audit_problems(self))
        if wrong:
            raise ConfigError("AuditConfig: " + "; ".join(wrong) + ".")


def _audit_problems(a: AuditConfig) -> Iterator[str]:
    m, area = a.num_canaries, a.control_auc
    if not (isinstance(m, int) and not isinstance(m, bool) and 10 <= m <= 100_000):
        yield f"num_canaries must be a whole number from 10 to 100,000 (got {m!r})"
    if a.kind not in CANARY_KINDS:
        yield f"kind must be one of {', '.join(CANARY_KINDS)} (got {a.kind!r})"
    if not isinstance(a.control, bool):
        yield f"control must be true or false (got {a.control!r})"
    if area is not None and not (is_number(area) and 0 <= area <= 1):
        yield f"control_auc must be a number from 0 to 1, or left out (got {area!r})"


def _problems(c: PrivacyConfig) -> Iterator[str]:
    if (c.target_epsilon is None) == (c.noise_multiplier is None):
        given = "both" if c.target_epsilon is not None else "neither"
        yield f"give exactly one of target_epsilon and noise_multiplier (got {given})"
    if c.target_epsilon is not None and not (is_number(c.target_epsilon) and c.target_epsilon > 0):
        plain = "; for training without privacy take transformers.Trainer, or noise_multiplier=0 to debug"
        yield f"target_epsilon must be a finite number above 0 (got {c.target_epsilon!r}{plain if c.target_epsilon == math.inf else ''})"
    if c.noise_multiplier is not None and not (is_number(c.noise_multiplier) and c.noise_multiplier >= 0):
        yield f"noise_multiplier must be a finite number, 0 or more (got {c.noise_multiplier!r})"
    if c.target_delta is not None and not (is_number(c.target_delta) and MIN_DELTA <= c.target_delta < 1):
        yield f"target_delta must be a number, at least {MIN_DELTA} and below 1 (got {c.target_delta!r})"
    batch = c.expected_batch_size
    if not (is_number(batch) and batch >= 1 and batch == int(batch)):
        yield f"expected_batch_size must be a whole number, 1 or more (got {batch!r})"
    if not (is_number(c.clip_norm) and c.clip_norm > 0):
        yield f"clip_norm must be a finite number above 0 (got {c.clip_norm!r})"
    if c.log_loss_up_to is not None and not (is_number(c.log_loss_up_to) and 1e-3 <= c.log_loss_up_to <= 1e6):
        yield f"log_loss_up_to must be a number from 0.001 to 1,000,000, or left out (got {c.log_loss_up_to!r})"
    if c.noise not in NOISES:
        yield f"noise must be one of {', '.join(NOISES)} (got {c.noise!r})"
    if c.noise == "discrete" and c.log_loss_up_to is not None:
        yield "log_loss_up_to has no place on the grid of noise='discrete': leave it out, or choose another noise"
    if c.unit_column is not None and not (isinstance(c.unit_column, str) and _COLUMN.fullmatch(c.unit_column)):
        yield f"unit_column must be a column's name, of letters, digits and _ . - or spaces, or left out (got {c.unit_column!r})"
    for name, text in c.schedules._asdict().items():
        expected = None if text is None else schedule.problem(text)
        if expected:
            yield f"{name}_schedule must be {expected} (got {text!r})"
    if c.noise == "discrete" and any(c.schedules):
        yield "noise='discrete' has one grid for the whole run: leave the schedules out, or choose another noise"
    if not isinstance(c.public_eval, bool):
        yield f"public_eval must be true or false (got {c.public_eval!r})"
    if c.budget_file is not None and not (isinstance(c.budget_file, str) and c.budget_file):
        yield f"budget_file must be a path as text, or left out (got {c.budget_file!r})"
    seed = c.debug_seed
    if seed is not None and not (isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0):
        yield f"debug_seed must be a whole number, 0 or more, or left out (got {seed!r})"


def is_number(x: object) -> TypeGuard[float]:
    """Whether `x` is a finite number. YAML reads 1e-5 as a string, and yes as true."""
    return isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x)
