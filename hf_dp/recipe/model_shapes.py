"""A model, or its name and a LoRA rank -> `Shapes`.

A named model is built on torch's meta device: its config is read, but no weights.
"""

import math
from typing import Any

import peft
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_dp.errors import ConfigError
from hf_dp.recipe.run_cost import Shapes


def of_name(name: str, lora_r: int | None) -> Shapes:
    """The shapes of a model in a folder or on the Hub, by its config; with LoRA on every linear layer, or, for None,
    trained in full.

    Raises:
        ConfigError: there is no such model, or the rank is invalid.
    """
    if lora_r is not None and lora_r < 1:
        raise ConfigError(f"--lora-r: expected a rank, 1 or more, got {lora_r}")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--model: {name} is neither a model's folder nor a name that the Hub gave a config for: "
            f"{str(error).splitlines()[0]}"
        ) from None
    named = (getattr(transformers, a, None) for a in config.architectures or ())
    build = next((c for c in named if c is not None), transformers.AutoModel.from_config)
    with torch.device("meta"):
        model = build(config)
        if lora_r is not None:
            model = peft.get_peft_model(model, peft.LoraConfig(r=lora_r, target_modules="all-linear"))
    return of_model(model)


def of_model(model: Any) -> Shapes:
    """Counts and uses of a model's parameters. All but linear maps and the token embedding count in full, such as
    positions.
    """
    linear, tables, used = [], [], set()
    for module in model.modules():
        of_tokens = module is model.get_input_embeddings()
        if not (of_tokens or isinstance(module, nn.Linear | Conv1D)) or not module.weight.requires_grad:
            continue
        weight = module.weight
        used.add(weight)
        if of_tokens:
            tables.append(weight.shape[1])
        else:
            d, r = weight.shape if isinstance(module, Conv1D) else (weight.shape[1], weight.shape[0])
            linear.append((d, r))
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    return Shapes(
        parameters=sum(p.numel() for p in parameters),
        bytes_of_weights=sum(p.numel() * p.element_size() for p in parameters),
        trainable=sum(p.numel() for p in trainable),
        linear=tuple(linear),
        tables=tuple(tables),
        others=sum(math.prod(p.shape) for p in trainable if p not in used),
    )
