"""A model, or its name and a LoRA rank -> `Shapes`.

A named model is built on torch's meta device: its config is read, but no weights.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
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
    with torch.device("meta"), _type_of(config):
        model = build(config)
        if lora_r is not None:
            model = peft.get_peft_model(model, peft.LoraConfig(r=lora_r, target_modules="all-linear"))
    return of_model(model)


@contextmanager
def _type_of(config: Any) -> Iterator[None]:
    """New weights are of the type in which the model is saved, if its config names one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(config.dtype if isinstance(config.dtype, torch.dtype) else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def of_model(model: Any) -> Shapes:
    """Counts and uses of a model's parameters. All but linear maps and the token embedding count in full, such as
    positions.
    """
    linear, tables, used, maps = [], [], set(), []
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    adapted = isinstance(model, peft.PeftModel)
    for module in model.modules():
        of_tokens = module is table
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not (adapted and _is_trained(module)):
            maps.append(_inputs_and_outputs(module))
        if not (of_tokens or isinstance(module, nn.Linear | Conv1D)) or not _is_trained(module):
            continue
        weight = module.weight
        used.add(weight)
        if of_tokens:
            tables.append(weight.shape[1])
        else:
            linear.append(_inputs_and_outputs(module))
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    return Shapes(
        parameters=sum(p.numel() for p in parameters),
        bytes_of_weights=sum(p.numel() * p.element_size() for p in parameters),
        trainable=sum(p.numel() for p in trainable),
        linear=tuple(linear),
        tables=tuple(tables),
        others=sum(math.prod(p.shape) for p in trainable if p not in used),
        maps=tuple(maps),
        blocks=max((len(m) for m in model.modules() if isinstance(m, nn.ModuleList)), default=1),
        width=table.weight.shape[1],
        vocabulary=table.weight.shape[0],
    )


def _is_trained(module: Any) -> bool:
    return bool(module.weight.requires_grad)


def _inputs_and_outputs(module: Any) -> tuple[int, int]:
    """(d, r) of a linear map."""
    d, r = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
    return int(d), int(r)
