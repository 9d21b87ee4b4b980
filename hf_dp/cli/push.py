"""A model's folder -> a repository on the Hub, after its card was verified. Nothing in the folder changes. Imports no torch."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_dp.cli.hub import first_line, status_of

STAYS = ["_*", "*/_*", "checkpoint-*", "runs/*", "*.lock", ".cache/*"]  # as Trainer: keys, and what only resuming needs


def push(
    folder: Annotated[Path, typer.Argument(help="The folder of a model saved by hf_dp.")],
    repository: Annotated[str, typer.Argument(help="Its name on the Hub: USER/MODEL.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository a private one.")] = False,
) -> None:
    """Verifies a model's card, then uploads the model with it, in one commit."""
    from hf_dp.card import verify
    from hf_dp.errors import ConfigError

    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}: expected that of a model saved by hf_dp")
    failed = [check.name for check in verify(folder) if not check.holds]
    if failed:
        raise ConfigError(
            f"nothing was uploaded, because the card is not what can be verified ({'; '.join(failed)}): see `hf-dp verify {folder}`"
        )
    print(f"Pushed: {_upload(folder, repository, private)}")


def _upload(folder: Path, repository: str, private: bool) -> Any:
    """The commit's address. What was uploaded before a failure is not sent again."""
    from huggingface_hub import HfApi

    from hf_dp.errors import ConfigError

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        message = "Upload model with its privacy card"
        return api.upload_folder(
            repo_id=repository, folder_path=folder, ignore_patterns=STAYS, commit_message=message
        ).commit_url
    except (
        Exception
    ) as error:  # huggingface_hub's own, or of the HTTP library beneath it, which changes with its version
        raise ConfigError(
            f"{folder} was not pushed to {repository}: {first_line(error)}. {_remedy(error)}. The folder is as it was; try again any time"
        ) from error


def _remedy(error: Exception) -> str:
    status = status_of(error)
    if status == 401:
        return "Log in with a token that may write: `hf auth login`, or the environment variable HF_TOKEN"
    if status in (403, 404):
        return "See that the name is USER/MODEL of an account of yours, and that the token may write there"
    if status is None:
        return "See that the network and the Hub can be reached, and that the name is USER/MODEL"
    return "The Hub refused"
