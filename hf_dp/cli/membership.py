"""A recipe -> models trained on random halves of its records, the losses of all models on all records, and an attack on
them.

A coin of its own decides for each record and model whether the record is in the model's data. Where it is not, an empty
record stands in its place. So N, q, sigma and T are the recipe's, and the guarantee is that of the recipe. No model is
saved.
"""

import dataclasses
import io
import os
import tempfile
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import typer

from hf_dp.accounting import spent
from hf_dp.audit import FEWEST_MODELS, Attack, Coins, Floats, ceilings, is_refuted, lira_scores, measured, plot_attacks
from hf_dp.cli.losses import row_losses
from hf_dp.errors import ConfigError
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.mechanism import Segment
from hf_dp.per_example import IGNORED
from hf_dp.recipe import TASKS, Recipe, task
from hf_dp.tables import console, print_table

NOT_COVERED = "These numbers were computed on the records themselves: no epsilon covers them."
IN_TURN = {
    "save_strategy": "no",
    "push_to_hub": False,
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "disable_tqdm": True,
}


class Trained(NamedTuple):
    """Losses of all models on all records, [M, n]; the steps that each model took; and delta."""

    losses: Floats
    segments: tuple[Segment, ...]
    delta: float


def attack_membership(recipe: Recipe, num_models: int, plot: Path | None = None) -> None:
    """Trains the models, then as many without noise on the same halves, attacks both, and prints what was found.

    Raises:
        ConfigError: fewer models than `FEWEST_MODELS`, or a recipe whose halves cannot be trained.
        typer.Exit: with status 1, where the claim is refuted.
    """
    refuse_attack(recipe, num_models)
    parts = task.prepare(recipe)
    included = np.random.default_rng().random((num_models, len(parts.train))) < 0.5
    private = _trained(recipe, included, parts)
    free = dataclasses.replace(
        recipe.privacy, target_epsilon=None, noise_multiplier=0.0, noise="gaussian", noise_schedule=None
    )
    scores = lira_scores(private.losses, included)
    found = measured(scores, included)
    control = found
    if recipe.privacy.noise_multiplier != 0:
        without_noise = _trained(dataclasses.replace(recipe, privacy=free), included, parts)
        control = measured(lira_scores(without_noise.losses, included), included)
    epsilon = spent(private.segments, private.delta).epsilon
    _print(found, control, private, epsilon)
    if plot is not None:
        plot_attacks({"without noise": control, "private": found}, [private.segments], private.delta, plot)
        print(f"Rates on logarithmic axes: {plot}")
    print(NOT_COVERED)
    if np.isfinite(epsilon) and is_refuted(scores, included, private.segments, private.delta):
        console().print(f"[bold red]REFUTED[/]: the claim of epsilon {epsilon:.4g}")
        raise typer.Exit(1)


def refuse_attack(recipe: Recipe, num_models: int = FEWEST_MODELS) -> None:
    """Refuses recipes whose records cannot be attacked one by one.

    Raises:
        ConfigError: names everything wrong at once.
    """
    wrong = []
    if num_models < FEWEST_MODELS:
        wrong.append(f"expected at least {FEWEST_MODELS} models, got {num_models}")
    if recipe.privacy.unit_column is not None:
        wrong.append("with a unit_column a member is a group of records: leave it out")
    if recipe.privacy.debug_seed is not None:
        wrong.append("with a debug_seed all models draw the same noise: leave it out")
    if not TASKS[recipe.model.task].has_labels:
        wrong.append(
            f"rows of the task {recipe.model.task} (pairs, conversations, texts to be masked) have no labels to empty, "
            "as those of non-members are: take a recipe of another task"
        )
    if os.environ.get("WORLD_SIZE", "1") != "1":
        wrong.append("each process would toss coins of its own: start one process")
    if wrong:
        raise ConfigError("Cannot attack this recipe: " + "; ".join(wrong) + ".")


def _trained(recipe: Recipe, included: Coins, parts: task.Parts) -> Trained:
    """Trains one model after the other, each in a temporary folder."""
    found, last = [], None
    noise = "without noise" if recipe.privacy.noise_multiplier == 0 else "private"
    recipe = dataclasses.replace(recipe, privacy=dataclasses.replace(recipe.privacy, budget_file=None))
    for number, members in enumerate(included, start=1):
        print(f"Model {number} of {len(included)}, {noise}, on {members.sum()} of {members.size} records.")
        fresh = task.prepare(recipe)._replace(train=_half(parts.train, members), validation=None)
        with tempfile.TemporaryDirectory() as folder:
            training = {**recipe.training, **IN_TURN, "output_dir": folder}
            trainer = task.build(dataclasses.replace(recipe, training=training), fresh)
            with redirect_stdout(io.StringIO()) if number > 1 else nullcontext():  # the plan is that of all
                trainer.train()
            last = read_ledger(Path(folder) / LEDGER_NAME)
            found.append(row_losses(trainer, parts.train))
    assert last is not None
    return Trained(np.stack(found), last.segments, last.header.delta)


def _half(rows: datasets.Dataset, members: Coins) -> datasets.Dataset:
    """The rows, with those of non-members emptied: one token and no target, so that loss and gradient are 0."""

    columns = rows.to_dict()
    for i in np.flatnonzero(~members):
        columns["input_ids"][i] = columns["input_ids"][i][:1]
        columns["labels"][i] = IGNORED if isinstance(columns["labels"][i], int) else [IGNORED]
    return datasets.Dataset.from_dict(columns, features=rows.features)


def _print(found: Attack, control: Attack, private: Trained, epsilon: float) -> None:
    most = ceilings(private.segments, private.delta, [a for a, _ in found.rates])
    rows = [("area under the curve", _words(found.area), _words(control.area), "")]
    for (a, rate), (_, free), bound in zip(found.rates, control.rates, most, strict=True):
        rows.append((f"true positives at {a:.1%} false ones", _words(rate), _words(free), f"{bound:.4f}"))
    print_table(
        "Membership inference",
        ("", "private", "without noise", f"epsilon {epsilon:.4g} allows at most"),
        rows,
    )
    if control.has_power:
        console().print(f"Positive control: without noise the area under the curve is {control.area.estimate:.3f}.")
    else:
        console().print(
            "No power: even without noise members are not told from others, so nothing follows for private models."
        )


def _words(interval: tuple[float, float, float]) -> str:
    estimate, low, high = interval
    return f"{estimate:.4f} [{low:.4f}, {high:.4f}]"
