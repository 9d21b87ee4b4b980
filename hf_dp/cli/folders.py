"""An output folder -> the same folder; if the run never began, the empty folders made for it are removed again."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hf_dp.errors import HfDpError


@contextmanager
def no_empty_folder(folder: Path) -> Iterator[None]:
    """Removes the empty folders that a failed start has made: `folder` and its new parents. Nothing with content is
    removed.
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
