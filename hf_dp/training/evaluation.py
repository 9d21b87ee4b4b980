"""Evaluations of a private trainer -> numbers marked as not covered by privacy wherever they are written; no decisions.

An exact number on records that were not declared public carries a mark beside it: in logs and trackers, in
trainer_state.json, in what `evaluate` and `predict` return, and in the files of `save_metrics`. Its name does not
matter: every number that is not known to be harmless is marked.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

from transformers import Trainer, TrainerCallback

from hf_dp.config import PrivacyConfig
from hf_dp.mechanism import METRICS
from hf_dp.step import SIGNAL_TO_NOISE
from hf_dp.training.deciders import nothing_decided, refuse_deciders

if TYPE_CHECKING:
    _Host = Trainer  # what a mixin may count on
else:
    _Host = object
Metrics: TypeAlias = dict[str, Any]  # name -> number, as Trainer keeps them
EVAL_MARK = "eval_not_covered_by_privacy"
# Epsilon as if the number of steps so far had been fixed beforehand. It stands beside "epsilon", which is the plan's.
STEPS_TAKEN = "epsilon_of_steps_taken"
# Numbers that tell nothing about a record: they follow from the schedule, the clock or the mechanism.
HARMLESS = {"epsilon", STEPS_TAKEN, "epoch", "step", "learning_rate", "grad_norm", "loss", "train_samples"}
HARMLESS |= {*METRICS, SIGNAL_TO_NOISE}  # these follow from what was released
CLOCK = ("_runtime", "_samples_per_second", "_steps_per_second", "_model_preparation_time", "_compilation_time")


def mark(metrics: Metrics, *, public_eval: bool) -> None:
    """Adds the mark, unless each metric is harmless, or is of an evaluation on data declared public."""
    telling = [name for name in metrics if name not in HARMLESS and not name.endswith(CLOCK)]
    if any(not (public_eval and name.startswith("eval_")) for name in telling):
        metrics[EVAL_MARK] = 1.0


class MarkedEvaluation(_Host):
    """The part of `DPTrainerMixin` that deals with evaluation."""

    privacy: PrivacyConfig
    _evaluates_public = False

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`; marked, unless it is on the trainer's `eval_dataset` and that was declared public."""
        with self._on(eval_dataset):
            return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.predict`; its metrics are marked like those of `evaluate`."""
        with self._on(test_dataset):
            return super().predict(test_dataset, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.evaluation_loop`, through which `evaluate` and `predict` go."""
        self._before_evaluation()
        output = super().evaluation_loop(*args, **kwargs)
        if output.metrics and not self._evaluates_public:
            output.metrics[EVAL_MARK] = 1.0
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`, with the mark if it is needed."""
        mark(logs, public_eval=self.privacy.public_eval)
        super().log(logs, *args, **kwargs)

    def log_metrics(self, split: str, metrics: Metrics) -> None:
        """As `Trainer.log_metrics`, with the mark if it is needed."""
        super().log_metrics(split, self._marked(metrics))

    def save_metrics(self, split: str, metrics: Metrics, combined: bool = True) -> None:
        """As `Trainer.save_metrics`, with the mark if it is needed."""
        super().save_metrics(split, self._marked(metrics), combined)

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """As `Trainer.add_callback`.

        Raises:
            UnsupportedOptionError: it decides by evaluation data that were not declared public.
        """
        refuse_deciders([callback], public_eval=self.privacy.public_eval)
        super().add_callback(callback)

    def _before_evaluation(self) -> None:
        """To be overridden: called before an evaluation reads the weights."""

    def _marked(self, metrics: Metrics) -> Metrics:
        marked = dict(metrics)
        mark(marked, public_eval=self.privacy.public_eval)
        return marked

    @contextmanager
    def _on(self, dataset: object) -> Iterator[None]:
        """An evaluation on `dataset`, as `evaluate` takes it."""
        own = self.eval_dataset
        members = list(own.values()) if isinstance(own, dict) else [own]
        is_own = dataset is None or isinstance(dataset, str) or any(dataset is d for d in (own, *members))
        is_own = is_own or (isinstance(dataset, dict) and all(any(d is m for m in members) for d in dataset.values()))
        outer, public = self._evaluates_public, self.privacy.public_eval and is_own
        self._evaluates_public = public
        try:
            with nullcontext() if public else nothing_decided(self):
                yield
        finally:
            self._evaluates_public = outer
