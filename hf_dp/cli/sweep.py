"""A recipe and a grid -> the best of a random number of private trainings, its card with the epsilon of the choice."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hf_dp.sweep import Asked, SweepResult, Tell


def sweep(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file. Its target_epsilon is the sweep's total.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, as many as you like.")] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(help="section.key=value,value,... once for each setting; trials draw one value of each."),
    ] = None,
    trials: Annotated[float, typer.Option(help="Trainings on average; the number itself is drawn.")] = 10.0,
    distribution: Annotated[
        str, typer.Option(help="Of that number: geometric, logarithmic, or poisson (which may be 0).")
    ] = "geometric",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep in the output folder.")] = False,
) -> None:
    """Chooses settings: trains combinations of them and keeps the model with the least validation loss.

    The recipe's privacy.target_epsilon is the total: what the selected model's card says, the selection included, is at
    most that. All trials have the same, smaller epsilon. Only OUT/selected may be published; all else in the folder is
    private.
    """
    from hf_dp.cli.folders import no_empty_folder
    from hf_dp.cli.libraries import quiet
    from hf_dp.sweep import Asked, combinations

    quiet()
    found = combinations(recipe, overrides or [], grid or [])
    texts = {
        "recipe": recipe.read_text(encoding="utf-8"),
        "overrides": overrides or [],
        "grid": grid or [],
        "trials": trials,
        "distribution": distribution,
    }
    with no_empty_folder(found[0].recipe.output_dir):
        _swept(Asked(found, distribution, trials, texts), resume=resume)


def _swept(asked: "Asked", *, resume: bool) -> None:
    from hf_dp.sweep import derivation, run
    from hf_dp.sweep import folder as folders
    from hf_dp.tables import print_table

    if resume:
        state = folders.resume(asked.folder, asked.texts)
        print(f"Going on: {len(folders.finished(asked.folder))} trials have ended.")
    else:
        folders.refuse_used(asked.folder)
        plan = run.planned(asked)
        print_table("The sweep", ("", "value", "rule"), derivation(plan, len(asked.combinations)))
        state = run.begun(asked, plan)
        print(
            "Begun. Should it be cut off: the same command with --resume goes on. A trial that was cut off is run anew."
        )
    with _progress() as tell:
        found = run.run(asked, state, tell)
    if found is None:
        print(
            "The number of trials drawn is 0: no model was selected, and none is. (geometric and logarithmic numbers "
            "are 1 or more.) Another sweep is a second one on the same data, and what both tell adds up."
        )
        raise typer.Exit(1)
    _show(asked.folder, found)


@contextmanager
def _progress() -> "Iterator[Tell]":
    """A progress bar for the trial that runs. How many trials there will be, and what they show, stays unknown."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("step {task.completed} of {task.total}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bars: dict[int, TaskID] = {}

        def tell(number: int, step: int, planned: int) -> None:
            if number not in bars:
                bars[number] = progress.add_task(f"trial {number}", total=planned)
            progress.update(bars[number], completed=step)

        yield tell


def _show(folder: Path, found: "SweepResult") -> None:
    from hf_dp.accounting import round_up
    from hf_dp.sweep import SELECTED
    from hf_dp.tables import print_table

    keys = list(found["trials"][0]["combination"])
    rows = [
        (
            f"{number + 1}{' (selected)' if number == found['selected'] else ''}",
            *(trial["combination"][key] for key in keys),
            f"{trial['noise_multiplier']:.5g}",
            trial["num_steps"],
            f"{trial['epsilon']:.4g}",
            *(_loss(trial["curve"][at][2]) for at in (0, len(trial["curve"]) // 2, -1)),
        )
        for number, trial in enumerate(found["trials"])
    ]
    losses = ("loss before", "half-way", "after")
    columns = ("trial", *(key.partition(".")[2] for key in keys), "sigma", "steps", "epsilon", *losses)
    print_table(f"Convergence on the validation set. {found['note']}", columns, rows)
    total, together = round_up(found["epsilon_selected"]), round_up(found["epsilon_all_published"])
    print(
        f"Selected model: epsilon {total:.5g} at delta {found['delta']:g}, the selection included. "
        + (f"Were all {len(rows)} trials published: {together:.5g}." if len(rows) > 1 else "It was the only trial.")
    )
    print(f"Model: {folder / SELECTED}\nCard: {folder / SELECTED / 'README.md'}")
    print(f"Not for publication: {folder / 'sweep.json'}, {folder / 'sweep.png'}, {folder / 'trials'}")


def _loss(value: float | None) -> str:
    return "no number" if value is None else f"{value:.4g}"
