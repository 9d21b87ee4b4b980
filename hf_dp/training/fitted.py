"""A trainer whose user left learning rate and clip norm alone -> values from a rule fitted to private training.

`TrainingArguments`' own learning rate is for training without noise and without LoRA: with noise, most of what could be
learnt stays unlearnt. How the rule was fitted, and with which figures, is in this room's README.
"""

import math
from dataclasses import replace
from typing import Any, cast

from peft import LoraConfig, PeftModel
from transformers import TrainingArguments

from hf_dp.config import BY_RULE, LEFT_ALONE, PrivacyConfig
from hf_dp.training.host import PrivateTrainer

PAGE = "hf_dp/training/README.md"
ADAM = ("adamw", "paged_adamw")  # beginnings of the names of optimizers whose steps do not grow with the gradient
LIBRARIES = ("transformers.", "trl.")


RATE = 0.09  # of one step, where the product of LoRA's two matrices counts once


def learning_rate(scale: float, num_steps: int) -> float:
    """Adam's learning rate for `num_steps` private steps of LoRA, with a linear decay, to two digits.

    It is 0.09 / sqrt(scale x T). Adam makes steps of one size of whatever it is given, and most of a private gradient
    is noise: T of them move each weight by about rate x sqrt(T), which the rule keeps the same.

    Args:
        scale: by which the product of LoRA's two matrices is multiplied: lora_alpha / r.
        num_steps: T.
    """
    return float(f"{RATE / math.sqrt(scale * num_steps):.1e}")


def left_alone(args: TrainingArguments, name: str) -> bool:
    """Whether a setting has the default of its library: of the nearest class of transformers' or trl's that `args` is
    of.

    Whoever gives the default's own value cannot be told from whoever gives none.
    """
    library = next(c for c in type(args).__mro__ if c.__module__.startswith(LIBRARIES))
    return bool(getattr(args, name) == cast(Any, library).__dataclass_fields__[name].default)


def with_clip_norm(privacy: PrivacyConfig, args: TrainingArguments, others: dict[str, Any]) -> PrivacyConfig:
    """`privacy` with the rule's C where it was left alone and Adam is Trainer's; `others` as `check_options` has them.

    Adam divides by the gradient's size. So C cancels where every example is clipped, and one that clips all of them
    lets none of them be small against the noise.
    """
    own = others.get("optimizer_cls_and_kwargs") or (others.get("optimizers") or (None,))[0] is not None
    fits = privacy.clip_norm is LEFT_ALONE and not own and _is_by_adam(privacy, args, others["trainer"])
    return replace(privacy, clip_norm=BY_RULE) if fits else privacy


def fill_in(trainer: PrivateTrainer) -> str:
    """Gives a trainer, whose `args` are a copy of the user's, the rule's learning rate; returns where it is from.

    "" where nothing was changed: the learning rate or the optimizer is the user's, `if_unset="trainer"` was asked for,
    or something else than LoRA is trained.
    """
    scale = _scale(trainer)
    own = trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None
    by_adam = _is_by_adam(trainer.privacy, trainer.args, type(trainer))
    if trainer.mechanism is None or scale is None or own or not by_adam:
        return ""
    if not left_alone(trainer.args, "learning_rate"):
        return ""
    trainer.args.learning_rate = learning_rate(scale, trainer.mechanism.num_steps)
    return f"hf_dp's rule for LoRA: {PAGE}"


def rate_in_force(trainer: PrivateTrainer) -> float:
    """The learning rate before its schedule: the optimizer's, where there is one, as a resumed training has it."""
    group = {} if trainer.optimizer is None else trainer.optimizer.param_groups[0]
    return float(group.get("initial_lr", group.get("lr", trainer.args.learning_rate)))


def _is_by_adam(privacy: PrivacyConfig, args: TrainingArguments, trainer: type) -> bool:
    """Whether the rule is wanted, and the optimizer will be an Adam that Trainer makes by itself."""
    host = next(c for c in trainer.__mro__ if "create_optimizer" in vars(c))
    adam = str(getattr(args.optim, "value", args.optim)).startswith(ADAM)
    return privacy.if_unset == "fitted" and adam and host.__module__.startswith(LIBRARIES)


def _scale(trainer: PrivateTrainer) -> float | None:
    """lora_alpha / r of what is trained, with a new head or without; None of preferences, and of all but LoRA."""
    config = trainer.model.active_peft_config if isinstance(trainer.model, PeftModel) else None
    if trainer.unit_rows > 1 or not isinstance(config, LoraConfig) or config.r < 1 or config.lora_alpha <= 0:
        return None
    return float(config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r))
