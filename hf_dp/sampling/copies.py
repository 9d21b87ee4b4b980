"""Calls made in a copy of this process -> what they give when nothing has been called before.

Code that remembers may do so anywhere: in a cache, a database, a tokenizer, a library written in Rust. To see whether
what it gives for one thing depends on which others came before, it is called in two orders, each in a copy of the
process as it is now, whose memory ends with it: as PyTorch's DataLoader does it for its workers, by a fork.
"""

import os
import pickle
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

Given = TypeVar("Given")
PATIENCE = 20.0  # seconds for an answer; whoever is slower is not looked at in this way


class Answers(NamedTuple):
    """What the calls gave, in their order, and the files that they both read and wrote."""

    results: list[Any]
    files: list[str]


def in_a_copy(call: Callable[[Given], Any], things: Sequence[Given]) -> Answers | None:
    """What `call` gives for each thing, one after another, in a copy of this process.

    Args:
        call: computes on CPUs, and what it returns can be pickled.
        things: in the order of the calls.

    Returns:
        None where there is no copy, or no answer: another system than Linux, an error, a result that cannot be pickled,
        more than `PATIENCE` seconds.
    """
    if not sys.platform.startswith("linux"):
        return None
    ours, theirs = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the copy does not have
        try:
            child = os.fork()
        except OSError:  # no room for another process
            os.close(ours)
            os.close(theirs)
            return None
    if child == 0:
        try:
            os.close(ours)
            _answer(theirs, call, things)
        finally:
            os._exit(0)
    os.close(theirs)
    try:
        return _received(ours)
    finally:
        os.close(ours)
        with suppress(ProcessLookupError, ChildProcessError):  # somebody else may wait for all children
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _answer(pipe: int, call: Callable[[Given], Any], things: Sequence[Given]) -> None:
    """In the copy: calls, and writes the answers to the pipe. Nothing is shown, and no pool of threads is used."""
    with open(os.devnull, "r+", encoding="utf-8") as silence:
        for stream in (0, 1, 2):
            os.dup2(silence.fileno(), stream)
        sys.stdout = sys.stderr = silence
        torch.set_num_threads(1)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        opened = _Opened()
        sys.addaudithook(opened.look)
        results = [call(thing) for thing in things]
        answers = pickle.dumps((results, opened.both()))
        with os.fdopen(pipe, "wb") as out:
            out.write(answers)


class _Opened:
    """The files that the calls read and write: opened for it, moved into place, or open for both before and changed."""

    def __init__(self) -> None:
        self.read, self.written = set[str](), set[str]()
        self._before = {path: _state_of(path) for path in _open_for_both()}

    def look(self, event: str, arguments: tuple[Any, ...]) -> None:
        """As Python calls it for whatever is opened or moved."""
        if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path, access = os.path.abspath(os.fsdecode(arguments[0])), arguments[2] & os.O_ACCMODE
            if access != os.O_WRONLY:
                self.read.add(path)
            if access != os.O_RDONLY:
                self.written.add(path)
        elif event == "os.rename":
            self.written.add(os.path.abspath(os.fsdecode(arguments[1])))
        elif event == "sqlite3.connect" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            self._before.setdefault(path, _state_of(path))

    def both(self) -> list[str]:
        """Those that were read and written."""
        changed = {path for path, before in self._before.items() if _state_of(path) != before}
        return sorted(((self.read & self.written) | changed) - {os.devnull})


def _open_for_both() -> list[str]:
    """The files that the process has open for reading and writing."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            path = os.readlink(f"/proc/self/fd/{number}")
            flags = Path(f"/proc/self/fdinfo/{number}").read_text(encoding="ascii").partition("flags:")[2].split()[0]
            if os.path.isfile(path) and int(flags, 8) & os.O_ACCMODE == os.O_RDWR:
                found.append(path)
    return found


def _state_of(path: str) -> object:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _received(pipe: int) -> Answers | None:
    until, parts, ready = time.monotonic() + PATIENCE, list[bytes](), select.poll()
    ready.register(pipe, select.POLLIN)
    while ready.poll(1000 * max(0.0, until - time.monotonic())):
        part = os.read(pipe, 1 << 20)
        if not part:
            return Answers(*pickle.loads(b"".join(parts))) if parts else None
        parts.append(part)
    return None
