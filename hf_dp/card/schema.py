"""A folder -> the JSON of its privacy.json; and what keeps that from having the form that privacy.schema.json says."""

import json
from importlib.resources import files
from pathlib import Path
from typing import cast

from hf_dp.errors import ConfigError

SCHEMA = "privacy.schema.json"
SCHEMA_VERSION = 4
PRIVACY_JSON = "privacy.json"


def schema_problems(stated: object) -> list[str]:
    """What keeps `stated` from being a privacy.json of a known version: every place, with what is wrong."""
    from jsonschema import Draft202012Validator

    version = stated.get("schema_version") if isinstance(stated, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        return [f"schema_version is {version}, at most {SCHEMA_VERSION} is known here: use a newer version of hf_dp"]
    schema = json.loads(files("hf_dp.card").joinpath(SCHEMA).read_text(encoding="utf-8"))
    wrong = Draft202012Validator(schema).iter_errors(stated)
    return sorted(f"{'.'.join(map(str, e.absolute_path)) or 'the record'}: {_shortened(e.message)}" for e in wrong)


def read_record(folder: Path) -> object:
    """The JSON in privacy.json as it stands, whatever it says; `Record.of` reads it.

    Raises:
        ConfigError: the file is missing, or is not JSON.
    """
    path = folder / PRIVACY_JSON
    try:
        text = path.read_text(encoding="utf-8")
        # NaN and infinities are not JSON: as words they fail the schema at their place
        return cast(object, json.loads(text, parse_constant=str, object_pairs_hook=_without_repetition))
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} has no {PRIVACY_JSON}: expected the folder of a model saved by hf_dp") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = [name for name, _ in pairs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{', '.join(repeated)} stands there more than once, and readers would disagree on its value")
    return dict(pairs)


def _shortened(message: str) -> str:
    return message if len(message) <= 120 else f"{message[:70]} ... {message[-45:]}"
