"""A trainer -> what a person sees: the plan with its rules before the first step, and epsilon on the progress bar."""

import math
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_dp import accounting
from hf_dp.tables import print_plan, say
from hf_dp.training.earlier import EARLIER
from hf_dp.training.fitted import left_alone, rate_in_force
from hf_dp.training.host import PrivateTrainer
from hf_dp.training.trackers import PrivacyInTrackers

BAR = f"{ProgressCallback.__module__}.ProgressCallback"
TABLE = "transformers.utils.notebook.NotebookProgressCallback"
QUIET = ("warning", "error", "critical")  # values of TrainingArguments.log_level


class EpsilonProgress(ProgressCallback):
    """Trainer's progress bar, with the epsilon that is claimed behind it."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Puts epsilon on the bar, and writes what was logged in a line above it."""
        if self.training_bar is None or not logs:
            return
        if "epsilon" in logs:
            self.training_bar.set_postfix_str(f"epsilon {logs['epsilon']:.3f}")
        shown = [f"{name} {_short(value)}" for name, value in logs.items() if name != "total_flos"]
        self.training_bar.write(f"step {state.global_step}: {', '.join(shown)}")


def _short(value: Any) -> str:
    """Four digits of a number; the beginning of a long text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:100]


def show_privacy(trainer: PrivateTrainer) -> None:
    """Puts epsilon on Trainer's own progress bar, in a notebook in its table, and the privacy settings in its trackers;
    a user's own bar stays.
    """
    trainer.add_callback(PrivacyInTrackers(trainer))
    own = {f"{type(c).__module__}.{type(c).__name__}": type(c) for c in trainer.callback_handler.callbacks}
    for name, ours in ((BAR, lambda: EpsilonProgress), (TABLE, _for_a_notebook)):
        if name in own:
            trainer.remove_callback(own[name])
            trainer.add_callback(ours())


def _for_a_notebook() -> type[TrainerCallback]:
    from hf_dp.training.notebook import EpsilonInNotebook

    return EpsilonInNotebook


def print_summary(trainer: PrivateTrainer) -> None:
    """Prints every derived number with the rule that it came from, on the main process, before a training.

    `TrainingArguments(log_level="error")` (or "warning", "critical") leaves it out, unless there is no guarantee.
    """
    quiet = trainer.args.log_level in QUIET and trainer._planned().is_private
    if quiet or not trainer.is_world_process_zero():
        return
    print_plan_of(trainer, "Private training")


def print_plan_of(trainer: PrivateTrainer, title: str) -> None:
    """The plan with its rules, and what would help where the signal drowns in the noise."""
    args, mechanism = trainer.args, trainer._planned()
    rows = accounting.derivation(
        trainer.privacy, mechanism, num_train_epochs=args.num_train_epochs, max_steps=args.max_steps
    )
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    louder = accounting.advice.loudness_rows(mechanism, trained)
    print_plan(title, [*rows, *louder, _learning_rate(trainer), *_rows_of_passes(trainer)], mechanism)
    warning = accounting.advice.warning(mechanism, trained)
    if warning:
        say(warning)


def _learning_rate(trainer: PrivateTrainer) -> tuple[str, str, str]:
    args, schedule = trainer.args, trainer.args.lr_scheduler_type
    rule = f"{trainer.rate_by_rule or 'given'}; schedule: {getattr(schedule, 'value', schedule)}"
    if not trainer.rate_by_rule and left_alone(args, "learning_rate") and rate_in_force(trainer) == args.learning_rate:
        kind = type(args).__name__
        rule = f"{kind}' default" if kind.endswith("s") else f"{kind}'s default"
        rule += ", for training without noise; with noise, 10 to 100 times as much is usual"
    return "learning rate", f"{rate_in_force(trainer):g}", rule


def _earlier(trainer: PrivateTrainer) -> list[tuple[str, str, str]]:
    before, _, adds = trainer.about.get(EARLIER, "").partition("; ")
    return [(EARLIER, before, f"of the weights that this one starts from; {adds}")] if before else []


def _rows_of_passes(trainer: PrivateTrainer) -> list[tuple[str, str, str]]:
    """What is trained, and in which passes: (name, value, rule)."""
    args, mechanism = trainer.args, trainer._planned()
    parameters = [p.numel() for p in trainer.model.parameters() if p.requires_grad]
    ranks = args.world_size
    of_each = mechanism.records_per_unit
    share = mechanism.largest.expected_batch_size * of_each / ranks
    examples = f"{'greatest ' if mechanism.levels else ''}B{' k' if of_each > 1 else ''}"
    most = trainer._most_examples()
    micro = math.ceil(share / most)
    budget = f", at most {trainer.micro_batch_tokens} padded tokens each" if trainer.micro_batch_tokens else ""
    loss, why_alone = trainer.objective, trainer.alone_because
    return [
        ("loss of an example", loss.kind, loss.rule),
        *_earlier(trainer),
        *([("examples of a pass", "1", f"slower, and exact: {why_alone}")] if why_alone else []),
        ("trainable parameters", f"{sum(parameters):,}", f"in {len(parameters)} tensors"),
        (
            "micro-batches a step",
            f"{'up to ' if of_each > 1 else ''}about {micro}",
            f"ceil({examples} / {ranks} process{'es' * (ranks > 1)} / {most} examples){budget}; speed only",
        ),
        ("max_grad_norm", "0", "clipping is per example (clip_norm); Trainer's batch clipping is off"),
    ]
