"""A trainer's class -> methods of Trainer that it overrides in vain, since private training never calls them."""

from collections.abc import Iterator

_DRAWS = "batches must be Poisson draws of train_dataset, which no other sampler or loader makes"
# method of Trainer -> why it is not called, and what to do instead
NEVER_CALLED = {
    "compute_loss": (
        "training takes one loss an example, not one of a batch; override example_losses(model, inputs), which "
        "returns [batch], and compute_loss then serves evaluation alone (for weights of classes: "
        "DPTrainer(class_weights=[...]))"
    ),
    "get_train_dataloader": f"{_DRAWS}; drop it, choose records in train_dataset, and transform them in data_collator",
    "_get_train_sampler": f"{_DRAWS}; drop it, and choose records in train_dataset",
    "get_batch_samples": f"{_DRAWS}; drop it",
    "training_step": "a private step clips, sums and releases by itself; drop it, or move what it does into a callback",
}
_ONLINE = (
    "it generates answers from records while it trains, in a number of passes that no clipping bounds, and compares "
    "rewards within a batch. Generate and rank answers first, of public prompts, and train on the pairs with "
    "DPDPOTrainer"
)
# trl's trainer -> why it cannot be made private by the mixin, and what to do instead
OF_TRL = {
    "DPOTrainer": "the answers of a pair lie in two rows of a batch: use hf_dp.DPDPOTrainer, which clips them as one",
    "RewardTrainer": "the answers of a pair lie in two rows of a batch: use hf_dp.DPRewardTrainer, which clips them as "
    "one",
    "KTOTrainer": "its reference point is a mean over the answers of other records in the batch, so that no loss is of "
    "one record: make pairs of the records, and use hf_dp.DPDPOTrainer",
    **dict.fromkeys(("GRPOTrainer", "RLOOTrainer", "OnlineDPOTrainer", "PPOTrainer", "DistillationTrainer"), _ONLINE),
}
COMPARES = (
    "its loss compares rows of a batch. Put what is to be compared into one record, have the collator make "
    "`unit_rows` rows of each, a class attribute of the trainer, and override example_losses"
)


def ignored(trainer: type) -> Iterator[str]:
    """One line for each method that `trainer`, or a Trainer among its bases, overrides in vain."""
    classes = trainer.__mro__
    private = next((i for i, c in enumerate(classes) if c.__name__ == "DPTrainerMixin"), len(classes))
    for method, remedy in NEVER_CALLED.items():
        owner = next(c for c in classes if method in vars(c) and not _ours(c))
        if _is_known(owner, trainer) or (method == "compute_loss" and owns(trainer, "example_losses")):
            continue
        if method == "training_step" and classes.index(owner) < private:
            continue  # it wraps the private step, and calls it
        theirs = owner.__module__.startswith("trl.")
        if theirs and method == "training_step":
            continue  # it only offloads activations, or its trainer's compute_loss is refused anyway
        remedy = OF_TRL.get(owner.__name__, COMPARES) if theirs and method == "compute_loss" else remedy
        yield f"{owner.__name__}.{method}: it would never be called while training: {remedy}"


def owns(trainer: type, method: str) -> bool:
    """Whether the method that `trainer` has is defined outside of this library."""
    return not _ours(next(c for c in trainer.__mro__ if method in vars(c)))


def host_of(trainer: type, method: str) -> type:
    """The class outside of this library whose method `trainer` would have without this library."""
    return next(c for c in trainer.__mro__ if method in vars(c) and not _ours(c))


def _ours(owner: type) -> bool:
    return owner.__module__.startswith("hf_dp.")


def _is_known(owner: type, trainer: type) -> bool:
    """Whether `owner` is Trainer itself, or one of trl's whose loss is compared with the one that is trained (see
    `objective`).
    """
    spelt_out = getattr(trainer, "host_losses", None) is not None
    compared = owner.__module__ == "trl.trainer.sft_trainer" or (spelt_out and owner.__module__.startswith("trl."))
    return compared or owner.__module__.startswith("transformers.")
