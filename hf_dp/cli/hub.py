"""A folder or a repository's name -> a local folder with its small files; and the Hub's errors as one line with a
remedy.
"""

from collections.abc import Sequence
from pathlib import Path

from hf_dp.card import CARD_FILES


def local_copy(model: str, files: Sequence[str] = CARD_FILES) -> Path:
    """The folder itself, or a copy of the repository's `files`.

    Raises:
        ConfigError: `model` is neither, saying whether the name, the token or the network is the cause; or the
            repository has no privacy.json.
    """
    from hf_dp.errors import ConfigError

    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        copy = Path(snapshot_download(model, allow_patterns=list(files)))
    except Exception as error:  # huggingface_hub's own, or of the HTTP library beneath it
        status, remedy = status_of(error), "See that the network and the Hub can be reached"
        if status in (401, 403, 404):  # the Hub answers alike, so that nobody learns which names exist
            remedy = (
                "See that the name is right. A private or gated one needs a token that may read it: `hf auth login`, "
                "or the environment variable HF_TOKEN"
            )
        raise ConfigError(
            f"{model} is neither a folder nor a repository that can be reached: {first_line(error)}. {remedy}"
        ) from error
    if not (copy / CARD_FILES[0]).is_file():
        raise ConfigError(f"{model} has no {CARD_FILES[0]}: expected the repository of a model saved by hf_dp")
    return copy


def first_line(error: Exception) -> str:
    """What went wrong, without the lines that follow."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status with which the Hub answered, or None where no answer came."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None:  # huggingface_hub wraps what went wrong in an error about its cache
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            return error.response.status_code
        error = error.__cause__
    return None
