"""A model, its loss and made-up records -> the inventory of a training, and why a pass holds one example, where it does.

One example a pass is exact for any layer and any loss: autograd's gradient is the example's. It is slower than many at once, so it is
taken where many can't be: the loss is the model's own, or an operation has no rule for each example's gradient.
"""

from typing import Any

import torch

from hf_dp.errors import ConfigError, HfDpError
from hf_dp.per_example import Row, inventory_of_one, take_inventory
from hf_dp.training.objective import ALONE, first_line, refused_records


def inventory_and_reason(trainer: Any) -> tuple[list[Row], str]:
    """How each parameter's per-example gradient is formed, and why a pass holds one example; "" where it may hold many.

    Raises:
        UnsupportedParameterError, CaptureError: a trained parameter or a loss that one example a pass can't help either.
    """
    trainer.model.train()
    known = _known_beforehand(trainer)
    with trainer.compute_loss_context_manager():
        whole, one, *_ = trainer._synthetic_batches()
        if known:
            return inventory_of_one(trainer.model, one, trainer.example_losses), known
        try:
            return take_inventory(trainer.model, whole, trainer.example_losses), ""
        except (ConfigError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of whatever kind: stand-ins for parameters meet code that was not written for them
            try:
                rows = inventory_of_one(trainer.model, one, trainer.example_losses)
            except Exception as alone:
                raise error if isinstance(error, HfDpError) else refused_records(alone, one) from None
            return rows, first_line(error)


def _known_beforehand(trainer: Any) -> str:
    if trainer.objective.kind in ALONE:
        return f"{trainer.objective.kind} is of its whole batch"
    if trainer.mechanism.is_discrete:
        return "noise='discrete'"
    alone = trainer.args.per_device_train_batch_size == 1 and not trainer.args.torch_compile
    return "per_device_train_batch_size=1" if alone else ""
