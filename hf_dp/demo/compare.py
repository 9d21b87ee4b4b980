"""The demo's recipe -> the same LoRA fine-tuning twice, plain and private, each with its held-out loss along the way."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from transformers import Trainer

from hf_dp.recipe import Recipe, task
from hf_dp.step import PrivacySpent

LOSS = "eval_nats_per_character"


class Tuned(NamedTuple):
    """A finished fine-tuning; curves are (step, value) pairs, from step 0 on.

    Attributes:
        model: the model with its adapter.
        losses: held-out loss in nats a character of the target, the base model's first.
        epsilons: epsilon charged so far; empty for plain training.
        spent: what was charged in all; None for plain training.
    """

    model: Any
    losses: list[tuple[int, float]]
    epsilons: list[tuple[int, float]]
    spent: PrivacySpent | None


def tune_plain(recipe: Recipe, output_dir: Path) -> Tuned:
    """The recipe without its privacy: plain `Trainer`, batches of the very size that the private run expects."""
    keywords = task.trainer_keywords(recipe, task.prepare(recipe), output_dir)
    batch = {"per_device_train_batch_size": recipe.privacy.expected_batch_size}
    return _tuned(Trainer(**{**keywords, "args": dataclasses.replace(keywords["args"], **batch)}))


def tune_private(recipe: Recipe) -> Tuned:
    """The recipe as it stands; model, card and record lie in its output folder then."""
    trainer = task.build(recipe)
    return _tuned(trainer)._replace(spent=trainer.privacy_spent())


def _tuned(trainer: Trainer) -> Tuned:
    """Evaluates before, now and then in training as the recipe says, and at the end; saves the model."""
    before = trainer.evaluate()[LOSS]  # kept here: Trainer's history starts anew with train()
    trainer.train()
    last = (trainer.state.global_step, trainer.evaluate()[LOSS])
    trainer.save_model()
    epsilons = _curve(trainer, "epsilon")
    return Tuned(
        model=trainer.model,
        losses=sorted({0: before, **dict(_curve(trainer, LOSS)), **dict([last])}.items()),
        epsilons=[(0, 0.0), *epsilons] if epsilons else [],
        spent=None,
    )


def _curve(trainer: Trainer, name: str) -> list[tuple[int, float]]:
    """What was logged under `name`, the last of each step."""
    return sorted({int(entry["step"]): entry[name] for entry in trainer.state.log_history if name in entry}.items())
