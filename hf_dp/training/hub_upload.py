"""A folder that Trainer uploads -> on the Hub, only those of its files that `card.leaving` lets go."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from glob import escape
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from hf_dp.card import leaving
from hf_dp.errors import ConfigError


class ModelOnly(HfApi):
    """`HfApi` whose `upload_folder` sends only what `leaving` allows, whatever its caller chose, and reports it."""

    def upload_folder(self, *, folder_path: str | Path, path_in_repo: str | None = None, **kwargs: Any) -> Any:
        """As `HfApi.upload_folder`. A checkpoint (uploaded to a folder in the repository) keeps what resuming needs."""
        found = leaving(Path(folder_path), resumable=path_in_repo is not None)
        if found.behind:
            _tell_once(f"{folder_path}: {found.words}")
        chosen = {"allow_patterns": [escape(name) for name in found.files], "ignore_patterns": None}
        return super().upload_folder(folder_path=folder_path, path_in_repo=path_in_repo, **kwargs | chosen)


@lru_cache(maxsize=64)
def _tell_once(words: str) -> None:
    print(words)


@contextmanager
def only_the_model_leaves() -> Iterator[None]:
    """Within, Trainer's uploads go through `ModelOnly`.

    This is a work-around: Trainer uploads its whole output folder, and has no option for leaving files out
    (transformers 5.0 to 5.23, `push_to_hub` and `_push_from_checkpoint` in
    https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/trainer.py).

    Raises:
        ConfigError: this version of Trainer uploads in an unknown way; nothing was uploaded.
    """
    import transformers.trainer

    names, api = vars(transformers.trainer), ModelOnly(library_name="transformers")
    ours = {"hf_api": lambda: api, "upload_folder": api.upload_folder}
    theirs = {name: names[name] for name in ours if name in names}
    if not theirs:
        raise ConfigError(
            "this version of transformers uploads in a way that hf_dp does not know, so that what leaves could not be "
            "chosen: nothing was uploaded. Save the model and use `hf-dp push FOLDER USER/MODEL`"
        )
    names.update({name: ours[name] for name in theirs})
    try:
        yield
    finally:
        names.update(theirs)
