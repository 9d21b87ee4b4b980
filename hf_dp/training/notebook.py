"""Trainer's table in a notebook -> the same with what may be seen of a private training: epsilon, and no empty columns.

Importing this needs IPython, as transformers' own table does, which is there wherever that table is.
"""

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils.notebook import NotebookProgressCallback, NotebookTrainingTracker

EMPTY = "No log"  # transformers' word for a loss that was not logged; a private one is not, unless with noise
SHOWN = {"loss": "Training Loss", "learning_rate": "Learning Rate", "signal_to_noise": "Signal to Noise"}


class EpsilonTable(NotebookTrainingTracker):
    """The table beneath the progress bar: a line has the epsilon that is claimed, and what was logged."""

    epsilon = ""

    def write_line(self, values: dict[str, Any]) -> None:
        """Adds a line, or changes the last one if it is of the same step."""
        super().write_line({k: v for k, v in values.items() if v != EMPTY} | {"Epsilon": self.epsilon})


class EpsilonInNotebook(NotebookProgressCallback):
    """Transformers' progress bar and table for notebooks, with an `EpsilonTable`."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins a table whose columns are those of its first line."""
        super().on_train_begin(args, state, control, **kwargs)
        self.training_tracker = EpsilonTable(state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes a line, unless evaluations do, and notes the epsilon for their lines."""
        if self.training_tracker is None or not logs or "epsilon" not in logs:
            return
        self.training_tracker.epsilon = f"{logs['epsilon']:.3f}"
        if args.eval_strategy == "no" and "train_runtime" not in logs:
            shown = {name: logs[key] for key, name in SHOWN.items() if key in logs}
            self.training_tracker.write_line({"Step": state.global_step, **shown})
