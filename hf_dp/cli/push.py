"""A model's folder -> a repository on the Hub with the files of the model, after its card was verified. Imports no
torch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import Annotated

import typer

from hf_dp.cli.hub import first_line, status_of


def push(
    folder: Annotated[Path, typer.Argument(help="The folder of a model saved by hf_dp.")],
    repository: Annotated[str, typer.Argument(help="Its name on the Hub: USER/MODEL.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository a private one.")] = False,
) -> None:
    """Verifies a model's card, then uploads the model with it in one commit. Other files are left behind, and named."""
    from hf_dp.card import WEIGHTS, leaving, verify
    from hf_dp.errors import ConfigError

    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}: expected that of a model saved by hf_dp")
    failed = [check.name for check in verify(folder) if not check.holds]
    if failed:
        raise ConfigError(
            f"nothing was uploaded, because the card is not what can be verified ({'; '.join(failed)}): see `hf-dp "
            f"verify {folder}`"
        )
    found = leaving(folder)
    needed = [name for name in ("README.md", "privacy.json") if name not in found.files]
    if not any(fnmatchcase(name, pattern) for name in found.files for pattern in WEIGHTS):
        needed.append(WEIGHTS[-1] if "adapter_config.json" in found.files else WEIGHTS[0])
    if needed:
        raise ConfigError(
            f"nothing was uploaded, because {folder} has no {', '.join(needed)} of its own (symbolic links are not "
            "followed): save the model there, and push again"
        )
    if found.behind:
        print(found.words)
    with _named(folder, repository):
        print(f"Pushed: {_upload(folder, repository, private, found.files)}")


@contextmanager
def _named(folder: Path, repository: str) -> Iterator[None]:
    """The card's code loads the model by its name on the Hub, from now on, or only within where the upload fails."""
    from hf_dp import durable
    from hf_dp.card import Record, read_record, write_card

    readme = folder / "README.md"
    before = readme.read_bytes()
    write_card(folder, Record.of(read_record(folder)), name=repository)
    try:
        yield
    except BaseException:
        durable.replace(readme, before)
        raise


def _upload(folder: Path, repository: str, private: bool, files: Sequence[str]) -> str:
    """The commit's address. After a failure, files that were already uploaded are not sent again."""
    from huggingface_hub import HfApi

    from hf_dp.errors import ConfigError

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        message = "Upload model with its privacy card"
        return api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[escape(name) for name in files],
            commit_message=message,
        ).commit_url
    except (
        Exception
    ) as error:  # huggingface_hub's own, or of the HTTP library beneath it, which changes with its version
        raise ConfigError(
            f"{folder} was not pushed to {repository}: {first_line(error)}. {_remedy(error)}. The folder is as it was; "
            "try again any time"
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
