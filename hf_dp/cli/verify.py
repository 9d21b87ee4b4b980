"""A model's folder or Hub name -> whether its card is true, as far as can be computed. Exit status 0 or 1. Imports no
torch.
"""

from typing import Annotated

import typer


def verify(
    model: Annotated[str, typer.Argument(help="A folder, or the name of a repository on the Hub.")],
) -> None:
    """Computes epsilon again from the record, and compares it with card, privacy.json and ledger."""
    from rich.console import Console
    from rich.table import Table

    from hf_dp.card import verify as checks_of
    from hf_dp.cli.hub import local_copy

    checks = checks_of(local_copy(model))
    table = Table("", "check", "found", title=model, title_justify="left")
    for check in checks:
        table.add_row("ok" if check.holds else "[bold red]NO[/]", check.name, check.found)
    console = Console()
    console.print(table)
    failed = [check.name for check in checks if not check.holds]
    if failed:
        console.print(f"[bold red]NOT VERIFIED[/]: {'; '.join(failed)}.")
        raise typer.Exit(1)
    console.print("Verified: the card says what the record says, and epsilon computed again agrees.")
