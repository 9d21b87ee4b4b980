"""accelerate's FSDP2 plugin and a trainer -> the model in shards; of an adapter the base alone, the adapter whole.

The plugin comes from accelerate's config file (`fsdp_version: 2`) or from `TrainingArguments(fsdp=True)`. accelerate
would shard the model as training begins, with all that is trained. Here its own function does so when the trainer is
made, because a pass is examined then, and leaves out what is trained beside an adapter's base. From then on the trainer
treats the model as one that `from_pretrained` loaded in shards: saved whole, resumed on any number of processes.
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

from hf_dp.errors import UnsupportedOptionError
from hf_dp.step import sharding

VERSION = "FSDP of version 1 hides the parameters in flat ones of its own: set"


def problems(args: TrainingArguments) -> Iterator[str]:
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


@contextmanager
def around_the_host(options: dict[str, Any]) -> Iterator[None]:
    """Around the host's constructor, whose checks are for models that have their memory, and train what is sharded."""
    args, model = options["args"], options.get("model")
    if _asked(args) and isinstance(model, nn.Module):
        _give_memory(model)
    with sharding.checkpoints_allowed(args, model):
        yield


def shard(trainer: Any) -> None:
    """Shards the trainer's model, where accelerate was asked to; the trainer is past its host's constructor.

    Every process calls this. Trained parameters become those of process 0 on all of them. So do all weights where only
    process 0 has read them (`cpu_ram_efficient_loading`).

    Raises:
        UnsupportedOptionError: of trained parameters in shards something is asked that needs them whole; names all.
    """
    plugin = _plugin(trainer)
    if plugin is not None:
        _shard_as(plugin, trainer)
    if sharding.trains_shards(trainer.model) and (wrong := [*_against_trained_shards(trainer)]):
        raise UnsupportedOptionError("trained weights in shards cannot be combined with: " + "; ".join(wrong))


def _against_trained_shards(trainer: Any) -> Iterator[str]:
    """What needs trained weights whole, each with a remedy."""
    remedy = "or train an adapter on the sharded base (get_peft_model), or use DDP (accelerate launch --multi_gpu)"
    privacy = trainer.privacy
    if privacy.noise == "discrete":
        yield f"noise='discrete' (one example's whole gradient is rounded): choose 'gaussian-chacha20', {remedy}"
    if privacy.unit_column is not None:
        kept = "a unit's whole gradient is kept over passes"
        yield f"unit_column={privacy.unit_column!r} ({kept}): leave it out, {remedy}"
    if trainer._canaries.num:
        yield f"an audit (canaries are compared with the whole release): leave audit out, {remedy}"


def _shard_as(plugin: FullyShardedDataParallelPlugin, trainer: Any) -> None:
    model, device = trainer.model, trainer.accelerator.device
    if not sharding.is_sharded(model):
        _shard(model, plugin, trainer.accelerator)
    for p in model.parameters():
        if p.requires_grad and not isinstance(p, DTensor):
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
    """`model`'s parameters in shards, a block of the model together, by accelerate's function.

    What it is kept from: sharding an adapter's trained parameters, taking all blocks for one where it does not know the
    policy (peft's, or none), and its way of loading on process 0 alone, which fails at parameters that are whole.
    """
    from accelerate.utils import fsdp_utils  # not in all versions; see `problems`

    adapted = isinstance(model, PeftModel)
    trained = [p for p in model.parameters() if p.requires_grad]
    tied = _places(model)
    left_whole = fsdp_utils.get_parameters_from_modules(plugin.ignored_modules, model, accelerator.device)
    first_alone = bool(plugin.cpu_ram_efficient_loading or not adapted) and not any(
        map(_in_four_bits, model.parameters())
    )
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
    plugin.ignored_modules = [nn.ParameterList([*(trained if adapted else ()), *left_whole])]
    plugin.cpu_ram_efficient_loading = False
    if fsdp_utils.fsdp2_prepare_auto_wrap_policy(plugin, model) is None:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
    try:
        fsdp_utils.fsdp2_prepare_model(seen, model)
    finally:
        plugin.ignored_modules, plugin.cpu_ram_efficient_loading = before
    if tied != _places(model):
        raise UnsupportedOptionError(
            "FSDP would shard two places of one tied weight apart, which training would untie: leave "
            "fsdp_transformer_layer_cls_to_wrap to the blocks of the model, so that both are in the root"
        )
    if first_alone:
        _take_from_first(model, read, accelerator.device)


def _places(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return [places for places in names.values() if len(places) > 1]


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
