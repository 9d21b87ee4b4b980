"""One way to run the same mathematics (micro-batches, checkpointing, compiling, shards) -> the adapter's update."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_dp.sampling import groups_by
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
REPLICAS = """
parallelism_config:
  parallelism_config_dp_replicate_size: 2
  parallelism_config_dp_shard_size: 2
"""
BASES = {"llama": M.llama, "gpt2": M.gpt2}
FULL = {"full": M.llama, "tied": M.gpt2}  # all weights are trained
FOUR_BITS = "four bits"  # a base of bitsandbytes' 4 bits
PEOPLE = "people"  # a Llama of which persons with 1 to 8 records are the units
KEPT = "kept"  # of whom 2 records each are kept, and drawn by themselves
OWNERS = "owners"  # where a record has one to three of them


CONFIG_FILE = Path(__file__).resolve().parents[2] / "recipes" / "accelerate" / "sharded.yaml"


class Way(NamedTuple):
    """`sharded`: "" not at all, "loaded" by from_pretrained, "launched" by accelerate's config file, "replicas" by one
    that shards over half of the processes.
    """

    base: str
    micro_batches: str
    passes: str
    sharded: str


DIAGONAL = [
    Way("llama", "4", "plain", "loaded"),
    Way("llama", "tokens", "reentrant", ""),
    Way("llama", "tokens", "non-reentrant", "launched"),
    Way("full", "4", "plain", ""),
    Way("full", "tokens", "non-reentrant", "launched"),
    Way(KEPT, "4", "plain", ""),
    Way(OWNERS, "4", "plain", ""),
]
BESIDE = [  # the matrix
    Way("tied", "4", "plain", ""),
    Way("tied", "4", "reentrant", "launched"),
    Way(PEOPLE, "1", "plain", "loaded"),
    Way(PEOPLE, "4", "plain", ""),
]
QUANTISED = [Way(FOUR_BITS, "4", "plain", how) for how in ("", "launched")] if find_spec("bitsandbytes") else []


def ways(world: int, *, all_of_them: bool) -> list[Way]:
    """The matrix or its diagonal; one process has nothing to shard, and what is sharded is not compiled."""
    bases = [*BASES, "full"]
    matrix = [Way(*w) for w in itertools.product(bases, MICRO_BATCHES, PASSES, ("", "loaded", "launched"))]
    return [
        way
        for way in ([*matrix, *BESIDE, *QUANTISED] if all_of_them else DIAGONAL)
        if (not way.sharded or (world > 1 and way.passes != "compiled"))
        and (way.base, way.passes) != ("full", "compiled")
        and (world == 1 or way.sharded or way.base not in (*FULL, FOUR_BITS))  # which only stand beside those in shards
    ]


@contextmanager
def launched(*words: str, more: str = "") -> Iterator[None]:
    """The environment in which `accelerate launch --config_file recipes/accelerate/sharded.yaml` starts processes;
    `more` is put into the file.
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    with NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(CONFIG_FILE.read_text() + more)
        file.flush()
        given = launch_command_parser().parse_args(["--config_file", file.name, *words, "train.py"])
        made = prepare_multi_gpu_env(_validate_launch_command(given)[0])
    kept = {name: value for name, value in made.items() if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_"))}
    with mock.patch.dict(os.environ, kept):
        yield


def adapter_on(base: str, folder: Path, *, sharded: str) -> torch.nn.Module:
    """The same adapter on the same base in every run, or the base itself where it is `FULL`; loaded in shards where
    asked for.

    Where accelerate is to shard it, other processes than the first begin with another adapter, and no weights.
    """
    together = dist.is_initialized()
    main = not together or dist.get_rank() == 0
    if main and not (folder / base).exists():
        torch.manual_seed(0)
        {**BASES, **FULL}.get(base, M.llama)().save_pretrained(folder / base)
    if together:
        dist.barrier()
    extra: dict[str, Any] = {}
    if sharded == "loaded":
        from transformers.distributed import DistributedConfig

        extra = {"distributed_config": DistributedConfig(fsdp_size=dist.get_world_size())}
    if base == FOUR_BITS:  # numbers of the dtype of other weights stand for them, so that they are sharded
        bits = {"bnb_4bit_compute_dtype": torch.float32, "bnb_4bit_quant_storage": torch.float32}
        extra = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **bits)}
    loaded = AutoModelForCausalLM.from_pretrained(folder / base, **extra)
    torch.manual_seed(1 if main or sharded in ("", "loaded") else 2)
    model = loaded if base in FULL else M.with_lora(lambda: loaded)
    assert sharding.is_sharded(model) == (sharded == "loaded")
    return model


def update(way: Way, folder: Path) -> Tensor:
    """What three noiseless steps at q = 1/2 change; draws come from the debug seed, and so are the same everywhere."""
    runs.arguments(folder)  # joins the processes
    more = REPLICAS if way.sharded == "replicas" else ""
    rows, own = runs.text_rows(), {}
    if way.base == PEOPLE:
        own = {"unit_column": "person", "records_per_unit": 3, "expected_batch_size": 5}
        rows = rows.add_column("person", [number * number // 60 for number in range(len(rows))])
    if way.base in (KEPT, OWNERS):
        owners: list[Any] = [number * number // 60 for number in range(len(rows))]
        if way.base == OWNERS:
            owners = [[owner, *range(number % 3)] for number, owner in enumerate(owners)]
        rows = rows.add_column("owners", owners)
        groups = groups_by(rows, "owners", bound=2)
        assert groups is not None
        assert 4 < groups.num_groups < len(rows)
        own = {"unit_column": "owners", "contribution_bound": 2, "expected_batch_size": groups.num_groups // 2}
    with launched(more=more) if way.sharded in ("launched", "replicas") else nullcontext():
        model = adapter_on(way.base, folder, sharded=way.sharded)
        trainer = runs.trainer(
            folder / "-".join(map(str, way)),
            model,
            {**runs.NOISELESS, "expected_batch_size": 12, **own},
            max_steps=3,
            train_dataset=rows,
            **MICRO_BATCHES[way.micro_batches],
            **PASSES[way.passes],
        )
        assert sharding.is_sharded(model) == bool(way.sharded)
        alone = way.micro_batches == "1" and way.passes != "compiled"
        assert trainer.alone_because == ("per_device_train_batch_size=1" if alone else "")
        before = flat(model)
        trainer.train()
    return flat(trainer.model) - before


def flat(model: torch.nn.Module) -> Tensor:
    return torch.cat([whole(p).detach().flatten() for p in model.parameters() if p.requires_grad])


def whole(p: Tensor) -> Tensor:
    return p.full_tensor() if isinstance(p, DTensor) else p
