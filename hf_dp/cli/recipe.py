"""A task -> a commented recipe to start from; or every key of recipes with its meaning and default."""

from pathlib import Path
from typing import Annotated

import typer

START = {
    "causal_lm": {"target": "{text}"},
    "sequence_classification": {"text": "{text}", "label": "label"},
    "preference": {"prompt": "{prompt}", "chosen": "{chosen}", "rejected": "{rejected}"},
}


def recipe(
    task: Annotated[str, typer.Argument(help="causal_lm, sequence_classification or preference.")] = "causal_lm",
    keys: Annotated[bool, typer.Option("--keys", help="List every key, with its default and meaning.")] = False,
) -> None:
    """Prints a commented recipe to start from; with --keys, every key that recipes may have."""
    from hf_dp.cli.libraries import quiet
    from hf_dp.config import nearest
    from hf_dp.errors import ConfigError
    from hf_dp.recipe import Wanted, starting_recipe

    if task not in START:
        raise ConfigError(f"there is no task {task!r}{nearest(task, START)}; the tasks are {', '.join(START)}")
    if keys:
        quiet()
        _print_keys(task)
        return
    labels = ("first class", "second class") if task == "sequence_classification" else ()
    wanted = Wanted("openai-community/gpt2", "records.jsonl", task=task, templates=START[task], labels=labels)
    print(starting_recipe(wanted, Path("recipe.yaml")), end="")


def _print_keys(task: str) -> None:
    import textwrap

    from hf_dp.recipe import all_keys

    for key in all_keys(task):
        print(f"{key.name}: {'(must be given)' if key.default is None else key.default}")
        print(textwrap.fill(key.meaning, 80, initial_indent="    ", subsequent_indent="    "))
