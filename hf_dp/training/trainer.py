"""`DPTrainer`: Trainer with a private `training_step`. This file wires; each formula is in the module that it calls."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from hf_dp import accounting
from hf_dp.config import AuditConfig, PrivacyConfig
from hf_dp.errors import ConfigError
from hf_dp.ledger import checkpoint_to_resume
from hf_dp.mechanism import Mechanism
from hf_dp.per_example import Batch, Record, Report, Row, self_check, trains_shards
from hf_dp.sampling import (
    DRAW_NUMBER,
    Container,
    DrawnRecords,
    LogicalBatchCollator,
    PoissonSampler,
    Records,
    logical_batches,
    sealed_micro_batches,
    taken_by_the_model,
    tokens_of_a_pass,
)
from hf_dp.step import (
    Passes,
    Place,
    PrivacySpent,
    PrivateRun,
    PrivateStep,
    ReleasedFigures,
    Session,
    Spending,
    WeightGuard,
    refuse_foreign_parameters,
)
from hf_dp.training import earlier, shards
from hf_dp.training import objective as objectives
from hf_dp.training.canaries import Canaries, begin_audit, refuse_audit
from hf_dp.training.cards import audit_result, keeping_the_users_words, write_card
from hf_dp.training.described import described, save_classes
from hf_dp.training.evaluation import STEPS_TAKEN, MarkedEvaluation
from hf_dp.training.fitted import fill_in, with_clip_norm
from hf_dp.training.given import refuse_other_types
from hf_dp.training.guarded import GuardedWeights
from hf_dp.training.host import Objective
from hf_dp.training.hub_upload import only_the_model_leaves
from hf_dp.training.inputs import CollatedRecords
from hf_dp.training.look_through import refuse_unusable_records
from hf_dp.training.options import check_options, positional_names, refuse_model, without_batch_clipping
from hf_dp.training.overrides import refuse_order
from hf_dp.training.planning import groups_of, plan_training, refuse_other_records
from hf_dp.training.progress import print_summary, show_privacy
from hf_dp.training.settled import FirstCallback, Settled, SettledPasses, plan_inputs
from hf_dp.training.sharded_states import ShardedStates

NOT_RELEASED = ("loss", "train_loss", "total_flos")  # computed on private examples without noise: never logged


class DPTrainerMixin(SettledPasses, GuardedWeights, ShardedStates, MarkedEvaluation, CollatedRecords):
    """Makes a `Trainer` subclass private: `class MyTrainer(DPTrainerMixin, Seq2SeqTrainer)`.

    Args:
        *args: as the host class takes them.
        privacy: what the run must guarantee.
        micro_batch_tokens: the most padded tokens of one micro-batch, which also holds at most
            `per_device_train_batch_size` examples. It affects speed and memory, never the result.
        check_records: a few public records for the self-check, if none can be made up from the data set's columns.
        audit: puts canaries among the records; `audit_result` then gives the lower bound on epsilon that they show.
        class_weights: a public number for each class, by which its examples' losses are multiplied before clipping.
        **kwargs: as the host class takes them. `compute_loss_func(outputs, labels)` is called with the outputs and
            labels of one example at a time, with a leading dimension of 1, and returns its loss: [1] or a scalar.

    Attributes:
        mechanism: what will be run, calibrated; None without a training set.
        private_step: takes each step; exists if there is a training set.
        objective: which loss of an example is trained, and why.
        about: public things about the run for the card's table of settings, by name, such as
            `trainer.about["training data"] = "Clinic notes, 2024"`.
        alone_because: why each example has a pass of its own; "" if a pass may hold several.
        rate_by_rule: where the learning rate is from, if the user left it alone (see `fitted`); "" or "given" if it
            is theirs.
        unit_rows: a class attribute, k: the collator makes k rows of each record, which are clipped as one example. The
            batches that `example_losses` is given then lead with the examples, [B, k, ...].

    Raises:
        UnsupportedOptionError: options that would void the guarantee; names all of them.
        UnsupportedParameterError: trainable parameters whose gradients are not exact, even with one example a pass.
        ConfigError: no loss of an example is known, or the plan is impossible, such as q > 1 or an epsilon out of
            reach.
    """

    step_class: type[PrivateStep] = PrivateStep  # the audit's broken controls put a class of their own here
    private_step: PrivateStep
    model: Any  # always there once the host is built
    optimizer: Any
    args: Any
    compute_loss_func: Any
    objective: Objective  # chosen at construction with a train_dataset

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_order(cls, DPTrainerMixin)

    def __init__(
        self,
        *args: Any,
        privacy: PrivacyConfig,
        micro_batch_tokens: int | None = None,
        check_records: list[Record] | None = None,
        audit: AuditConfig | None = None,
        class_weights: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        options = {**dict(zip(positional_names(type(self), after=DPTrainerMixin), args, strict=False)), **kwargs}
        refuse_other_types(privacy, options.get("args"), audit, micro_batch_tokens, check_records)
        training = options.get("args") or self.config_class(output_dir="tmp_trainer")
        others = {k: v for k, v in options.items() if k != "args"} | {"trainer": type(self)}
        check_options(training, public_eval=privacy.public_eval, **others)
        options["args"] = self.adjusted(without_batch_clipping(training))
        refuse_audit(audit, privacy)
        self.privacy = privacy = with_clip_norm(privacy, training, others)
        self._canaries = Canaries(audit)
        self.micro_batch_tokens = micro_batch_tokens
        self._check_records = check_records
        self.class_weights = objectives.class_weights(class_weights)
        self.alone_because = ""
        self.about: dict[str, str] = {}
        self._settled: Settled | None = None
        self._run: PrivateRun | None = None
        self._guard = WeightGuard()
        self._figures: ReleasedFigures | None = None
        given_data = options.get("train_dataset")
        self._groups = groups_of(given_data, privacy)
        self.mechanism = plan_training(privacy, training, given_data, self._groups, self._canaries.num, self.row)
        with shards.around_the_host(options):
            super().__init__(**options)
        shards.shard(self)
        if self.model is not options.get("model"):  # the host loaded it, or put adapters on it
            refuse_model(self.model)
        if self.optimizer is not None:
            refuse_foreign_parameters(self.model, self.optimizer)
        self.rate_by_rule = fill_in(self)
        show_privacy(self)
        if self.mechanism is not None:
            refuse_other_records(self, len(cast(Records, given_data)), self._groups)
            self._planned_for = plan_inputs(self)
            self._settle()

    # ---- what a user asks -----------------------------------------------------------------------------------------

    def privacy_spent(self) -> PrivacySpent:
        """(epsilon, delta) claimed of the training in this output folder: 0 before the first step, then the plan's.

        Raises:
            LedgerError: another session's ledger lies in the folder, and is damaged.
        """
        if self._run is None:
            return Spending.noted(self._planned(), Path(self.args.output_dir)).total()
        return self._run.spent()

    def audit_result(self) -> dict[str, object]:
        """What the canaries show, as in privacy.json: a lower bound on epsilon, its confidence, ceiling, and counts.

        Raises:
            AuditError: no audit was asked for, or nothing was trained yet.
        """
        return audit_result(self._running(), self._canaries.counts())

    def inventory(self) -> list[Row]:
        """Each trainable parameter, the operations that use it, and how its per-example gradient is formed.

        Raises:
            UnsupportedParameterError: naming all parameters without an exact rule.
        """
        self._settle()
        return self._inventory

    def self_check(self) -> Report:
        """Compares a batch of made-up records with each record alone. Runs at the start of every training.

        Raises:
            SelfCheckError: something couples the examples of a batch.
        """
        with objectives.as_in_training(self), taken_by_the_model():
            batches, clip_norm = self._synthetic_batches(), self._planned().clip_norm
            what = self.model, batches, self.example_losses, clip_norm, self._factors_of
            self._check_lengths_if_sharded()
            return self_check(*what, one_a_pass=bool(self.alone_because))

    # ---- the loss --------------------------------------------------------------------------------------------------

    def example_losses(self, model: nn.Module, inputs: Batch) -> Tensor:
        """One loss an example, [B]. Override it for a task of your own.

        Each loss must be a function of its example alone.

        Raises:
            ConfigError: the batch has no labels.
        """
        return objectives.losses_of(self, self.objective.kind, model, inputs)

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """As the host's, but for evaluation only. With `compute_loss_func`: the mean of its losses, one an example."""
        if self.compute_loss_func is None:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        loss, outputs = objectives.mean_of_the_users(self, model, inputs)
        return (loss, outputs) if return_outputs else loss

    # ---- seams of Trainer ------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Container]:
        """Poisson draws: this process's slice of each, in micro-batches. The loader must not be sharded again."""
        mechanism = self._planned()
        dataset, _ = self._columns_for_model()
        sampler = PoissonSampler(
            self._groups or mechanism.num_examples,
            lambda number: (self._run or mechanism).at(number).sample_rate,
            accounting.epoch_length(self.privacy, mechanism.num_examples),
            key=self._run.sampling_key if self._run is not None else None,
            process_index=self.args.process_index,
            num_processes=self.args.world_size,
        )
        pass_cost = tokens_of_a_pass(self.args.device)
        bounds = self._most_examples(), self.micro_batch_tokens, pass_cost, self.length_of
        cut = self._canaries.collated(LogicalBatchCollator(self._collation(), *bounds))
        records = DrawnRecords(self._canaries.among(dataset), mechanism.num_examples)
        return logical_batches(records, sampler, cut, self.args, self.accelerator.device)

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, trial: object = None, **kwargs: Any
    ) -> TrainOutput:
        """As `Trainer.train`. First the self-check runs, the ledger is opened, and the plan is printed.

        Raises:
            SelfCheckError: something couples examples.
            LedgerError: the output folder holds the ledger of another run, or lacks the one that a resumed run needs.
            ConfigError: the target epsilon is already spent, or `trial` is given.
            BudgetError: the budget file does not hold this run.
        """
        if trial is not None:
            raise ConfigError(
                "hyperparameter search spends privacy that nobody accounts for: train once, with fixed settings"
            )
        self._planned()
        self._settle()
        self._refuse_side_doors()
        refuse_unusable_records(self)
        self.self_check()
        folder = Path(self.args.output_dir)
        checkpoint = checkpoint_to_resume(folder, resume_from_checkpoint)
        earlier.refuse_again(self.model, folder, self.train_dataset, self._planned())
        if before := earlier.told(self.model, folder):
            self.about[earlier.EARLIER] = before
        begun = earlier.weights_of(self.model)
        self._run = self._opened(folder, checkpoint)
        first = FirstCallback(lambda: cast(Settled, self._settled).note_model(self))
        self.callback_handler.callbacks.insert(0, first)
        try:
            self._figures = ReleasedFigures(self._planned())
            print_summary(self)
            weigh = begin_audit(self, self._canaries, checkpoint)
            output = super().train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint), **kwargs)
            self._guard.check()
        finally:
            self.callback_handler.callbacks.remove(first)
            self._guard.leave()
            self._run.close()
            earlier.note(self.model, begun, folder, self._run.spent(), self._planned(), self.train_dataset)
            self.private_step.forget()
        self._canaries.weigh(weigh)
        self._run.settle()
        metrics = {k: v for k, v in output.metrics.items() if k not in NOT_RELEASED}
        return output._replace(training_loss=float("nan"), metrics=metrics)

    def training_step(self, model: nn.Module, inputs: Container, num_items_in_batch: object = None) -> Tensor:
        """One private step: see `PrivateStep`, which writes `p.grad`. Returns 0, because the loss is private."""
        run = self._running()
        self._begin_pass()
        self._settle_again_if_changed()
        step = self.private_step
        add_canaries = lambda total: self._canaries.add_to(total, inputs, run.level.clip_norm)  # noqa: E731
        released = step(run, lambda: sealed_micro_batches(inputs), inputs[DRAW_NUMBER], beside=add_canaries)
        self._canaries.observe(released, run.level)
        if self._figures is not None:
            self._figures.add(released, run.level, step.sum.coordinates)
        self._guard.released()
        if run.exhausted:
            self.control.should_training_stop = True
        return torch.zeros((), device=self.args.device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`, without numbers that were not released, and with those that were, and epsilon so far."""
        released = self._figures.take() if self._figures is not None and "loss" in logs else {}
        for name in NOT_RELEASED:
            logs.pop(name, None)
        logs.update(released)
        if self.mechanism is not None and self._run is not None:
            logs |= {"epsilon": self._run.spent().epsilon, STEPS_TAKEN: self._run.spending().epsilon_of_steps_taken()}
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, with the card and privacy.json beside the weights."""
        super().save_model(output_dir, _internal_call=_internal_call)
        self._write_card(Path(output_dir or self.args.output_dir))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As `Trainer.create_model_card`, but what somebody wrote stays; then our part is written again."""
        with keeping_the_users_words(Path(self.args.output_dir), mine=self.is_world_process_zero()):
            super().create_model_card(*args, **kwargs)
        self._write_card(Path(self.args.output_dir))

    def write_card(self) -> None:
        """Writes the output folder's card and privacy.json again, as after an evaluation whose results it may state."""
        self._write_card(Path(self.args.output_dir))

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """B, the expected batch size over all processes."""
        return self.privacy.expected_batch_size

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        super()._save_checkpoint(model, trial)
        self._seal(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As Trainer's, but only the model is uploaded, whole and of one step.

        The checkpoint is sealed before, and the upload is waited for before the ledger grows.
        """
        self._seal(Path(checkpoint_folder))
        self._write_card(Path(self.args.output_dir))
        with only_the_model_leaves():
            super()._push_from_checkpoint(checkpoint_folder)
        self._finish_current_push()

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.push_to_hub`; of the output folder only the files of a model are uploaded."""
        with only_the_model_leaves():
            return super().push_to_hub(*args, **kwargs)

    def _seal(self, checkpoint: Path) -> None:
        if self.args.should_save and self._run is not None:
            self._run.seal_checkpoint(checkpoint)

    def _planned(self) -> Mechanism:
        if self.mechanism is None:
            raise ConfigError("there is nothing to plan or train without a train_dataset")
        return self.mechanism

    def _opened(self, folder: Path, checkpoint: Path | None) -> PrivateRun:
        """The run of one call of `train`, open; as `PrivateRun.open`."""
        place = Place(folder, self.args.process_index, self.args.world_size, self.privacy.budget_file)
        epoch, seed = accounting.epoch_length(self.privacy, self._planned().num_examples), self.privacy.debug_seed
        session = Session(self.train_dataset, checkpoint, epoch, seed, self._run is not None, trains_shards(self.model))
        return PrivateRun.open(self._planned(), place, session)

    def _running(self) -> PrivateRun:
        if self._run is None:
            raise ConfigError("training_step belongs to train(): outside of it there is no ledger to charge")
        return self._run

    def _passes(self) -> Passes:
        """How a step's passes are made."""
        return Passes(
            example_losses=lambda model, batch: self.example_losses(model, batch),  # looked up late: it may be replaced
            device=self.args.device,
            to_device=self._prepare_inputs,
            precision=self.compute_loss_context_manager,
            factors_of=self._factors_of,
            made_up=lambda: self._synthetic_batches()[1],
            largest=self._largest_batch,
            alone=bool(self.alone_because),
            copied=self._written_by_a_pass() if self.alone_because else (),
            collated_alone=lambda records: self._collation().alone(records),
            compared=None if self.alone_because else self._compared_lengths(self._inventory),
        )

    def _write_card(self, folder: Path) -> None:
        if self.mechanism is not None and self._run is not None and self.is_world_process_zero() and folder.is_dir():
            save_classes(self, folder)
            told, counts = described(self), self._canaries.counts()
            write_card(self._run, folder, public_eval=self.privacy.public_eval, audit=counts, described=told)


class DPTrainer(DPTrainerMixin, Trainer):
    """`transformers.Trainer` with differential privacy; see `DPTrainerMixin` for what it takes."""


class DPSeq2SeqTrainer(DPTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with differential privacy: `predict_with_generate` works in evaluation."""
