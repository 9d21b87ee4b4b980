"""A trainer's settings, options and records -> its mechanism and its passes; a check that records stay as planned."""

from functools import partial
from typing import Any

from torch import nn
from transformers import TrainingArguments

from hf_dp import accounting
from hf_dp.config import PrivacyConfig
from hf_dp.errors import ConfigError, UnsupportedOptionError
from hf_dp.mechanism import SHARED, Mechanism
from hf_dp.per_example import CompiledBlocks, Inventory, Pass, per_example_factors
from hf_dp.randomness import require_cryptography
from hf_dp.sampling import Groups, groups_by
from hf_dp.step import is_sharded
from hf_dp.training.host import PrivateTrainer


def plan_training(
    privacy: PrivacyConfig, args: TrainingArguments, dataset: Any, groups: Groups | None, num_canaries: int, row: str
) -> Mechanism | None:
    """The mechanism of a training on `dataset`, with room for `num_canaries`; None without a data set.

    Args:
        privacy: what the run must guarantee.
        args: the `TrainingArguments`.
        dataset: the training set.
        groups: of its records, if groups are protected as one.
        num_canaries: slots that the draw has besides the records.
        row: what a record is, as the card names it.

    Raises:
        ConfigError, AccountingError: as `accounting.plan_mechanism`; or the noise needs a library that is not
            installed.
    """
    if dataset is None:
        return None
    if privacy.noise != "gaussian":
        require_cryptography()
    units = num_canaries + (len(dataset) if groups is None else groups.num_groups)
    epochs, steps = args.num_train_epochs, args.max_steps
    row = SHARED if groups is not None and groups.shared else row
    return accounting.plan_mechanism(privacy, units, num_train_epochs=epochs, max_steps=steps, row=row)


def groups_of(dataset: object, privacy: PrivacyConfig) -> Groups | None:
    """What is drawn of these records by itself; None where each record is.

    Raises:
        ConfigError: as `groups_by`.
    """
    return groups_by(dataset, privacy.unit_column, privacy.records_per_unit, privacy.contribution_bound)


def refuse_other_records(trainer: PrivateTrainer, planned: int, groups: Groups | None) -> None:
    """Compares the records that a trainer has prepared with those that were planned for.

    Some trainers pack, filter or sort their records.

    Raises:
        ConfigError: `trainer.train_dataset` does not have `planned` records, or they form other groups.
    """
    name, found = type(trainer).__name__, len(trainer.train_dataset)
    if found != planned:
        raise ConfigError(
            f"{name} made {found:,} training records out of the {planned:,} that it was given (by packing or "
            "filtering), so the plan would not hold: prepare the data first, and pass them as they are to be sampled"
        )
    column, again = trainer.privacy.unit_column, groups_of(trainer.train_dataset, trainer.privacy)
    if groups is not None and again is not None and groups.differ(again):
        raise ConfigError(
            f"{name} put the training records into another order, so that unit_column={column!r} would group others: "
            "prepare the data first"
        )


def passes_for(model: nn.Module, inventory: Inventory, args: TrainingArguments, *, alone_because: str) -> Pass:
    """What forms the per-example factors; with compiled blocks if `TrainingArguments` ask for them.

    Raises:
        UnsupportedOptionError: as `CompiledBlocks`; or an option does not go together with compiling.
    """
    if not args.torch_compile:
        return partial(per_example_factors, forms=inventory.forms)
    against = {
        f"one example a pass ({alone_because})": bool(alone_because),
        "a sharded base": is_sharded(model),
    }
    if any(against.values()):
        names = ", ".join(name for name, there in against.items() if there)
        raise UnsupportedOptionError(f"torch_compile cannot be combined with {names}: leave one of them off")
    checkpointing = args.gradient_checkpointing or any(
        getattr(module, "gradient_checkpointing", False) for module in model.modules()
    )
    return CompiledBlocks(model, inventory, args.torch_compile_backend or "inductor", checkpointing)
