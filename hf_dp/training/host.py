"""What a private Trainer offers to the functions of this room that deal with one part of it."""

from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from hf_dp.config import PrivacyConfig
from hf_dp.mechanism import Mechanism
from hf_dp.per_example import Batch, MicroBatch, Record
from hf_dp.sampling import Collate, Collation, Records
from hf_dp.step import PrivateRun, PrivateStep, ReleasedFigures


class Objective(NamedTuple):
    """Which loss of an example is trained.

    Attributes:
        kind: a key of `losses.LOSSES`, or one of `objective`'s YOURS, FUNCTION, OWN and HOST.
        rule: why this one, for the plan.
        tied: for `compute_loss_func`: the names of the model's outputs that have one row an example.
    """

    kind: str
    rule: str
    tied: frozenset[str] = frozenset()


class PrivateTrainer(Protocol):
    """`DPTrainerMixin` on a Trainer; see there what its attributes are."""

    args: TrainingArguments
    model: nn.Module
    optimizer: Any
    optimizer_cls_and_kwargs: Any
    rate_by_rule: str
    privacy: PrivacyConfig
    mechanism: Mechanism | None
    objective: Objective
    alone_because: str
    unit_rows: int
    host_losses: Any
    class_weights: Tensor | None
    compute_loss_func: Any
    label_names: list[str]
    micro_batch_tokens: int | None
    train_dataset: Any
    eval_dataset: Any
    state: Any
    about: dict[str, str]
    hub_model_id: Any
    processing_class: Any
    accelerator: Accelerator
    callback_handler: CallbackHandler
    private_step: PrivateStep
    _run: PrivateRun | None
    _figures: ReleasedFigures | None

    def example_losses(self, model: nn.Module, inputs: Batch) -> Tensor:
        """One loss an example, [B]."""

    def compute_loss_context_manager(self) -> AbstractContextManager[object]:
        """Training's precision, as Trainer has it."""

    def is_world_process_zero(self) -> bool:
        """Whether this is the main process."""

    def add_callback(self, callback: Any) -> None:
        """As Trainer's."""

    def remove_callback(self, callback: type[TrainerCallback]) -> None:
        """As Trainer's."""

    def _prepare_inputs(self, inputs: Batch) -> Batch: ...

    def _planned(self) -> Mechanism: ...

    def _base_model(self) -> nn.Module: ...

    def _collation(self) -> Collation: ...

    def _columns_for_model(self) -> tuple[Records, Collate]: ...

    def _made_up_records(self) -> list[Record]: ...

    def _synthetic_batches(self) -> list[MicroBatch]: ...

    def _most_examples(self) -> int: ...
