"""Bytes and a path -> a file that is whole, whatever happens in between: all of the old, or all of the new."""

import os
from pathlib import Path


def write_fully(descriptor: int, data: bytes) -> None:
    """All of `data`, then fsync: on disk when this returns.

    Raises:
        OSError: some of it may have been written.
    """
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Makes names that were created, replaced or removed in `folder` last through a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def stage(path: Path, data: bytes, mode: int = 0o666) -> Path:
    """Writes `data` beside `path`, under a name of this process that starts with an underscore; returns that name.

    The umask narrows `mode`, as for any new file.
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
    """Puts `data` at `path`, atomically and for good."""
    os.replace(stage(path, data), path)
    sync_folder(path.parent)


def create(path: Path, data: bytes, mode: int = 0o666) -> bool:
    """Puts `data` at `path` unless something is there; whether it did. Of several processes that try, one does."""
    staged = stage(path, data, mode)
    try:
        os.link(staged, path)
    except FileExistsError:
        return False
    except (
        OSError
    ):  # a file system without hard links: not atomic there, so the users of `create` look again afterwards
        if path.exists():
            return False
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True
