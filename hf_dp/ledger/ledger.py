"""Steps -> an append-only record of them on disk, written ahead of every release; anybody can read what it says.

The file lies in the output folder, outside the checkpoints. A step is on disk before its noisy sum leaves the process,
so the ledger never counts fewer steps than were released; after a crash it may count one more. One process at a time
writes to it.
"""

import fcntl
import os
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from hf_dp import durable
from hf_dp.errors import LedgerError
from hf_dp.ledger.format import (
    GENESIS,
    ExecutedSegment,
    LedgerHeader,
    LedgerRecord,
    Planned,
    check_header,
    check_segment,
    encode,
    for_accounting,
    header_record,
    parse,
    plan_after,
    plan_record,
    segment_record,
    step_record,
)
from hf_dp.ledger.witness import LEDGER_NAME, refuse_older
from hf_dp.mechanism import Segment

__all__ = [
    "LEDGER_NAME",
    "ExecutedSegment",
    "Ledger",
    "LedgerHeader",
    "LedgerRecord",
    "has_steps",
    "read_ledger",
    "refuse_rollback",
]


class Ledger:
    """The open ledger of a run, from `Ledger.open`; a context manager that closes it.

    Every error is a `LedgerError`, raised before the step that it stops. After a failed write nothing more can be
    charged until the ledger is opened again, which counts the half-written step.
    """

    def __init__(self, path: Path, descriptor: int, data: bytes, record: LedgerRecord) -> None:
        self._path = path
        self._descriptor = descriptor
        self._size = len(data)
        self._take_in(record)
        self._writing = False
        _OPEN.add(self)

    def _take_in(self, record: LedgerRecord) -> None:
        self._record = record
        self._executed = record.executed
        self._planned = record.planned
        self._num_steps = record.num_steps
        self._head = record.head

    @classmethod
    def open(cls, path: Path | str, header: LedgerHeader) -> "Ledger":
        """Creates or continues the ledger, and locks it until `close` or the end of the process.

        A torn last line is recovered, and counts as one step. The ledger must begin with every copy of it in the
        checkpoint folders beside it, and must contain each line whose hash a `privacy_complete.json` or `privacy.json`
        there names.

        Raises:
            LedgerError: it is locked by another process; damaged; has another header (naming each difference); is older
                than a checkpoint's copy, or missing where a copy exists; or the folder can't be written.
        """
        path = Path(path)
        try:
            check_header(header)
        except ValueError as error:
            raise LedgerError(f"this run can't have a ledger: {error}") from error
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                refuse_older(path, b"")
                durable.create(path, encode(header_record(header), GENESIS)[0])
            return cls._continue(path, header)
        except OSError as error:
            raise _unwritable(path, error) from error

    @classmethod
    def _continue(cls, path: Path, header: LedgerHeader) -> "Ledger":
        descriptor = _locked(path)
        try:
            data = path.read_bytes()
            record = parse(data, str(path))
            _refuse_other(path, record.header, header)
            refuse_older(path, data)
            if data.endswith(b"\n"):
                return cls(path, descriptor, data, record)
            mended = _mended(data, record)
            staged = durable.stage(path, mended)
            replacement = _locked(staged)
            os.replace(staged, path)
            durable.sync_folder(path.parent)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return cls(path, replacement, mended, parse(mended, str(path)))

    # ---- writing ---------------------------------------------------------------------------------------------------

    def begin(
        self,
        sample_rate: float,
        joint_noise_multiplier: float,
        clip_norm: float,
        expected_batch_size: int,
        noise: str = "gaussian",
        loss_bound: float | None = None,
        **beside: int,
    ) -> None:
        """Starts a new segment if these settings differ from those of the current one; further steps are charged to it.

        `joint_noise_multiplier` is noise over the sensitivity of everything that a step releases; `beside` may have
        `records_per_unit`, where it is above 1, and `contribution_bound`, where there is one.

        Raises:
            LedgerError: a value out of range, q other than B / N, or the write failed.
        """
        settings = (float(sample_rate), float(joint_noise_multiplier), float(clip_norm), expected_batch_size)
        segment = ExecutedSegment(*settings, num_steps=0, noise=noise, loss_bound=loss_bound, **beside)
        try:
            check_segment(segment, self._record.header.num_examples)
        except ValueError as error:
            raise LedgerError(f"{self._path}: a segment that can't be: {error}") from error
        if self.current is None or self.current._replace(num_steps=0) != segment:
            self._append(segment_record(segment), executed=(*self._executed, segment))

    def plan(self, upcoming: Sequence[Segment]) -> None:
        """Writes the steps that are to follow upon those so far. From the next step on, the run claims the epsilon of
        all of them.

        Raises:
            LedgerError: the write failed.
        """
        plan = plan_after(self._executed, upcoming)
        if not self._planned or self._planned[-1].segments != plan.segments:
            self._append(plan_record(upcoming), planned=(*self._planned, plan))

    def charge(self) -> int:
        """Counts one step; it is on disk when this returns. Nothing of the step may leave the process before.

        Returns:
            Steps charged in all.

        Raises:
            LedgerError: the write failed, or the file is no longer the one that was opened. The step must not be
                released.
        """
        if self.current is None:
            raise LedgerError(
                f"{self._path}: expected a segment before the first step; call begin() with the settings of the steps"
            )
        last = self.current._replace(num_steps=self.current.num_steps + 1)
        self._append(step_record(self._num_steps + 1), executed=(*self._executed[:-1], last))
        return self._num_steps

    def _append(
        self,
        record: dict[str, object],
        *,
        executed: tuple[ExecutedSegment, ...] | None = None,
        planned: tuple[Planned, ...] | None = None,
    ) -> None:
        """Writes one record; then the ledger has the segments and plans that are given, or those it had."""
        self._check_untouched()
        line, head = encode(record, self._head)
        self._writing = True  # stays so when anything interrupts the next lines
        try:
            durable.write_fully(self._descriptor, line)
        except OSError as error:
            raise _unwritable(self._path, error) from error
        self._head = head
        self._size += len(line)
        self._planned = self._planned if planned is None else planned
        self._executed = self._executed if executed is None else executed
        self._num_steps = sum(s.num_steps for s in self._executed)
        self._writing = False

    def _check_untouched(self) -> None:
        if self._descriptor < 0:
            raise LedgerError(
                f"{self._path} is closed, or belongs to the parent of this process: open it where it is used"
            )
        if self._writing:
            raise LedgerError(
                f"{self._path}: an earlier write did not finish; open the ledger again, which counts that step"
            )
        try:
            there, mine = os.stat(self._path), os.fstat(self._descriptor)
        except OSError as error:
            raise LedgerError(
                f"{self._path} is gone since it was opened; stop, and put it back before you resume"
            ) from error
        if (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino) or mine.st_size != self._size:
            raise LedgerError(
                f"{self._path} changed under the running training: expected {self._size} bytes of its own, found "
                f"{there.st_size}; stop, and put the right one back before you resume"
            )

    # ---- reading ---------------------------------------------------------------------------------------------------

    @property
    def header(self) -> LedgerHeader:
        """What the whole ledger is about."""
        return self._record.header

    @property
    def current(self) -> ExecutedSegment | None:
        """The segment that steps are charged to."""
        return self._executed[-1] if self._executed else None

    @property
    def num_steps(self) -> int:
        """Steps charged, in all sessions."""
        return self._num_steps

    @property
    def head(self) -> str:
        """Hash of the last line, in hex. It vouches for all lines before."""
        return self._head

    def segments(self) -> tuple[Segment, ...]:
        """All steps charged, run-length encoded, for accounting."""
        return self.record().segments

    def record(self) -> LedgerRecord:
        """Everything that the ledger says now. After a write that was interrupted, the file is read again."""
        if self._writing:
            return read_ledger(self._path)
        steps = for_accounting(self._executed)
        return LedgerRecord(self.header, steps, self.head, self._num_steps, False, self._executed, self._planned)

    def copy_to(self, folder: Path | str) -> None:
        """Puts a copy into a checkpoint, atomically. Training resumes from there only with a ledger that begins with
        this copy.

        Raises:
            LedgerError: the write failed, or the file is no longer the one that was opened.
        """
        self._check_untouched()
        target = Path(folder) / LEDGER_NAME
        try:
            durable.replace(target, self._path.read_bytes())
        except OSError as error:
            raise _unwritable(target, error) from error

    def fileno(self) -> int:
        """The open file's descriptor."""
        return self._descriptor

    def close(self) -> None:
        """Unlocks the ledger, which can then be opened again. A second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        """A ledger that an interrupt left without an owner must not stay locked."""
        self.close()


def read_ledger(path: Path | str) -> LedgerRecord:
    """The content of the ledger at `path`, which may belong to a running training. Changes nothing.

    Raises:
        LedgerError: the file is missing, unreadable, or damaged in more than a torn last line.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise LedgerError(f"{path}: no ledger can be read there ({error.strerror})") from error
    return parse(data, str(path))


