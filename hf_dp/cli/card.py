"""A folder with its privacy.json -> README.md with the section, YAML block, tags and picture. Imports no torch."""

from pathlib import Path
from typing import Annotated

import typer


def card(
    folder: Annotated[Path, typer.Argument(help="The folder of a model saved by hf_dp.")],
) -> None:
    """Writes the card again from privacy.json; text by others in README.md stays."""
    from hf_dp.card import Record, read_record, write_card
    from hf_dp.errors import ConfigError

    stated = read_record(folder)
    try:
        record = Record.of(stated)
    except ConfigError as error:
        raise ConfigError(f"no card can be made of {folder / 'privacy.json'}: {error}") from None
    write_card(folder, record)
    print(f"Card: {folder / 'README.md'}; `hf-dp verify {folder}` says whether it is true")
