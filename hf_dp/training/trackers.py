"""A private run -> its privacy settings in the trackers that Trainer reports to, and a warning where the signal drowns.

What is logged (epsilon, learning rate, signal to noise) reaches every tracker by itself. The settings of a run are put
where each tracker keeps them; the trackers' own names are of transformers 5 (`integrations/integration_utils.py`).
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_dp.mechanism import Mechanism
from hf_dp.tables import say
from hf_dp.training.host import PrivateTrainer

Settings = dict[str, object]
DROWNED = 0.5  # signal of all steps over their noise, below which a warning is due
FEWEST_STEPS = 10  # after which it may come

# the class of a tracker's callback -> what puts the settings into its run
TELL: dict[str, Callable[[Any, Settings], None]] = {
    "TensorBoardCallback": lambda callback, told: callback.tb_writer.add_text("privacy", json.dumps(told, indent=2)),
    "WandbCallback": lambda _, told: sys.modules["wandb"].config.update({"privacy": told}, allow_val_change=True),
    "TrackioCallback": lambda _, told: sys.modules["trackio"].config.update({"privacy": told}, allow_val_change=True),
    "MLflowCallback": lambda _, told: sys.modules["mlflow"].log_params({f"privacy.{k}": v for k, v in told.items()}),
}


class PrivacyInTrackers(TrainerCallback):
    """Tells the trackers at the start, and warns once where the released gradients are noise."""

    def __init__(self, trainer: PrivateTrainer) -> None:
        self.trainer, self.warned = trainer, False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the trackers' own, which began their runs."""
        if state.is_world_process_zero:
            told = settings(self.trainer._planned())
            for callback in self.trainer.callback_handler.callbacks:
                for each in type(callback).__mro__:
                    if each.__name__ in TELL and each.__module__.startswith("transformers."):
                        TELL[each.__name__](callback, told)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The warning, on the main process."""
        if not self.warned and state.is_world_process_zero and self.trainer._figures is not None:
            words = drowned(self.trainer._planned(), *self.trainer._figures.at_most())
            self.warned = bool(words)
            if words:
                say(words)


class MetricsFile(TrainerCallback):
    """Writes what is logged into a file of the output folder, one JSON object a line.

    What is logged before the training begins is written when it begins: a training that is refused leaves no file.
    """

    def __init__(self, name: str = "metrics.jsonl") -> None:
        self.name = name
        self._waiting: list[str] | None = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes what has waited."""
        waiting, self._waiting = self._waiting or [], None
        if state.is_world_process_zero:
            self._write(args, waiting)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds a line, on the main process."""
        if state.is_world_process_zero and logs:
            line = json.dumps({"step": state.global_step, **logs}) + "\n"
            if self._waiting is None:
                self._write(args, [line])
            else:
                self._waiting.append(line)

    def _write(self, args: TrainingArguments, lines: list[str]) -> None:
        if lines:
            with (Path(str(args.output_dir)) / self.name).open("a", encoding="utf-8") as file:
                file.writelines(lines)


def settings(m: Mechanism) -> Settings:
    """The privacy settings of a plan by name, all of them public."""
    return {
        "target_epsilon": m.target_epsilon,
        "delta": m.delta,
        "noise_multiplier": m.noise_multiplier,
        "clip_norm": m.clip_norm,
        "expected_batch_size": m.expected_batch_size,
        "sample_rate": m.sample_rate,
        "num_examples": m.num_examples,
        "num_steps": m.num_steps,
        "unit": m.unit,
        "relation": m.relation,
        "records_per_unit": m.records_per_unit,
        "contribution_bound": m.contribution_bound,
        "noise": m.noise,
    }


def drowned(m: Mechanism, num_steps: int, at_most: float) -> str:
    """What to change if the released gradients were noise so far; "" where they were not, or it is too early to tell.

    Args:
        m: the plan.
        num_steps: steps seen.
        at_most: an upper limit of the signal's norm over the noise's in a step.
    """
    in_all = at_most * math.sqrt(m.num_steps)
    if not m.is_private or num_steps < max(FEWEST_STEPS, m.num_steps / 10) or in_all >= DROWNED:
        return ""
    return (
        f"The signal drowns: in {num_steps:,} steps, the clipped gradients had at most {at_most:.2g} times the norm of "
        f"the noise. At this rate all {m.num_steps:,} steps together reach {in_all:.2g}, and little is learnt. What "
        "helps: a smaller clip_norm if gradients are shorter than it, a larger expected_batch_size with as many steps, "
        "fewer trained parameters (LoRA of a smaller rank), more records, or a larger epsilon."
    )
