"""A model whose frozen weights lie sharded on the processes (FSDP2) -> what all processes must do alike; what is
refused.

Each forward and backward pass gathers the weights of one layer after another from all processes, so all processes must
take the same number of passes, however many examples their slices hold. Trainable parameters stay whole on every
process: their gradients are formed example by example, and summed over the processes once a step, as without sharding.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from hf_dp import per_example
from hf_dp.per_example import MicroBatch

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

    Trainer's reason, that the optimizer's state would be sharded too, does not hold here: `problems` allows only whole
    parameters to be trained.
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
    trainable = [name for name, p in sharded.items() if p.requires_grad]
    if trainable:
        yield (
            f"{trainable[0]} and {len(trainable) - 1} more parameters are sharded and trainable: per-example gradients "
            "need them whole; train an adapter on the sharded base (get_peft_model after loading), or load without "
            "distributed_config"
        )
    dimensions = {name for p in sharded.values() for name in p.device_mesh.mesh_dim_names or ()}
    others = sorted(dimensions - DATA)
    if others:
        yield (
            f"weights sharded over {', '.join(others)}: tensor, pipeline, expert and context sharding are not "
            f"supported; load the base with {LOADING}, or use DDP"
        )