def has_steps(path: Path) -> bool:
    """Whether there is a ledger at `path` with a step in it; without a step, nothing was spent.

    Raises:
        LedgerError: it can't be read.
    """
    return path.exists() and read_ledger(path).num_steps > 0


def refuse_rollback(path: Path | str, checkpoint: Path | str) -> None:
    """Passes if the ledger at `path` contains everything in the copy in `checkpoint`, so that resuming there counts all
    steps.

    Raises:
        LedgerError: there is no ledger or no copy, the copy is damaged, or the ledger is older than the copy or of
            another run.
    """
    path, copy = Path(path), Path(checkpoint) / LEDGER_NAME
    if not copy.is_file():
        raise LedgerError(
            f"{checkpoint} has no {LEDGER_NAME}: it is unfinished, or not of a private training, and what it spent is "
            "not known. Resume from another checkpoint, or start anew in another output_dir"
        )
    try:
        data = path.read_bytes() if path.exists() else b""
        refuse_older(path, data, Path(checkpoint))
    except OSError as error:
        raise LedgerError(f"{path}: no ledger can be read there ({error.strerror})") from error


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _locked(path: Path) -> int:
    """A descriptor for appending to `path`, locked against other processes."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there, mine = os.stat(path), os.fstat(descriptor)
            if (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise LedgerError(
                f"{path} is in use by another process: two trainings can't share one output_dir. Wait for the other, "
                "or choose another"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # replaced between open and lock, by another process that recovered it


def _mended(data: bytes, record: LedgerRecord) -> bytes:
    """`data` with its unfinished last line completed or, if that is torn, replaced by the step that it counts as."""
    if not record.torn:
        return data + b"\n"
    whole = data[: data.rindex(b"\n") + 1]
    return whole + encode(step_record(record.num_steps), record.head)[0] if record.executed else whole


def _refuse_other(path: Path, found: LedgerHeader, expected: LedgerHeader) -> None:
    ours, theirs = asdict(expected), asdict(found)
    different = [f"{k}: the ledger has {theirs[k]!r}, this run {v!r}" for k, v in ours.items() if theirs[k] != v]
    if different:
        raise LedgerError(
            f"{path} is of another run: {'; '.join(different)}. Resume with the settings and data that it was begun "
            "with (a fingerprint also changes when its key file is lost), or start anew in another output_dir: what "
            "was spent on the same data adds up"
        )


def _unwritable(path: Path, error: OSError) -> LedgerError:
    return LedgerError(
        f"{path} can't be written ({error.strerror}): stopped before anything was released. Make room or give write "
        "access, then resume; what was saved is intact"
    )


_OPEN: "weakref.WeakSet[Ledger]" = weakref.WeakSet()


def _forget_in_child() -> None:
    """A forked worker must neither hold its parent's lock nor write to its ledger."""
    for ledger in list(_OPEN):
        ledger.close()


os.register_at_fork(after_in_child=_forget_in_child)
