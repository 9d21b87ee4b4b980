"""A budget file -> what it says, checked against the hash in it; and back."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from hf_dp.accounting import delta_problems, segment_problems, target_problems
from hf_dp.config import NOISES
from hf_dp.errors import BudgetError
from hf_dp.ledger.witness import LEDGER_NAME
from hf_dp.mechanism import Mechanism, Segment

VERSION = 1
TOKEN_NAME = "_privacy_budget_token"  # with an underscore: Trainer does not push it
# Accounting takes 14 s for 30 runs of different noise, and some ten times that to see how many steps fit.
LOCK_SECONDS = 600.0


class BudgetSubject(NamedTuple):
    """What the total is about: that of the first run. `data` is a fingerprint under the key beside the budget file."""

    data: str
    num_examples: int
    unit: str
    relation: str

    @classmethod
    def run(cls, mechanism: Mechanism, data: str) -> "BudgetSubject":
        """The subject of a run of `mechanism` on records with the fingerprint `data`."""
        return cls(data, mechanism.num_examples, mechanism.unit, mechanism.relation)


class BudgetEntry(NamedTuple):
    """What one run takes from the total.

    Attributes:
        token: the text in the token file beside the run's ledger.
        folder: the folder of the run's ledger.
        ended: whether `segments` are what the run claims; otherwise they are what it has reserved.
        charged: steps in its ledger when it reserved or ended; a ledger with fewer is an older copy.
        segments: what it takes from the total.
    """

    token: str
    folder: str
    ended: bool
    charged: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Budget:
    """The content of a budget file.

    Attributes:
        target_epsilon: the total.
        target_delta: delta at which all runs together are accounted.
        any_data: whether runs on other records, or on the same ones in another form, may use it too; their costs are
            added all the same.
        subject: what the total is about; None before the first run.
        runs: all runs that have used it.
    """

    target_epsilon: float
    target_delta: float
    any_data: bool = False
    subject: BudgetSubject | None = None
    runs: tuple[BudgetEntry, ...] = ()

    def segments(self, but: BudgetEntry | None = None) -> list[Segment]:
        """The segments of all runs, or of all but one."""
        return [s for run in self.runs if run != but for s in run.segments]

    def known(self, folder: Path) -> BudgetEntry | None:
        """The entry of the run in `folder`, or None.

        The token in the folder must be the entry's. If the folder is another one than the entry's, that one must be
        gone: the run was moved, not copied.
        """
        token = folder / TOKEN_NAME
        found = token.read_text(encoding="utf-8") if token.is_file() else ""
        for run in self.runs:
            if run.token == found and (run.folder == str(folder) or not (Path(run.folder) / LEDGER_NAME).exists()):
                return run
        return None

    def after(self, run: BudgetEntry, *, instead_of: BudgetEntry | None) -> "Budget":
        """The budget with `run` in place of the entry `instead_of`."""
        return replace(self, runs=(*(r for r in self.runs if r != instead_of), run))


def read(path: Path) -> Budget:
    """The content of the budget file.

    Raises:
        BudgetError: the file is missing, unreadable, or not as hf_dp wrote it.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise BudgetError(
            f"there is no budget at {path}: `hf-dp budget {path} --target-epsilon E --target-delta D` creates one"
        ) from error
    except OSError as error:
        raise BudgetError(f"{path} can't be read ({error.strerror})") from error
    try:
        return decoded(data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BudgetError(
            f"{path} is not as hf_dp wrote it ({error!r}), so what was spent is not known. Put the newest undamaged "
            "copy back"
        ) from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the budget's lock; a second process waits for it. The lock ends with the process.

    Raises:
        BudgetError: the lock is held by another process for LOCK_SECONDS, or cannot be made.
    """
    read(path)  # no lock file beside a budget that is not there
    try:
        with FileLock(path.with_name(f"_{path.name}.lock"), timeout=LOCK_SECONDS):
            yield
    except Timeout as error:
        raise BudgetError(
            f"{path} has been in use by another process for {LOCK_SECONDS:g} s: see which, and start again"
        ) from error
    except OSError as error:
        raise BudgetError(
            f"{path} can't be locked or written ({error.strerror}): give write access, make room"
        ) from error


def encoded(budget: Budget) -> bytes:
    """The bytes of the file, with the hash of its content."""
    said = {
        "version": VERSION,
        "target_epsilon": budget.target_epsilon,
        "target_delta": budget.target_delta,
        "any_data": budget.any_data,
        "of": None if budget.subject is None else budget.subject._asdict(),
        "runs": [run._asdict() | {"segments": [s.stated() for s in run.segments]} for run in budget.runs],
    }
    digest = hashlib.sha256(json.dumps(said, allow_nan=False).encode()).hexdigest()
    return (json.dumps(said | {"sha256": digest}, indent=1) + "\n").encode()


def decoded(data: bytes) -> Budget:
    """The budget in `data`; ValueError, TypeError, KeyError or AttributeError if `encoded` would not write it so."""
    said = dict(json.loads(data))
    if said["version"] != VERSION:
        raise ValueError(f"version {said['version']!r}, expected {VERSION}")
    runs = [BudgetEntry(**{**run, "segments": tuple(Segment.of(s) for s in run["segments"])}) for run in said["runs"]]
    totals = {k: said[k] for k in ("target_epsilon", "target_delta", "any_data")}
    budget = Budget(**totals, subject=None if said["of"] is None else BudgetSubject(**said["of"]), runs=tuple(runs))
    wrong = [*target_problems(budget.target_epsilon), *delta_problems(budget.target_delta)]
    wrong += [problem for segment in budget.segments() for problem in segment_problems(segment)]
    wrong += [f"noise is {s.noise!r}" for s in budget.segments() if s.noise not in NOISES]
    wrong += [f"ended is {run.ended!r}" for run in runs if type(run.ended) is not bool]
    if wrong:
        raise ValueError("; ".join(wrong))
    if encoded(budget) != data:
        raise ValueError("its hash is not that of its content")
    return budget
