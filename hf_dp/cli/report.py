"""A model's folder or Hub name -> an HTML page of what was trained, claimed and checked. Imports no torch."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    model: Annotated[str, typer.Argument(help="A folder, or the name of a repository on the Hub.")],
    output: Annotated[Path | None, typer.Option(help="The page; default: NAME-privacy.html, here.")] = None,
) -> None:
    """Verifies a model's card, and writes a page for people who must know what it promises."""
    from hf_dp import durable
    from hf_dp.card import CARD_FILES, DESCRIPTIONS, Record, page, read_record, verify
    from hf_dp.cli.hub import local_copy
    from hf_dp.errors import ConfigError

    folder = local_copy(model, [*CARD_FILES, *DESCRIPTIONS])
    name = Path(model).resolve().name if Path(model).is_dir() else model
    written = output or Path(f"{name.replace('/', '_')}-privacy.html")
    checks = verify(folder)
    record = Record.of(read_record(folder)) if checks[0].holds else None
    text = page(folder, name, record, checks)
    try:
        durable.replace(written, text.encode())
    except OSError as error:
        raise ConfigError(f"cannot write the report {written}: {error.strerror or error}") from error
    failed = [check.name for check in checks if not check.holds]
    print(f"Report: {written}")
    if failed:
        print(f"NOT VERIFIED: {'; '.join(failed)}.")
        raise typer.Exit(1)
