"""accelerate's FSDP2 plugin and a trainer with an adapter -> the base in shards, the adapter whole and the same on all.

The plugin comes from accelerate's config file (`fsdp_version: 2`) or from `TrainingArguments(fsdp=True)`. accelerate
would shard the model as training begins, with its trainable parameters. Here its own function does so when the trainer
is made, because a pass is examined then, and leaves trainable parameters out. From then on the trainer treats the model
as one that `from_pretrained` loaded in shards: saved whole, resumed on any number of processes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, compare_versions
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments

from hf_dp.step import sharding

VERSION = "FSDP of version 1 hides the parameters in flat ones of its own: set"
ADAPTERS = (
    "FSDP: only the frozen base of an adapter is sharded, because per-example gradients need trained parameters whole; "
    "put an adapter on the model (get_peft_model), or use DDP (accelerate launch --multi_gpu)"
)


def problems(args: TrainingArguments, others: dict[str, Any]) -> Iterator[str]:
    """What keeps accelerate's plugin from sharding the model, each with a remedy."""
    if args.fsdp:
        config: dict[str, Any] = vars(args)["fsdp_config"] or {}
        if int(config.get("version", 2)) != 2:
            yield f"fsdp_config: {VERSION} {{'version': 2}}, or use DDP (accelerate launch --multi_gpu)"
        if config.get("xla"):
            yield "fsdp_config: XLA gathers and reduces by itself; leave xla out"
    elif _launched() and os.environ.get("FSDP_VERSION", "1") != "2":
        yield (
            f"ACCELERATE_USE_FSDP=true (from accelerate's launcher or config file): {VERSION} fsdp_version: 2 there, "
            "or use DDP (accelerate launch --multi_gpu)"
        )
    if _asked(args) and (compare_versions("torch", "<", "2.7") or compare_versions("accelerate", "<", "1.10")):
        yield "FSDP: it leaves parameters whole from torch 2.7 and accelerate 1.10 on: pip install -U torch accelerate"
    model = others.get("model")
    whole = isinstance(model, nn.Module) and not isinstance(model, PeftModel) and not others.get("peft_config")
    if _asked(args) and whole and not sharding.is_sharded(model):
        yield ADAPTERS


@contextmanager
def around_the_host(options: dict[str, Any]) -> Iterator[None]:
    """Around the host's constructor, whose checks are for models that have their memory, and train what is sharded."""
    args, model = options["args"], options.get("model")
    if _asked(args) and isinstance(model, nn.Module):
        _give_memory(model)
    with sharding.checkpoints_allowed(args, model):
        yield


def shard(trainer: Any) -> None:
    """Shards the base of the trainer's adapter, where accelerate was asked to; the trainer is past its host's
    constructor.

    Every process calls this. Trainable parameters become those of process 0 on all of them. So do all weights where
    only process 0 has read them (`cpu_ram_efficient_loading`).
    """
    plugin = _plugin(trainer)
    if plugin is None:
        return
    model, device = trainer.model, trainer.accelerator.device
    if not sharding.is_sharded(model):
        _shard(model, plugin, trainer.accelerator)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(device)
            dist.broadcast(p.data, src=0)
    if plugin.activation_checkpointing:  # the model's own, which keeps the masks of dropout
        trainer.args.gradient_checkpointing = trainer.args.activation_checkpointing = True
    trainer.is_fsdp_enabled, trainer.is_distributed_loading_by_transformers = False, True
    trainer.place_model_on_device = False
    state = trainer.accelerator.state
    if state.distributed_type == DistributedType.FSDP:
        # or `prepare` would ask for a model to shard, and scripts would set peft's policy, of classes that are gone now
        state.distributed_type, state.fsdp_plugin = PartialState().distributed_type, None


def _launched() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def _asked(args: TrainingArguments) -> bool:
    """Whether accelerate was asked for shards; one process alone has none."""
    return bool(args.fsdp or _launched()) and args.world_size > 1


def _plugin(trainer: Any) -> FullyShardedDataParallelPlugin | None:
    """The plugin that accelerate was asked for; on CPUs it sets none up itself."""
    args = trainer.args
    if not _asked(args):
        return None
    plugin = vars(trainer.accelerator.state).get("fsdp_plugin")
    if plugin is None:
        plugin = FullyShardedDataParallelPlugin(**(vars(args).get("fsdp_plugin_args") or {}))
        if trainer.accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(trainer.accelerator.mixed_precision)
    return plugin


def _shard(model: nn.Module, plugin: FullyShardedDataParallelPlugin, accelerator: Any) -> None:
    """`model`'s frozen parameters in shards, a block of the model together, by accelerate's function.

    What it is kept from: sharding trainable parameters, taking all blocks for one where it does not know the policy
    (peft's, or none), and its way of loading on process 0 alone, which fails at parameters that are whole.
    """
    from accelerate.utils import fsdp_utils  # not in all versions; see `problems`

    trained = [p for p in model.parameters() if p.requires_grad]
    left_whole = fsdp_utils.get_parameters_from_modules(plugin.ignored_modules, model, accelerator.device)
    first_alone = bool(plugin.cpu_ram_efficient_loading) and not any(map(_in_four_bits, model.parameters()))
    read = {name: p.data for name, p in model.named_parameters()} if first_alone and dist.get_rank() == 0 else {}
    seen = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=accelerator.torch_device_mesh,
        parallelism_config=accelerator.parallelism_config,
        mixed_precision=accelerator.mixed_precision,
        device=accelerator.device,
        is_main_process=accelerator.is_main_process,
    )
    before = plugin.ignored_modules, plugin.cpu_ram_efficient_loading
    plugin.ignored_modules = [nn.ParameterList([*trained, *left_whole])]
    plugin.cpu_ram_efficient_loading = False
    if fsdp_utils.fsdp2_prepare_auto_wrap_policy(plugin, model) is None:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
    try:
        fsdp_utils.fsdp2_prepare_model(seen, model)
    finally:
        plugin.ignored_modules, plugin.cpu_ram_efficient_loading = before
    if first_alone:
        _take_from_first(model, read, accelerator.device)


def _in_four_bits(p: nn.Parameter) -> bool:
    return type(p).__name__ == "Params4bit"  # which transformers reads on all processes


def _give_memory(model: nn.Module) -> None:
    """Memory to weights that only process 0 has read (`cpu_ram_efficient_loading`); nothing is written to it yet."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                if p not in made:
                    made[p] = nn.Parameter(torch.empty_like(p, device="cpu"), requires_grad=p.requires_grad)
                module._parameters[name] = made[p]


@torch.no_grad()
def _take_from_first(model: nn.Module, read: dict[str, Tensor], device: torch.device) -> None:
    """Sends process 0's weights and buffers to all, one after another."""
    for name, p in model.named_parameters():
        if isinstance(p, DTensor):
            whole = read.pop(name).to(device) if name in read else torch.empty(p.shape, dtype=p.dtype, device=device)
            part = distribute_tensor(whole, p.device_mesh, p.placements)
            p.to_local().copy_(part.to_local())
        elif not p.requires_grad:
            dist.broadcast(p.data, src=0)
    for _, buffer in model.named_buffers():
        dist.broadcast(buffer, src=0)
