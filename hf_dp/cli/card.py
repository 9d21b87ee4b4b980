"""A folder with its privacy.json -> README.md with the section, YAML block, tags and picture; or the registry's form.
Imports no torch.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hf_dp.card import Record


def card(
    folder: Annotated[Path, typer.Argument(help="The folder of a model saved by hf_dp.")],
    registry: Annotated[
        bool, typer.Option("--registry", help="Write a draft entry for the OpenDP registry of deployments beside it.")
    ] = False,
) -> None:
    """Writes the card again from privacy.json; text by others in README.md stays."""
    from hf_dp.card import REGISTRY, Record, read_record, write_card
    from hf_dp.errors import ConfigError

    stated = read_record(folder)
    try:
        record = Record.of(stated)
    except ConfigError as error:
        raise ConfigError(f"no card can be made of {folder / 'privacy.json'}: {error}") from None
    if registry:
        _write_entry(folder, record)
    write_card(folder, record)
    print(f"Card: {folder / 'README.md'}; `hf-dp verify {folder}` says whether it is true")
    if registry:
        print(f"Registry: {folder / REGISTRY}; fill in what only you know, then send it to")
        print("https://github.com/opendp/deployments-registry-data")


def _write_entry(folder: Path, record: "Record") -> None:
    """Writes the draft; one that is there already may be filled in, and stays."""
    from hf_dp import durable
    from hf_dp.card import REGISTRY, read_readme, registry_entry
    from hf_dp.errors import ConfigError

    if (folder / REGISTRY).exists():
        raise ConfigError(f"{folder / REGISTRY} exists already, and may be filled in: move it away for a new draft")
    entry = registry_entry(record, read_readme(folder / "README.md"), folder.resolve().name)
    durable.replace(folder / REGISTRY, entry.encode())
