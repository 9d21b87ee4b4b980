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
PREFERENCES = (
    "its loss compares answers that lie in several rows of a batch. To train on preferences, put a record's answers "
    "in one row, give it to DPTrainer with a data_collator for such rows, and override example_losses"
)


def ignored(trainer: type) -> Iterator[str]:
    """One line for each method that `trainer`, or a Trainer among its bases, overrides in vain."""
    classes = trainer.__mro__
    private = next((i for i, c in enumerate(classes) if c.__name__ == "DPTrainerMixin"), len(classes))
    for method, remedy in NEVER_CALLED.items():
        owner = next(c for c in classes if method in vars(c) and not _ours(c))
        if _stock(owner) or (method == "compute_loss" and owns(trainer, "example_losses")):
            continue
        if method == "training_step" and classes.index(owner) < private:
            continue  # it wraps the private step, and calls it
        theirs = owner.__module__.startswith("trl.")
        if theirs and method == "training_step":
            continue  # it only offloads activations, or its trainer's compute_loss is refused anyway
        yield f"{owner.__name__}.{method}: it would never be called while training: {PREFERENCES if theirs else remedy}"


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
