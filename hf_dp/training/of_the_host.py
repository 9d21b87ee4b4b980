"""What a trainer of this library states of the Trainer that it makes private: settings, loss, rows of a record."""

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from transformers import TrainingArguments

from hf_dp.mechanism import UNIT
from hf_dp.per_example import Batch, Record
from hf_dp.sampling import feature_length


class OfTheHost:
    """The part of `DPTrainerMixin` that is overridden where the host has a loss, batches or settings of its own.

    Attributes:
        config_class: of the host's arguments, for a trainer that is given none.
        unit_rows: k: the collator makes k rows of each record, which are clipped as one example. The batches that
            `example_losses` is given then lead with the examples, [B, k, ...] (see `per_example.units`).
        host_losses: (model, batch) -> the host's own loss for each of many examples, [B]. It is compared with the
            host's `compute_loss`; where they differ, or it raises a KeyError, that one is trained, one example a pass.
        row: what a record is, as the card names it.
        length_of: record -> how many tokens it takes in a pass.
    """

    config_class: type[TrainingArguments] = TrainingArguments
    unit_rows = 1
    row: str = UNIT
    host_losses: Callable[[nn.Module, Batch], Tensor] | None = None
    length_of: Callable[[Record], int] = staticmethod(feature_length)

    @classmethod
    def unfit_settings(cls, args: TrainingArguments) -> Iterator[str]:
        """One line for each setting of the host's own that cannot be private, with a remedy."""
        return iter(())

    @classmethod
    def adjusted(cls, args: TrainingArguments) -> TrainingArguments:
        """Settings of the host's own that privacy decides, put into this copy of the user's."""
        return args
