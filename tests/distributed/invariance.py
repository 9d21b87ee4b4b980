"""One way to run the same mathematics (micro-batches, checkpointing, compiling, shards) -> the adapter's update."""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_dp.step import sharding
from tests.support import models as M
from tests.support import runs

MICRO_BATCHES: dict[str, dict[str, Any]] = {
    "1": {"per_device_train_batch_size": 1},
    "4": {"per_device_train_batch_size": 4},
    "tokens": {"per_device_train_batch_size": 24, "micro_batch_tokens": 40},
}
PASSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "non-reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}
BASES = {"llama": M.llama, "gpt2": M.gpt2}
PEOPLE = "people"  # a Llama of which persons with 1 to 5 records are the units
UNITS: dict[str, Any] = {"unit_column": "person", "records_per_unit": 3, "expected_batch_size": 5}


class Way(NamedTuple):
    base: str
    micro_batches: str
    passes: str
    sharded: bool


DIAGONAL = [
    Way("llama", "4", "plain", True),
    Way("llama", "tokens", "reentrant", False),
    Way("gpt2", "tokens", "reentrant", True),
    Way(PEOPLE, "1", "plain", True),
    Way(PEOPLE, "4", "plain", False),
]


def ways(world: int, *, all_of_them: bool) -> list[Way]:
    """The matrix or its diagonal; one process has nothing to shard, and what is sharded is not compiled."""
    matrix = [Way(*w) for w in itertools.product(BASES, MICRO_BATCHES, PASSES, (False, True))]
    return [
        way
        for way in (matrix if all_of_them else DIAGONAL)
        if not way.sharded or (world > 1 and way.passes != "compiled")
    ]


def adapter_on(base: str, folder: Path, *, sharded: bool) -> torch.nn.Module:
    """The same adapter on the same base in every run; loaded in shards where asked for."""
    main, together = not dist.is_initialized() or dist.get_rank() == 0, dist.is_initialized()
    if main and not (folder / base).exists():
        torch.manual_seed(0)
        BASES.get(base, M.llama)().save_pretrained(folder / base)
    if together:
        dist.barrier()
    extra: dict[str, Any] = {}
    if sharded:
        from transformers.distributed import DistributedConfig

        extra = {"distributed_config": DistributedConfig(fsdp_size=dist.get_world_size())}
    loaded = AutoModelForCausalLM.from_pretrained(folder / base, **extra)
    torch.manual_seed(1)
    model = M.with_lora(lambda: loaded)
    assert sharding.is_sharded(model) == sharded
    return model


def update(way: Way, folder: Path) -> Tensor:
    """What three noiseless steps at q = 1/2 change; draws come from the debug seed, and so are the same everywhere."""
    runs.arguments(folder)  # joins the processes
    model = adapter_on(way.base, folder, sharded=way.sharded)
    before, rows = flat(model), runs.text_rows()
    persons = rows.add_column("person", [number * number // 60 for number in range(len(rows))])
    trainer = runs.trainer(
        folder / "-".join(map(str, way)),
        model,
        {**runs.NOISELESS, "expected_batch_size": 12, **(UNITS if way.base == PEOPLE else {})},
        max_steps=3,
        train_dataset=persons if way.base == PEOPLE else rows,
        **MICRO_BATCHES[way.micro_batches],
        **PASSES[way.passes],
    )
    trainer.train()
    return flat(trainer.model) - before


def flat(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
