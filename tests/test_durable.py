"""A file is all of the old or all of the new, whatever interrupts its writing."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from hf_dp import durable
from tests.support.children import KILLED, Bomb, in_child

OLD, NEW = b"old " * 1000, b"new and longer " * 1000


@pytest.mark.parametrize(
    "point",
    [("write", "half", 1), *((p, w, 1) for p in ("write", "fsync", "replace") for w in ("before", "after"))],
    ids=str,
)
def test_a_kill_leaves_the_old_or_the_new(point: tuple[str, str, int], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)

    def killed() -> None:
        bomb = Bomb(*point)
        os.write, os.fsync, os.replace = (
            bomb.around(name, f) for name, f in (("write", os.write), ("fsync", os.fsync), ("replace", os.replace))
        )
        durable.replace(path, NEW)

    assert in_child(killed) == KILLED
    assert path.read_bytes() == (NEW if point[:2] == ("replace", "after") else OLD)
    durable.replace(path, NEW)  # what the dead one left is in nobody's way
    assert path.read_bytes() == NEW


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_an_error_leaves_the_old_and_no_rubbish(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)

    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(OSError, match="No space"):
            durable.replace(path, NEW)
        with pytest.raises(OSError, match="No space"):
            durable.create(tmp_path / "other", NEW)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", OLD)]


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda d, data: write(d, data[:7]))
    durable.replace(tmp_path / "file", NEW)
    assert (tmp_path / "file").read_bytes() == NEW


def test_data_are_synced_before_the_name_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "data")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("name"), rename(a, b)))
    durable.replace(tmp_path / "file", NEW)
    assert events == ["data", "name", "folder"]


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_create_leaves_what_is_there(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "file"
    assert durable.create(path, OLD)
    assert not durable.create(path, NEW)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", OLD)]


def test_of_many_that_create_one_does(tmp_path: Path) -> None:
    def creates(number: int) -> None:
        if not durable.create(tmp_path / "file", bytes([number]) * 100):
            raise SystemExit

    workers = []
    for number in range(8):
        workers.append(os.fork())
        if workers[-1] == 0:
            os._exit(in_child(lambda number=number: creates(number)))
    statuses = [os.waitstatus_to_exitcode(os.waitpid(w, 0)[1]) for w in workers]
    (winner,) = [number for number, status in enumerate(statuses) if status == 0]
    assert (tmp_path / "file").read_bytes() == bytes([winner]) * 100


def test_the_mode_is_narrowed_by_the_umask(tmp_path: Path) -> None:
    durable.create(tmp_path / "secret", OLD, mode=0o600)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    before = os.umask(0o027)
    try:
        durable.replace(tmp_path / "file", OLD)
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
