"""Bytes and a path -> a file that holds all of its old content or all of the new, whatever interrupts the writing."""

import os
from pathlib import Path


def write_fully(descriptor: int, data: bytes) -> None:
    """Writes all of `data`, then calls fsync: it is on disk when this returns.

    Raises:
        OSError: the write failed; a part of `data` may have been written.
    """
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Puts the folder's entries on disk, so that files created, renamed or removed in it survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def stage(path: Path, data: bytes, mode: int = 0o666) -> Path:
    """Writes `data` beside `path`, under a temporary name that starts with an underscore; returns that name.

    The umask applies to `mode`, as for any new file.
    """
    staged = path.with_name(f"_{path.name}.{os.getpid()}.new")
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        write_fully(descriptor, data)
    except OSError:
        staged.unlink()
        raise
    finally:
        os.close(descriptor)
    return staged


def replace(path: Path, data: bytes) -> None:
    """Replaces the file at `path` by `data`: atomically, and on disk when this returns."""
    os.replace(stage(path, data), path)
    sync_folder(path.parent)


def create(path: Path, data: bytes, mode: int = 0o666) -> bool:
    """Creates the file at `path` unless there is one; returns whether it did. Of several processes, one succeeds."""
    staged = stage(path, data, mode)
    try:
        os.link(staged, path)
    except FileExistsError:
        return False
    except OSError:
        # A file system without hard links: the two steps below are not atomic, so callers look again afterwards.
        if path.exists():
            return False
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True
