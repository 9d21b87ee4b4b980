"""A model whose weights lie sharded on the processes (FSDP2) -> what all processes must do alike; what is refused.

Each forward and backward pass gathers the weights of one layer after another from all processes, so all processes must
take the same number of passes, however many examples their slices hold. Trained parameters are either all whole on
every process, as an adapter is, and their clipped gradients are summed over the processes once a step, as without
sharding; or all of them lie in shards, and clipped gradients are summed in each pass (see `coordinates`).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import TrainingArguments

from hf_dp import per_example
from hf_dp.per_example import MicroBatch, let_go, trains_shards

__all__ = ["LOADING", "checkpoints_allowed", "counted", "is_sharded", "let_go", "problems", "trains_shards"]

DATA = {"fsdp", "dp", "dp_replicate", "dp_shard", "dp_shard_cp"}  # dimensions along which no example is split
LOADING = "from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=number of processes))"


def is_sharded(model: object) -> bool:
    """Whether it is a model of which any parameter lies in parts on several processes."""
    return isinstance(model, nn.Module) and per_example.is_sharded(model)


def counted(parts: Iterable[MicroBatch], device: torch.device) -> tuple[list[MicroBatch], int]:
    """This process's parts, one a pass, and how many passes it has to add so that all processes take equally many.

    Every process calls this once before its passes.
    """
    own = list(parts)
    most = torch.tensor(len(own), device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return own, int(most) - len(own)


@contextmanager
def checkpoints_allowed(args: TrainingArguments, model: object) -> Iterator[None]:
    """Around Trainer's constructor, which refuses to save the optimizer's state of a sharded model (transformers 5.23).

    Trainer's reason, that the optimizer's state would be sharded too, does not hold here: it is saved whole.
    """
    saves_only_model = args.save_only_model
    args.save_only_model = saves_only_model or is_sharded(model)
    try:
        yield
    finally:
        args.save_only_model = saves_only_model


def problems(model: nn.Module) -> Iterator[str]:
    """What in a sharded model cannot be trained privately, each with a remedy."""
    sharded = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    in_shards = [name for name, p in sharded.items() if p.requires_grad]
    whole = [name for name, p in model.named_parameters() if p.requires_grad and name not in sharded]
    if in_shards and whole:
        yield (
            f"{in_shards[0]} is trained and sharded, {whole[0]} is trained and whole: shard all that is trained, or "
            "none of it. Train an adapter alone on the sharded base (get_peft_model after loading), leave trained "
            "modules out of ignored_modules, or freeze one of both kinds (requires_grad_(False))"
        )
    rows = [n for n in in_shards if any(not isinstance(p, Replicate) and p != Shard(0) for p in sharded[n].placements)]
    if rows or len({sharded[n].device_mesh for n in in_shards}) > 1:
        yield (
            f"{(rows or in_shards)[0]} is trained, and sharded otherwise than by its first dimension on one mesh, as "
            f"FSDP2 does it: load the model with {LOADING}, or let accelerate shard it (fsdp_version: 2)"
        )
    dimensions = {name for p in sharded.values() for name in p.device_mesh.mesh_dim_names or ()}
    others = sorted(dimensions - DATA)
    if others:
        yield (
            f"weights sharded over {', '.join(others)}: tensor, pipeline, expert and context sharding are not "
            f"supported; load the base with {LOADING}, or use DDP"
        )
