"""The folder of a sweep: what was decided for it at random, and its trials, each of them there whole or not at all.

    _sweep.json         what was asked, the plan, and two secrets: how many trials there are, and of which combinations
    running/            the current trial; all trials run in this folder, so that no file of a model tells its number
    trials/03/          a trial that has ended: ledger, log and trial.json; only the best one keeps its model
    unfinished/01/      a trial that was cut off: its ledger; the same combination is run again in its place
    selected/           the model with its card: all that the epsilon on the card covers

Everything but `selected` is private. A sweep is resumed where it was cut off, and never begun twice.
"""

import json
import math
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import filelock

from hf_dp import accounting, durable
from hf_dp.accounting import Selection, random_number
from hf_dp.errors import ConfigError, LedgerError
from hf_dp.ledger import KEY_NAME, LEDGER_NAME, read_ledger
from hf_dp.mechanism import Segment
from hf_dp.sweep.plan import Plan
from hf_dp.sweep.results import TrialResult

STATE, LOCK = "_sweep.json", "_sweep.lock"  # Trainer and `hf-dp push` leave such names out of what they upload
TRIAL = "trial.json"
SELECTED = "selected"
KEPT = (TRIAL, LEDGER_NAME, "log.txt")  # what stays of a trial that was not selected


class State(NamedTuple):
    """What is fixed before the first trial. `chosen` is secret: for each trial, the index of its combination."""

    asked: Mapping[str, object]
    plan: Plan
    chosen: tuple[int, ...]
    data: str


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of the folder: one process at a time.

    Raises:
        ConfigError: another process holds it.
    """
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ConfigError(f"{folder} is in use by another sweep: wait for it, or choose another folder") from None
    try:
        yield
    finally:
        lock.release()


def refuse_used(folder: Path) -> None:
    """Passes if the folder is empty or does not exist.

    Raises:
        ConfigError: there is something in it.
    """
    if (folder / STATE).exists():
        raise ConfigError(
            f"{folder} holds a sweep already: go on with it by --resume. A sweep in another folder "
            "(training.output_dir=FOLDER) is a second one on the same data, and what both tell adds up; beginning "
            "anew until the result pleases is covered by neither"
        )
    if folder.exists() and any(path.name not in (LOCK, KEY_NAME) for path in folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: choose another folder (training.output_dir=FOLDER)")


def begin(folder: Path, asked: Mapping[str, object], plan: Plan, num_combinations: int, data: str) -> State:
    """Picks the number of trials and their combinations at random, and stores them before anything is run."""
    number = random_number(plan.selection.distribution, plan.selection.mean)
    chosen = tuple(secrets.randbelow(num_combinations) for _ in range(number))
    kept = {
        "asked": dict(asked),
        "selection": plan.selection.stated(plan.delta),
        "delta": plan.delta,
        "target_of_one": plan.target_of_one,
        "draws": list(chosen),
        "data": data,
    }
    if not durable.create(folder / STATE, json.dumps(kept).encode(), mode=0o600):
        refuse_used(folder)
    return State(asked, plan, chosen, data)


def resume(folder: Path, asked: Mapping[str, object]) -> State:
    """The sweep that was begun in this folder.

    Raises:
        ConfigError: there is none; it is another one (naming each difference); or it has ended.
    """
    try:
        kept = json.loads((folder / STATE).read_text(encoding="utf-8"))
        plan = Plan(Selection.of(kept["selection"]), kept["delta"], kept["target_of_one"])
        state = State(kept["asked"], plan, tuple(kept["draws"]), kept["data"])
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no sweep to go on with: begin one, without --resume") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / STATE} cannot be read as a sweep's state: {error}") from error
    different = [f"{k}: begun with {state.asked.get(k)}, now {v}" for k, v in asked.items() if state.asked.get(k) != v]
    if different:
        raise ConfigError(
            f"{folder} holds another sweep: {'; '.join(different)}. Go on with the same recipe and options"
        )
    if (folder / SELECTED).exists():
        raise ConfigError(f"the sweep in {folder} has ended: {folder / SELECTED} holds the selected model")
    return state


def set_aside(folder: Path) -> int:
    """Moves a trial that was cut off to `unfinished/`, without its model; returns how many lie there now."""
    running, aside = folder / "running", folder / "unfinished"
    if running.exists():
        aside.mkdir(exist_ok=True)
        prune(running)
        running.rename(aside / f"{len(list(aside.iterdir())) + 1:02d}")
    return len(list(aside.iterdir())) if aside.exists() else 0


def finish(folder: Path, result: TrialResult) -> None:
    """The trial in `running/` has ended: moves it to `trials/`, with its result."""
    running, trials = folder / "running", folder / "trials"
    trials.mkdir(exist_ok=True)
    durable.replace(running / TRIAL, json.dumps(result, indent=1).encode())
    running.rename(trials / f"{len(list(trials.iterdir())) + 1:02d}")
    durable.sync_folder(trials)


def finished(folder: Path) -> list[tuple[Path, TrialResult]]:
    """(folder, result) of each trial that has ended, in order.

    Raises:
        ConfigError: one of the results cannot be read.
    """
    found = []
    for place in sorted((folder / "trials").glob("*"), key=lambda p: int(p.name)):
        try:
            found.append((place, json.loads((place / TRIAL).read_text(encoding="utf-8"))))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{place / TRIAL} cannot be read: {error}. Put it back from a backup") from error
    return found


def best(trials: list[tuple[Path, TrialResult]]) -> int:
    """Index of the trial with the least loss, the first one among equals. A trial that diverged comes last."""
    scores = [math.inf if (score := result["score"]) is None else score for _, result in trials]
    return scores.index(min(scores))


def prune(trial: Path) -> None:
    """Removes the model of a trial; its ledger, log and result stay."""
    for path in trial.iterdir():
        if path.name in KEPT:
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def charged(folder: Path) -> list[Segment]:
    """What all trials claim, including those that were cut off."""
    ledgers = sorted((*folder.glob(f"trials/*/{LEDGER_NAME}"), *folder.glob(f"unfinished/*/{LEDGER_NAME}")))
    found: list[Segment] = []
    for path in ledgers:
        try:
            record = read_ledger(path)
            found += accounting.claimed(record.segments, record.plans, record.header.delta)
        except LedgerError as error:
            raise ConfigError(f"what a trial spent is not known: {error}") from error
    return found
