"""The demo's recipe -> the same LoRA fine-tuning twice, plain and private, with the held-out loss along the way."""

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
        losses: held-out loss in nats per character of the target; the first is the base model's.
        epsilons: epsilon charged so far; empty for plain training.
        spent: what was charged in all; None for plain training.
    """

    model: Any
    losses: list[tuple[int, float]]
    epsilons: list[tuple[int, float]]
    spent: PrivacySpent | None


def tune_plain(recipe: Recipe, output_dir: Path) -> Tuned:
    """The recipe without privacy: plain `Trainer`, with batches of the private run's expected size."""
    keywords = task.trainer_keywords(recipe, task.prepare(recipe), output_dir)
    batch = {"per_device_train_batch_size": recipe.privacy.expected_batch_size}
    return _tuned(Trainer(**{**keywords, "args": dataclasses.replace(keywords["args"], **batch)}))


def tune_private(recipe: Recipe) -> Tuned:
    """The recipe as it stands; model, card and record are then in its output folder."""
    trainer = task.build(recipe)
    return _tuned(trainer)._replace(spent=trainer.privacy_spent())


def _tuned(trainer: Trainer) -> Tuned:
    """Evaluates before, during (as the recipe says) and after training; saves the model."""
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
    """The values logged under `name`; the last one of each step."""
    return sorted({int(entry["step"]): entry[name] for entry in trainer.state.log_history if name in entry}.items())
