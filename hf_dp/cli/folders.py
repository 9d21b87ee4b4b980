"""An output folder -> the same folder, or what was there before when the run never began."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hf_dp.errors import HfDpError


@contextmanager
def no_empty_folder(folder: Path) -> Iterator[None]:
    """Takes away the empty folders that a failed start has made: `folder` and its new parents, never anything with
    content.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except (HfDpError, KeyboardInterrupt):
        with suppress(OSError):  # not empty: something of worth is in it
            for path in made:
                if path.is_dir():
                    path.rmdir()
        raise
