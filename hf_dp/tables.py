"""A plan, or any rows -> a table on the terminal. Imports no torch."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_dp.mechanism import Mechanism

FIRST = (  # of a plan: what matters before all else
    "epsilon",
    "delta",
    "steps T",
    "noise multiplier sigma",
    "learning rate",
    "noise : signal, a step",
    "noise : signal, all steps",
)


def console() -> Console:
    """A console as wide as the terminal; elsewhere (a pipe, a log) of 80 columns, or as many as COLUMNS says."""
    return Console()


def say(words: str) -> None:
    """Prints sentences as they are, in lines as long as the console is wide."""
    console().print(words, markup=False, highlight=False)


def print_plan(title: str, rows: Sequence[tuple[str, str, str]], mechanism: Mechanism) -> None:
    """Every number of a plan with the rule that it came from, what matters first; and a warning where no guarantee can
    be stated.
    """
    first = sorted((row for row in rows if row[0] in FIRST), key=lambda row: FIRST.index(row[0]))
    print_table(title, ("", "value", "rule"), first, [row for row in rows if row[0] not in FIRST])
    if not mechanism.is_private:
        console().print(
            "[bold red]NOT PRIVATE[/]: " + ("debug_seed is set" if mechanism.debug else "noise_multiplier is 0")
        )


def print_table(title: str, columns: Sequence[str], *parts: Sequence[Sequence[object]]) -> None:
    """A table of text as it is: square brackets are not taken for mark-up. A line stands between its parts."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for rows in parts:
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        table.add_section()
    console().print(table)
