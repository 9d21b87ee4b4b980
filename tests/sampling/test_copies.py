"""Calls in a copy of the process: their answers come back, and nothing else does."""

import contextlib
import os
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_dp.sampling import copies
from hf_dp.sampling.copies import in_a_copy

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks are made on Linux alone")
SEEN: list[int] = []


def noting(thing: int) -> list[int]:
    SEEN.append(thing)
    print("never shown")
    return [*SEEN]


def test_a_copy_begins_as_the_process_is_and_its_memory_ends_with_it(capfd: pytest.CaptureFixture[str]) -> None:
    SEEN[:] = [7]
    for _ in range(2):
        assert in_a_copy(noting, [1, 2]) == ([[7, 1], [7, 1, 2]], [])
    assert SEEN == [7]
    assert capfd.readouterr().out == ""


def test_tensors_come_back_as_they_were() -> None:
    found = in_a_copy(lambda n: {"x": torch.full((n, 400_000), 1.5)}, [1, 2])
    assert found is not None
    assert torch.equal(found.results[1]["x"], torch.full((2, 400_000), 1.5))


def test_files_both_read_and_written_are_named(tmp_path: Path) -> None:
    def through(path: Path) -> str:
        path.write_text("a")
        (tmp_path / "log").open("a").close()
        return path.read_text()

    found = in_a_copy(through, [tmp_path / "kept"])
    assert found == (["a"], [str(tmp_path / "kept")])


def fails(thing: Any) -> Any:
    raise ValueError


@pytest.mark.parametrize("call", [fails, lambda thing: lambda: thing, lambda thing: os._exit(3)])
def test_no_answer_is_none(call: Any) -> None:
    assert in_a_copy(call, [1]) is None


def test_who_takes_too_long_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "PATIENCE", 0.2)
    assert in_a_copy(lambda thing: sys.stdin.read() or __import__("time").sleep(60), [1]) is None


def of_a_database(path: Path) -> Any:
    database = sqlite3.connect(path)
    database.execute("create table words (word text)")
    database.commit()

    def count(word: str) -> int:
        database.execute("insert into words values (?)", (word,))
        database.commit()
        return int(database.execute("select count(*) from words").fetchone()[0])

    return count


def of_a_file_moved_into_place(path: Path) -> Any:
    path.write_text("0")

    def count(word: str) -> int:
        number = int(path.read_text()) + 1
        path.with_suffix(".new").write_text(str(number))
        path.with_suffix(".new").replace(path)
        return number

    return count


@pytest.mark.parametrize("make", [of_a_database, of_a_file_moved_into_place])
def test_what_is_kept_on_the_disk_is_named(make: Any, tmp_path: Path) -> None:
    found = in_a_copy(make(tmp_path / "kept"), ["a", "b"])
    assert found is not None
    assert found.files == [str(tmp_path / "kept")]


def test_many_open_files_and_children_that_others_wait_for_are_no_matter(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with contextlib.ExitStack() as stack:
        for i in range(1100):
            with contextlib.suppress(OSError):  # a limit of the system's
                stack.enter_context((tmp_path / str(i)).open("w"))
        try:
            assert in_a_copy(str, [1, 2]) == (["1", "2"], [])
        finally:
            signal.signal(signal.SIGCHLD, before)
