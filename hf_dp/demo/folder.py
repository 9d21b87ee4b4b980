"""A path -> the demo's own folder, empty and marked. Nothing that the demo did not make is ever deleted."""

import shutil
from pathlib import Path

from hf_dp.errors import ConfigError

MARK = ".made-by-hf-dp-demo"


def fresh_folder(folder: Path) -> bool:
    """Makes `folder`, empty except for the mark. Returns whether an earlier demo's folder was deleted for it.

    Raises:
        ConfigError: `folder` exists, is not empty and has no mark: it belongs to somebody else.
    """
    before = (folder / MARK).is_file() and not folder.is_symlink()
    if before:
        shutil.rmtree(folder)
    elif folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise ConfigError(
            f"{folder}: expected no such folder, an empty one, or an earlier demo's (which holds {MARK}), got "
            "something else; move it away"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("The demo deletes this folder when it runs again: copy what you want to keep.\n")
    return before
