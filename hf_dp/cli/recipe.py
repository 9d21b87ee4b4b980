"""A task -> a commented recipe to start from; or every key of recipes with its meaning and default."""

from pathlib import Path
from typing import Annotated

import typer


def recipe(
    task: Annotated[
        str, typer.Argument(help="Such as causal_lm, chat, preference; another name lists all.")
    ] = "causal_lm",
    keys: Annotated[bool, typer.Option("--keys", help="List every key, with its default and meaning.")] = False,
) -> None:
    """Prints a commented recipe to start from; with --keys, every key that recipes may have."""
    from hf_dp.cli.libraries import quiet
    from hf_dp.config import nearest
    from hf_dp.errors import ConfigError
    from hf_dp.recipe import TASKS, Wanted, starting_recipe

    if task not in TASKS:
        raise ConfigError(f"there is no task {task!r}{nearest(task, TASKS)}; the tasks are {', '.join(TASKS)}")
    if keys:
        quiet()
        _print_keys(task)
        return
    about, labels = TASKS[task], ("first class", "second class") if TASKS[task].has_classes else ()
    wanted = Wanted(about.base, "records.jsonl", task=task, templates=about.start, labels=labels)
    print(starting_recipe(wanted, Path("recipe.yaml")), end="")


def _print_keys(task: str) -> None:
    import textwrap

    from hf_dp.recipe import all_keys

    for key in all_keys(task):
        print(f"{key.name}: {'(must be given)' if key.default is None else key.default}")
        print(textwrap.fill(key.meaning, 80, initial_indent="    ", subsequent_indent="    "))
