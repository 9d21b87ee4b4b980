"""A trainer's data set, collator and model -> its micro-batches, and the made-up records that its checks run on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import datasets
from peft import PeftModel
from torch import nn
from transformers import Trainer

from hf_dp.errors import SelfCheckError
from hf_dp.per_example import (
    LENGTHS,
    MANY,
    ComparedLengths,
    Inventory,
    MicroBatch,
    Record,
    longest_taken,
    losses,
    synthetic_records,
)
from hf_dp.randomness import fork_forward_rng
from hf_dp.sampling import Collate, Collation, OfUnits, Records
from hf_dp.step import PrivateStep, largest_micro_batch
from hf_dp.training.host import PrivateTrainer
from hf_dp.training.look_through import complete_record
from hf_dp.training.objective import as_in_training
from hf_dp.training.of_the_host import OfTheHost
from hf_dp.training.passes import compared_lengths, subject_of, written_by

if TYPE_CHECKING:
    _Host = Trainer  # what a mixin may count on
else:
    _Host = object


class CollatedRecords(OfTheHost, _Host):
    """The part of `DPTrainerMixin` that deals with records."""

    model: Any  # always there once the host is built
    train_dataset: Any
    alone_because: str
    private_step: PrivateStep
    micro_batch_tokens: int | None
    _check_records: list[Record] | None
    _learnt: tuple[Any, Collation] | None = None

    def _base_model(self) -> nn.Module:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def _columns_for_model(self) -> tuple[Records, Collate]:
        """The training set and the collator, reduced to the columns that the model takes, as Trainer reduces them."""
        dataset, collate = self.train_dataset, self.data_collator
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        return dataset, collate if self.unit_rows == 1 else OfUnits(collate, self.unit_rows)

    def _collation(self) -> Collation:
        """How records become micro-batches; learnt on made-up ones, and again if the collator was replaced."""
        _, collate = self._columns_for_model()
        if self._learnt is None or self._learnt[0] is not self.data_collator:
            lengths = (*LENGTHS, 1, longest_taken(self._base_model()) or MANY)
            self._learnt = self.data_collator, Collation(collate, self._made_up_records(lengths))
        return self._learnt[1]

    def _synthetic_batches(self) -> list[MicroBatch]:
        """Made-up records of the user's schema: all in one batch first, then each collated alone."""
        return subject_of(cast(PrivateTrainer, self)).batches()

    def _made_up_records(self, lengths: Sequence[int] = LENGTHS) -> list[Record]:
        if self._check_records is not None:
            return self._check_records
        base = self._base_model()
        sizes = losses.sizes_of_records(type(base).__name__, getattr(base, "config", None))
        return synthetic_records(complete_record(self._columns_for_model()[0]), lengths=lengths, **sizes)

    def _compared_lengths(self, inventory: Inventory) -> ComparedLengths:
        make = self._made_up_records if self._check_records is None else None
        longest = longest_taken(self._base_model())
        return compared_lengths(subject_of(cast(PrivateTrainer, self)), inventory, make, longest)

    def _check_lengths_if_sharded(self) -> None:
        """An error if records of some length don't have the gradients in a batch that they have alone.

        Only of sharded weights: there all processes take as many passes, so none of them can give the examples of such
        a length a pass each.
        """
        compared = self.private_step.passes.compared
        if self.private_step.sharded and compared is not None and not compared.up_to(self._largest_batch()):
            raise SelfCheckError(
                "an example's gradient in a batch differs from its gradient alone for made-up records of some length: "
                "something couples longer or shorter records. Set per_device_train_batch_size=1, which gives each "
                "example a pass of its own"
            )

    def _written_by_a_pass(self) -> tuple[str, ...]:
        trainer = cast(PrivateTrainer, self)
        with as_in_training(trainer):
            return written_by(self.model, trainer.example_losses, self._synthetic_batches()[1])

    def _most_examples(self) -> int:
        """The most examples of one pass."""
        return 1 if self.alone_because else int(self.args.per_device_train_batch_size)

    def _largest_batch(self) -> MicroBatch:
        dataset, _ = self._columns_for_model()
        bounds = self._most_examples(), self.micro_batch_tokens
        with fork_forward_rng([self.args.device]):  # a collator may draw random numbers
            return self._collation()(largest_micro_batch(dataset, self._made_up_records, bounds, self._base_model()))[0]
