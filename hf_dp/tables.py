"""A plan, or any rows -> a table on the terminal. Imports no torch."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_dp.mechanism import Mechanism

NARROWEST = 132  # columns where nobody watches (a pipe, a log), so that a plan's rules stay on few lines


def console() -> Console:
    """A console as wide as the terminal, or wide enough for tables where the output is not a terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=max(NARROWEST, found.width))


def print_plan(title: str, rows: Sequence[tuple[str, str, str]], mechanism: Mechanism) -> None:
    """Every number of a plan with the rule that it came from, and a warning where no guarantee can be stated."""
    print_table(title, ("", "value", "rule"), rows)
    if not mechanism.is_private:
        console().print(
            "[bold red]NOT PRIVATE[/]: " + ("debug_seed is set" if mechanism.debug else "noise_multiplier is 0")
        )


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table of text as it is: square brackets are not taken for mark-up."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console().print(table)
