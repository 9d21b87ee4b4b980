"""A trainer's class -> why it can't be private, or methods that it overrides in vain: private training calls none."""

from collections.abc import Iterator

from transformers import Trainer

from hf_dp.errors import ConfigError, UnsupportedOptionError

_DRAWS = "batches must be Poisson draws of train_dataset, which no other sampler or loader makes"
_MEET = (
    "micro-batches are brought to the device as Trainer does it, and in it records would meet; drop it, and change a "
    "record in data_collator, which is given each by itself"
)
# method of Trainer -> why it is not called, and what to do instead
NEVER_CALLED = {
    "compute_loss": (
        "training takes one loss an example, not one of a batch; override example_losses(model, inputs), which "
        "returns [batch], and compute_loss then serves evaluation alone (for weights of classes: "
        "DPTrainer(class_weights=[...]))"
    ),
    "get_train_dataloader": f"{_DRAWS}; drop it, choose records in train_dataset, and transform them in data_collator",
    "_get_dataloader": f"{_DRAWS}; drop it, or override get_eval_dataloader, which serves evaluation alone",
    "_get_train_sampler": f"{_DRAWS}; drop it, and choose records in train_dataset",
    "get_batch_samples": f"{_DRAWS}; drop it",
    "_prepare_inputs": _MEET,
    "_prepare_input": _MEET,
    "training_step": "a private step clips, sums and releases by itself; drop it, or move what it does into a callback",
}
ANSWERS = "its loss is of pairs, whose answers lie in several rows of a batch; clipping bounds the two as one in"
# words in the names of trl's trainers -> why they are not private by this mixin, and what to do instead
OF_TRL = {
    ("GRPO", "RLOO", "Online", "NashMD", "XPO", "PPO", "GMPO", "PAPO", "MiniLLM", "Distill", "GKD", "GOLD"): (
        "it trains on texts that the model writes while it trains, and compares them over a group; clipping bounds "
        "records. Let a model write the texts beforehand, and train on those that you choose as records, with "
        "hf_dp.DPSFTTrainer (the prompt's number as PrivacyConfig(unit_column=...))"
    ),
    ("KTO",): (
        "its loss has a term over the whole batch (the divergence of answers from others' prompts); clipping bounds a "
        "record's own loss. Train on pairs of answers instead, with hf_dp.DPDPOTrainer"
    ),
    ("DPO", "CPO", "ORPO", "TPO", "BCO"): f"{ANSWERS} hf_dp.DPDPOTrainer: use that",
    ("Reward",): f"{ANSWERS} hf_dp.DPRewardTrainer: use that",
    ("",): (
        "its loss is of a batch, or its batches are other ones than draws of train_dataset; clipping bounds a record's "
        "own loss. Give the records to DPTrainer, and override example_losses(model, inputs)"
    ),
}


def refuse_order(trainer: type, mixin: type) -> None:
    """Refuses a class in which Trainer stands before the mixin, whose methods would then never be called.

    Raises:
        ConfigError: with the order that works.
    """
    host = next((c for c in trainer.__mro__ if issubclass(c, Trainer) and not issubclass(c, mixin)), None)
    if host is not None and trainer.__mro__.index(host) < trainer.__mro__.index(mixin):
        raise ConfigError(
            f"{trainer.__name__} would train without privacy: put the mixin first, as class {trainer.__name__}("
            f"{mixin.__name__}, {host.__name__})"
        )


def unfit(trainer: type) -> str:
    """Why no option or record would make `trainer` private, and what to do instead; "" where there is no such reason.

    Of trl's trainers, only the one for supervised fine-tuning trains on records, and those whose loss this library
    spells out.
    """
    if not issubclass(trainer, Trainer):
        return f"{trainer.__name__} has no Trainer beside DPTrainerMixin: class Mine(DPTrainerMixin, Trainer)"
    foreign = next((c for c in trainer.__mro__ if _is_foreign_to_records(c)), None)
    if foreign is None or _is_spelt_out(foreign, trainer):
        return ""
    why = next(why for words, why in OF_TRL.items() if any(word in foreign.__name__ for word in words))
    return f"trl's {foreign.__name__}: {why}"


def ignored(trainer: type) -> Iterator[str]:
    """One line for each method that `trainer`, or a Trainer among its bases, overrides in vain."""
    classes = trainer.__mro__
    private = next((i for i, c in enumerate(classes) if c.__name__ == "DPTrainerMixin"), len(classes))
    for method, remedy in NEVER_CALLED.items():
        owner = next(c for c in classes if method in vars(c) and not _ours(c))
        if _stock(owner) or (method == "compute_loss" and owns(trainer, "example_losses")):
            continue
        if _is_spelt_out(owner, trainer):
            continue
        if method == "training_step" and classes.index(owner) < private:
            continue  # it wraps the private step, and calls it
        yield f"{owner.__name__}.{method}: it would never be called while training: {remedy}"


def refuse_replaced(trainer: Trainer) -> None:
    """Refuses what was put in the place of such a method on the object alone, as in `trainer.compute_loss = mine`.

    Raises:
        UnsupportedOptionError: names all of them. (What another `training_step` does is seen by the weights.)
    """
    mine = [name for name in NEVER_CALLED if name in vars(trainer) and name != "training_step"]
    if "example_losses" in vars(trainer) or owns(type(trainer), "example_losses"):
        mine = [name for name in mine if name != "compute_loss"]
    if mine:
        lines = "; ".join(f"{name} was replaced: {NEVER_CALLED[name]}" for name in mine)
        raise UnsupportedOptionError(f"cannot be combined with differential privacy: {lines}")


def owns(trainer: type, method: str) -> bool:
    """Whether the method that `trainer` has is defined outside of this library."""
    return not _ours(next(c for c in trainer.__mro__ if method in vars(c)))


def host_of(trainer: type, method: str) -> type:
    """The class outside of this library whose method `trainer` would have without this library."""
    return next(c for c in trainer.__mro__ if method in vars(c) and not _ours(c))


def _ours(owner: type) -> bool:
    return owner.__module__.startswith("hf_dp.")


def _stock(owner: type) -> bool:
    """Trainer itself; and trl's SFTTrainer, whose loss is compared with the one that is trained (see `objective`)."""
    return owner.__module__.startswith("transformers.") or owner.__module__ == "trl.trainer.sft_trainer"


def _is_spelt_out(owner: type, trainer: type) -> bool:
    """Whether `owner` is one of trl's whose loss `trainer` spells out, and compares (see `objective`)."""
    return owner.__module__.startswith("trl.") and getattr(trainer, "host_losses", None) is not None


def _is_foreign_to_records(owner: type) -> bool:
    """Whether a class is a trainer of trl's with a loss, batches or steps of its own; supervised fine-tuning is not."""
    return (
        owner.__module__.startswith("trl.")
        and not _stock(owner)
        and any(method in vars(owner) for method in (*NEVER_CALLED, "train"))
    )
