"""The demo's recipe -> the same LoRA fine-tuning twice, plain and private, and what was measured along the way."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import Trainer, TrainerCallback

from hf_dp.recipe import Recipe, task
from hf_dp.step import PrivacySpent

LOSS = "eval_nats_per_character"
PLAIN_RATE = 3e-3
Curve = list[tuple[int, float]]
Measure = Callable[[Any], float]


class Tuned(NamedTuple):
    """A finished fine-tuning; curves are (step, value) pairs, from step 0 on.

    Attributes:
        model: the model with its adapter.
        losses: held-out loss in nats per character of the target; the first is the base model's.
        measured: the second measure, at the same steps.
        spent: what was charged in all; None for plain training.
    """

    model: Any
    losses: Curve
    measured: Curve
    spent: PrivacySpent | None


def tune_plain(recipe: Recipe, output_dir: Path, measure: Measure) -> Tuned:
    """The same records, steps and batch size without privacy: plain `Trainer` on all weights, as is usual for a model
    of this size, at a rate that suits them.
    """
    whole = dataclasses.replace(recipe, lora=None)
    keywords = task.trainer_keywords(whole, task.prepare(whole), output_dir)
    batch = {
        "per_device_train_batch_size": recipe.privacy.expected_batch_size,
        "learning_rate": PLAIN_RATE,
    }
    beside = _Beside(measure)
    made = Trainer(**{**keywords, "args": dataclasses.replace(keywords["args"], **batch)}, callbacks=[beside])
    return _tuned(made, beside)


def tune_private(recipe: Recipe, measure: Measure) -> Tuned:
    """The recipe as it stands; model, card and record are then in its output folder."""
    beside = _Beside(measure)
    trainer = task.build(recipe, callbacks=[beside])
    return _tuned(trainer, beside)._replace(spent=trainer.privacy_spent())


class _Beside(TrainerCallback):
    """Takes the measure after each evaluation."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self.found: dict[int, float] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.found[int(state.global_step)] = self.measure(model)


def _tuned(trainer: Trainer, beside: _Beside) -> Tuned:
    """Evaluates before, during (as the recipe says) and after training; saves the model."""
    before = trainer.evaluate()[LOSS]  # kept here: Trainer's history starts anew with train()
    trainer.train()
    last = (trainer.state.global_step, trainer.evaluate()[LOSS])
    trainer.save_model()
    return Tuned(
        model=trainer.model,
        losses=sorted({0: before, **_logged(trainer, LOSS), **dict([last])}.items()),
        measured=sorted(beside.found.items()),
        spent=None,
    )


def _logged(trainer: Trainer, name: str) -> dict[int, float]:
    """The values logged under `name`; the last one of each step."""
    return {int(entry["step"]): entry[name] for entry in trainer.state.log_history if name in entry}
