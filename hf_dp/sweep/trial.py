"""One combination and a folder -> its trained model there, and what it showed on the validation set during training."""

import contextlib
import gc
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_dp.errors import AccountingError
from hf_dp.mechanism import Segment
from hf_dp.recipe import Recipe, task
from hf_dp.sweep.plan import segments_of
from hf_dp.sweep.results import Measured
from hf_dp.training import STEPS_TAKEN

POINTS = 8  # evaluations in a trial, unless the recipe says otherwise


class _Steps(TrainerCallback):
    """Reports how far a trial is, but nothing of what it shows."""

    def __init__(self, tell: Callable[[int, int], None]) -> None:
        self._tell = tell

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """A noisy step was taken."""
        self._tell(state.global_step, state.max_steps)


def as_trial(recipe: Recipe, target_of_one: float, folder: Path) -> Recipe:
    """The recipe as a trial runs it: with its part of epsilon, in its folder, without checkpoints or trackers."""
    training = {"eval_strategy": "no", **recipe.training}
    if training["eval_strategy"] == "no":
        training |= {"eval_strategy": "steps", "eval_steps": 1 / POINTS}
    training |= {"output_dir": str(folder), "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    return replace(
        recipe, privacy=replace(recipe.privacy, target_epsilon=target_of_one), training=MappingProxyType(training)
    )


def run(
    trial: Recipe, kinds: tuple[tuple[Segment, ...], ...], tell: Callable[[int, int], None] = lambda *_: None
) -> Measured:
    """Trains, evaluates and saves. The output of transformers goes to log.txt beside the model.

    Args:
        trial: as `as_trial` makes it.
        kinds: the steps that the plan allows for a trial; those of this one must be among them.
        tell: called with (steps taken, steps planned) after each step.

    Returns:
        What it measured.

    Raises:
        HfDpError: whatever stops a training.
    """
    folder = trial.output_dir
    folder.mkdir(parents=True)
    with (folder / "log.txt").open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        trainer = task.build(trial, callbacks=[_Steps(tell)])
        mechanism = trainer.mechanism
        assert mechanism is not None  # a recipe always has a training set
        if segments_of(mechanism) not in kinds:
            raise AccountingError(
                f"this trial would charge {segments_of(mechanism)}, which is none of the planned {kinds}: nothing was "
                "run. Begin the sweep anew, in another folder, with the versions of the libraries that are installed "
                "now"
            )
        before = task.evaluate(trainer)
        trainer.train()
        trainer.save_model()
        task.tell_class_names(trainer, trial)
        after = task.evaluate(trainer)
        curve = [(0, 0.0, before["loss"]), *_curve(trainer.state.log_history)]
        spent = trainer.privacy_spent()
    found: Measured = {
        "score": _finite(after["loss"]),
        "metrics": {name: _finite(value) for name, value in after.items()},
        "curve": [(step, epsilon, _finite(loss)) for step, epsilon, loss in curve],
        "epsilon": spent.epsilon,
        "num_steps": spent.num_steps,
        "noise_multiplier": mechanism.noise_multiplier,
    }
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def _curve(history: list[dict[str, float]]) -> list[tuple[int, float, float]]:
    """(step, epsilon, loss) of the evaluations after the first step, one for each step."""
    found = {
        e["step"]: (int(e["step"]), e[STEPS_TAKEN], e["eval_loss"])
        for e in history
        if "eval_loss" in e and STEPS_TAKEN in e
    }
    return [found[step] for step in sorted(found)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
