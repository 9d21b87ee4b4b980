"""An output folder -> the same folder, or nothing: what a failed start has made is removed again."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hf_dp.errors import ConfigError, HfDpError


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


@contextmanager
def appearing_whole(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` at the end; after any exception nothing of it is left.

    Raises:
        ConfigError: `target` exists already.
    """
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} exists already, and nothing is written over: name another folder by --output")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"_{target.name}.", dir=target.parent))
    try:
        yield unfinished
        mask = os.umask(0)
        os.umask(mask)
        unfinished.chmod(0o777 & ~mask)  # mkdtemp lets nobody else in
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def refuse_unverified(folder: Path, what: str) -> None:
    """Refuses to go on with a model whose card is not true; `what` was to be done.

    Raises:
        ConfigError: a check of the card fails, or the folder has no privacy.json.
    """
    from hf_dp.card import verify

    failed = [check.name for check in verify(folder) if not check.holds]
    if failed:
        raise ConfigError(
            f"nothing was {what}, because the card is not what can be verified ({'; '.join(failed)}): see `hf-dp "
            f"verify {folder}`; where only the card is spoilt, `hf-dp card {folder}` writes it again"
        )
