"""A trainer whose user left the learning rate alone -> one from a rule that was fitted to private training.

`TrainingArguments`' own default is for training without noise and without LoRA: with noise, most of what could be
learnt stays unlearnt. How the rule was fitted, and with which figures, is in this room's README.
"""

import math
from typing import Any, NamedTuple, cast

from peft import LoraConfig, PeftModel
from transformers import TrainingArguments

from hf_dp.training.host import PrivateTrainer

RULE = "hf_dp/training/README.md#settings-that-you-leave-alone"
ADAM = ("adamw", "paged_adamw")  # beginnings of the names of optimizers whose steps do not grow with the gradient
LIBRARIES = ("transformers.", "trl.")


class Trained(NamedTuple):
    """What is trained, as the rule sees it.

    Attributes:
        kind: "LoRA", "LoRA and a new head" or "all parameters".
        scale: of LoRA, by which the product of its two matrices is multiplied (lora_alpha / r); else 1.
    """

    kind: str
    scale: float = 1.0


RATES = {"LoRA": 2e-2, "LoRA and a new head": 2e-2, "all parameters": 1e-3}  # kind -> learning rate at scale 1


def learning_rate(trained: Trained) -> float:
    """The learning rate of Adam for private training, with a linear decay."""
    return RATES[trained.kind] / trained.scale


def left_alone(args: TrainingArguments, name: str) -> bool:
    """Whether a setting has the default of its library: of the nearest class of transformers' or trl's that `args` is
    of.

    Whoever gives the default's own value cannot be told from whoever gives none.
    """
    library = next(c for c in type(args).__mro__ if c.__module__.startswith(LIBRARIES))
    return bool(getattr(args, name) == cast(Any, library).__dataclass_fields__[name].default)


def fill_in(trainer: PrivateTrainer) -> str:
    """Gives a trainer, whose `args` are a copy of the user's, the rule's learning rate; returns where it is from.

    "" where nothing was changed: the learning rate or the optimizer is the user's, `defaults="trainer"` was asked for,
    or the rule does not know what is trained.
    """
    trained = _trained(trainer)
    if trained is None or not _applies(trainer):
        return ""
    trainer.args.learning_rate = learning_rate(trained)
    return f"hf_dp's rule for {trained.kind}: {RULE}"


def rate_in_force(trainer: PrivateTrainer) -> float:
    """The learning rate before its schedule: the optimizer's, where there is one, as a resumed training has it."""
    group = {} if trainer.optimizer is None else trainer.optimizer.param_groups[0]
    return float(group.get("initial_lr", group.get("lr", trainer.args.learning_rate)))


def _applies(trainer: PrivateTrainer) -> bool:
    host = next(c for c in type(trainer).__mro__ if "create_optimizer" in vars(c))
    users_own = (
        trainer.optimizer is not None
        or trainer.optimizer_cls_and_kwargs is not None
        or not host.__module__.startswith(LIBRARIES)
    )
    args = trainer.args
    by_adam = str(getattr(args.optim, "value", args.optim)).startswith(ADAM)
    return trainer.privacy.defaults == "fitted" and not users_own and by_adam and left_alone(args, "learning_rate")


def _trained(trainer: PrivateTrainer) -> Trained | None:
    """What is trained; None of other adapters than LoRA, and of a part of a model without adapters."""
    model = trainer.model
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    if not isinstance(model, PeftModel):
        return Trained("all parameters") if len(trainable) == len(list(model.parameters())) else None
    config = model.active_peft_config
    if not isinstance(config, LoraConfig):
        return None
    kind = "LoRA" if all("lora_" in name for name in trainable) else "LoRA and a new head"
    return Trained(kind, config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r))
