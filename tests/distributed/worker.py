"""One process of a distributed run: names of scenarios and a folder in, `<folder>/<scenario>.<rank>.pt` out.

Started by `launch.py`, with the repository's root in PYTHONPATH.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python worker.py FOLDER SCENARIO...
    python worker.py --fork 2 FOLDER SCENARIO... --fork 2 FOLDER SCENARIO...

The second form imports once and forks groups of processes one after another; it prints each group's exit statuses.
gloo may hang when it is torn down, so a worker ends by a barrier and `os._exit`, and whoever started it has a time-out.
"""

import contextlib
import os
import resource
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from hf_dp import HfDpError, PrivacyConfig
from hf_dp.ledger.ledger import LEDGER_NAME
from hf_dp.recipe import model_shapes, run_cost, task
from hf_dp.recipe.recipe import read
from hf_dp.step import PrivateStep
from hf_dp.step.coordinates import local
from hf_dp.step.opening import Place, Session
from hf_dp.step.run import PrivateRun
from hf_dp.training import shards
from tests import conftest  # noqa: F401  one thread, no network
from tests.distributed import invariance
from tests.support import models as M
from tests.support import reference, runs

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
NOISY = {"noise_multiplier": 1.0, "debug_seed": 3, "target_delta": 1e-3, "expected_batch_size": 8}


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([invariance.whole(p).detach().flatten() for p in reference.trainable(model).values()])


class Watch(TrainerCallback):
    """The parameters after each step, and a hash of them."""

    def __init__(self) -> None:
        self.hashes: list[str] = []
        self.path: list[torch.Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **k: Any) -> None:
        self.path.append(flat(model))
        self.hashes.append(sha256(self.path[-1].numpy().tobytes()).hexdigest())


def train(folder: Path, privacy: dict[str, Any], *, rank: int = 4, **settings: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    watch, resume = Watch(), settings.pop("resume", None)
    model = settings.pop("model", None) or M.with_lora(M.llama, r=rank)
    trainer = runs.trainer(folder, model, privacy, callbacks=[watch], **settings)
    trainer.train(resume_from_checkpoint=resume)
    return {
        "weights": flat(trainer.model),
        "hashes": watch.hashes,
        "path": torch.stack(watch.path),
        "charged": trainer.privacy_spent().num_steps,
        "epsilon": trainer.privacy_spent().epsilon,
        "logged": [[entry["loss"], entry["batch_size"]] for entry in trainer.state.log_history if "loss" in entry],
        "world": trainer.args.world_size,
    }


def one_step(folder: Path) -> dict[str, Any]:
    return train(folder, {**runs.NOISELESS, "expected_batch_size": 24})


def trajectory(folder: Path) -> dict[str, Any]:
    return train(folder, {**NOISY, "log_loss_up_to": 3.0}, max_steps=20, learning_rate=0.05, optim="adamw_torch")


def empty_draws(folder: Path) -> dict[str, Any]:
    """One record in two hundred: most slices are empty, on one process or on all."""
    privacy = {"noise_multiplier": 1.0, "target_delta": 1e-3, "expected_batch_size": 1}
    return train(folder, privacy, train_dataset=runs.text_rows(200), max_steps=15, learning_rate=0.01)


def on_trls_trainers(folder: Path) -> dict[str, Any]:
    """Two noisy steps each of preferences and of rewards, on slices of different lengths."""
    from tests.support import on_trl  # trl takes seconds

    privacy = PrivacyConfig(**{**NOISY, "expected_batch_size": 7}, clip_norm=0.1)
    model, data, steps = on_trl.base(), on_trl.pairs(7), {"max_steps": 2, "learning_rate": 1.0}
    adapted = on_trl.dpo(folder / "dpo", model, data, privacy, peft_config=on_trl.adapters(), **steps)
    scoring = on_trl.reward(folder / "reward", data, privacy, **steps)
    found: dict[str, Any] = {"world": adapted.args.world_size}
    for name, trainer in (("dpo", adapted), ("reward", scoring)):
        before = flat(trainer.model).clone()
        trainer.train()
        found[name] = flat(trainer.model) - before
    return found


def noise(folder: Path) -> dict[str, Any]:
    """What was released minus the sum of all parts, over the steps of a run with secret noise."""
    released: list[torch.Tensor] = []
    release = PrivateRun.release

    def watching(self: PrivateRun, clipped_sum: torch.Tensor, draw_number: int) -> torch.Tensor:
        total = clipped_sum.clone()
        if dist.is_initialized():
            dist.all_reduce(total)
        noisy = release(self, clipped_sum, draw_number)
        released.append(noisy - total)
        return noisy

    PrivateRun.release = watching  # type: ignore[method-assign]
    try:
        privacy = {"noise_multiplier": 1.5, "clip_norm": 0.4, "target_delta": 1e-3, "expected_batch_size": 8}
        result = train(folder, privacy, rank=220, max_steps=2, learning_rate=0.01)  # 102,080 coordinates
    finally:
        PrivateRun.release = release  # type: ignore[method-assign]
    return {**result, "noise": torch.stack(released)}


def discrete(folder: Path) -> dict[str, Any]:
    return train(folder, {**NOISY, "noise": "discrete"}, max_steps=4, learning_rate=0.05)


def slices(folder: Path) -> dict[str, Any]:
    """Which records this process reads, step by step, through the trainer's own loader."""
    trainer = runs.trainer(folder, M.with_lora(M.llama), NOISY, train_dataset=runs.text_rows(40))
    place = Place(folder, trainer.args.process_index, trainer.args.world_size)
    trainer._run = PrivateRun.open(trainer.mechanism, place, Session(trainer.train_dataset, seed=3))
    sampler = trainer.get_train_dataloader().batch_sampler
    drawn = [list(draw) for _ in range(4) for draw in sampler]
    trainer._run.close()
    return {"drawn": drawn}


def refused(folder: Path) -> dict[str, Any]:
    """A second training in a folder: process 0 alone sees the ledger, and all processes stop with its message."""
    train(folder, NOISY)
    try:
        train(folder, NOISY)
    except HfDpError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


def resumed(folder: Path) -> dict[str, Any]:
    """Two more steps than the newest checkpoint has, whatever the number of processes that wrote it."""
    done = len(list(folder.glob("checkpoint-*")))
    privacy = {"noise_multiplier": 1.0, "target_delta": 1e-3, "expected_batch_size": 8}
    settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01, "max_steps": 2 * done + 2}
    return train(folder, privacy, **settings, **({"resume": True} if done else {}))


def dies(folder: Path) -> dict[str, Any]:
    """The last process is killed in the middle of its third step."""
    return at_third_step(folder, lambda: os.kill(os.getpid(), 9))


def exhausted(folder: Path) -> dict[str, Any]:
    """The operating system refuses the last process an allocation in its third step, however few examples there are."""
    return at_third_step(folder, lambda: torch.empty(1 << 46))


def stopped(folder: Path) -> dict[str, Any]:
    """The last process sleeps in its third step for longer than the others wait (`ddp_timeout` is for GPUs alone)."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=3))
    return at_third_step(folder, lambda: time.sleep(15))


def at_third_step(folder: Path, act: Callable[[], Any]) -> dict[str, Any]:
    """Six steps in which something happens to the last process; what each is told, and how long it waited for that."""
    begun: list[float] = []

    steps: list[int] = []

    def fate(step: PrivateStep, batch: dict[str, torch.Tensor]) -> None:
        begun[:] = [time.monotonic()]
        if len(steps) == 3 and dist.get_rank() == dist.get_world_size() - 1:
            act()

    def observed(run: PrivateRun, *step: Any) -> None:
        with open(folder / f"observed.{run.place.process_index}", "ab", buffering=0) as file:
            file.write(b"x")

    count = after(PrivateStep, "prepare", lambda step: steps.append(1))
    with count, after(PrivateStep, "add", fate), after(PrivateRun, "release", observed):
        try:
            train(folder, {**NOISY, "debug_seed": None}, max_steps=6)
        except HfDpError as error:
            return {"error": f"{type(error).__name__}: {error}", "waited": time.monotonic() - begun[0]}
    return {"error": None}


def scarce(folder: Path) -> dict[str, Any]:
    """The last process gets 2 x 256 MiB more than it holds, and no more; each example of a pass takes 256 MiB."""
    if os.environ["RANK"] == "0":
        return {**one_step(folder), "largest": 4}
    tried: list[int] = []

    def allocate(step: PrivateStep, batch: dict[str, torch.Tensor]) -> None:
        torch.empty(len(batch["labels"]) << 28, dtype=torch.uint8)
        tried.append(len(batch["labels"]))

    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (5 << 27), resource.RLIM_INFINITY))
    try:
        with after(PrivateStep, "add", allocate):
            return {**one_step(folder), "largest": max(tried)}
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@contextlib.contextmanager
def after(owner: Any, name: str, act: Callable[..., None]) -> Iterator[None]:
    """Calls `act` with a method's arguments after each of its calls."""
    original = getattr(owner, name)

    def method(*args: Any) -> Any:
        value = original(*args)
        act(*args)
        return value

    setattr(owner, name, method)
    try:
        yield
    finally:
        setattr(owner, name, original)


def same_update(folder: Path) -> dict[str, Any]:
    """Every way of the diagonal."""
    return {str(way): invariance.update(way, folder) for way in invariance.ways(world(), all_of_them=False)}


def same_update_in_all_ways(folder: Path) -> dict[str, Any]:
    return {str(way): invariance.update(way, folder) for way in invariance.ways(world(), all_of_them=True)}


def replicas(folder: Path) -> dict[str, Any]:
    """Shards over two of four processes each, which accelerate refuses on CPUs; on one process, the same without."""
    from accelerate import ParallelismConfig

    way = invariance.Way("llama", "4", "plain", "replicas" if world() > 1 else "")
    with mock.patch.object(ParallelismConfig, "_validate_accelerator"):
        return {"update": invariance.update(way, folder)}


def launched(folder: Path) -> dict[str, Any]:
    """Two steps under accelerate's config file, with its checkpointing; set up as on GPUs, and with peft's policy."""
    from accelerate.utils import DistributedType
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FSDPModule

    def as_on_gpus(trainer: Any) -> Any:
        plugin, state = plugin_of(trainer), trainer.accelerator.state
        plugin.auto_wrap_policy = fsdp_auto_wrap_policy(trainer.model)
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
        return plugin

    def watching(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, **k: Any) -> Any:
        averaged.extend([op] if op == dist.ReduceOp.AVG else [])
        return reduce(tensor, op=op, **k)

    runs.arguments(folder)  # joins the processes
    passes, averaged, reduce, watch, plugin_of = [], [], dist.all_reduce, Watch(), shards._plugin
    count = lambda step, *a: passes.append(1)  # noqa: E731
    taken, idle = after(PrivateStep, "_add", count), after(PrivateStep, "_pass_for_the_others", count)
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01}
    with invariance.launched("--fsdp_activation_checkpointing", "true"):
        model = invariance.adapter_on("llama", folder, sharded="launched")
        given = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with mock.patch.object(shards, "_plugin", as_on_gpus):
            trainer = runs.trainer(folder, model, NOISY, callbacks=[watch], **settings)
        begun, units = flat(model), [n for n, m in model.named_modules() if isinstance(m, FSDPModule)]
        with taken, idle, mock.patch.object(dist, "all_reduce", watching):
            trainer.train()
        trainer.save_model()
    whole = {name: p.full_tensor() for name, p in model.named_parameters() if name not in given}
    return {
        "units": units,
        "begun": begun,
        "left whole": all(p is given[name] for name, p in model.named_parameters() if name in given),
        "base": {name.removeprefix("base_model.model.").replace(".base_layer", ""): w for name, w in whole.items()},
        "hooks": {len(p._post_accumulate_grad_hooks) for p in given.values()},
        "averaged": len(averaged),
        "passes": len(passes),
        "checkpointed": model.get_base_model().model.layers[0].gradient_checkpointing,
        "hashes": watch.hashes,
        "weights": {name: p.detach() for name, p in given.items()},
        "others": [n for n in os.listdir(folder / "checkpoint-2") if "fsdp" in n or "distcp" in n],
    }


def trained_shards(folder: Path) -> dict[str, Any]:
    """Three noisy steps of all weights, evaluated in between and saved: in shards, or on one process whole."""
    runs.arguments(folder)  # joins the processes
    noise, at, release = [], [], PrivateRun.release

    def watching(self: PrivateRun, own: torch.Tensor, draw_number: int, *shards: Any) -> torch.Tensor:
        noisy = release(self, own, draw_number, *shards)
        noise.append(noisy - own)
        at[:] = [i for r in (shards[0].own if shards else [range(len(own))]) for i in r]
        return noisy

    privacy = {**NOISY, "noise_multiplier": 1.5, "clip_norm": 0.4, "log_loss_up_to": 3.0, "public_eval": True}
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 3}
    with invariance.launched() if world() > 1 else contextlib.nullcontext():
        model = invariance.adapter_on("full", folder, sharded="launched" if world() > 1 else "")
        with mock.patch.object(PrivateRun, "release", watching):
            trainer = runs.trainer(
                folder, model, privacy, max_steps=3, learning_rate=0.1, eval_dataset=runs.text_rows(6), **steps
            )
            trainer.train()
    figures = "loss", "batch_size", "signal_to_noise"  # Trainer weighs evaluation losses by process
    return {
        "at": torch.tensor(at),
        "noise": torch.stack(noise),
        "weights": {name: invariance.whole(p.detach()) for name, p in model.named_parameters()},
        "held": sum(local(p).numel() for p in model.parameters()),
        "logged": [[entry[f] for f in figures if f in entry] for entry in trainer.state.log_history],
    }


def mixing_shards(folder: Path) -> dict[str, Any]:
    """Why a base in shards, one of whose blocks compares the examples of a pass, has one a pass."""
    runs.arguments(folder)  # joins the processes
    model = invariance.adapter_on("llama", folder, sharded="loaded")
    block = model.get_base_model().model.layers[0]
    block.register_forward_hook(lambda module, inputs, output: output - output.mean(0, keepdim=True))
    return {"alone": runs.trainer(folder, model, NOISY).alone_because}


def sharded_empty_draws(folder: Path) -> dict[str, Any]:
    """Most slices hold no example, and every process must pass as often as the others."""
    runs.arguments(folder)  # joins the processes
    privacy = {"noise_multiplier": 1.0, "target_delta": 1e-3, "expected_batch_size": 1}
    model = invariance.adapter_on("llama", folder, sharded="loaded")
    return train(folder, privacy, model=model, train_dataset=runs.text_rows(200), max_steps=15, learning_rate=0.01)


Sessions = list[tuple[str, dict[str, Any]]]
SESSIONS: Sessions = [
    ("loaded", {"per_device_train_batch_size": 4}),
    ("", {"per_device_train_batch_size": 1}),
    ("", {"per_device_train_batch_size": 24, "micro_batch_tokens": 40, "bf16": True}),
]
OF_ALL_WEIGHTS: Sessions = [
    ("", {"per_device_train_batch_size": 4}),
    ("launched", {"per_device_train_batch_size": 4}),
    ("", {"per_device_train_batch_size": 24, "micro_batch_tokens": 40}),
]


def elastic_full(folder: Path) -> dict[str, Any]:
    """As `elastic`, of all weights, in shards in the second session."""
    return elastic(folder, "full", OF_ALL_WEIGHTS)


def elastic(folder: Path, base: str = "llama", sessions: Sessions = SESSIONS) -> dict[str, Any]:
    """Two more steps of one run, in other shards, micro-batches and precision; the fourth call takes all six."""
    here = folder.parent / "one run"
    done = len(list(here.glob("checkpoint-*")))
    sharded, settings = sessions[done] if done < len(sessions) else ("", {})
    steps = {"max_steps": 2 * done + 2, "save_strategy": "steps", "save_steps": 2, "resume": done > 0}
    if done == len(sessions):
        here, steps = folder, {"max_steps": 6}
    runs.arguments(here)  # joins the processes
    # the epsilon keeps Adam from dividing one rounding error by another, where a gradient is as good as 0
    options = {"optim": "adamw_torch", "learning_rate": 0.01, "adam_epsilon": 1e-6}
    with invariance.launched() if sharded == "launched" else contextlib.nullcontext():
        model = invariance.adapter_on(base, folder.parent, sharded=sharded)
        before = flat(model)
        result = train(here, runs.NOISELESS, model=model, **steps, **settings, **options)
    result["updates"] = result["path"] - before
    torch.save(result, folder / f"{done}.{os.environ.get('RANK', '0')}.pt")
    return result


class Collectives(TrainerCallback):
    """Every collective from the beginning of a step to its end, as torch's profiler sees them."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_step_begin(self, *a: Any, **k: Any) -> None:
        self.profile = profile(activities=[ProfilerActivity.CPU])
        self.profile.start()

    def on_step_end(self, *a: Any, **k: Any) -> None:
        self.profile.stop()
        self.seen += [event.name for event in self.profile.events() if event.name.startswith("c10d::")]


def counted(folder: Path) -> dict[str, Any]:
    """What the processes say to each other in four steps, and the bytes of one all-reduce: measured and as planned."""
    watch, sizes, reduce = Collectives(), [], dist.all_reduce

    def measuring(tensor: torch.Tensor, *a: Any, **k: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *a, **k)

    dist.all_reduce = measuring
    try:
        trainer = runs.trainer(folder, M.with_lora(M.llama), NOISY, callbacks=[watch], max_steps=4)
        trainer.train()
    finally:
        dist.all_reduce = reduce
    planned = run_cost.all_reduced(trainer.mechanism, model_shapes.of_model(trainer.model))
    return {"collectives": watch.seen, "sizes": sizes, "planned": planned}


def different(folder: Path) -> dict[str, Any]:
    """The last process was given another clip norm, then another record."""
    runs.arguments(folder)  # joins the processes
    last, errors = dist.get_rank() == dist.get_world_size() - 1, []
    changed = text_rows_with_another_record() if last else runs.text_rows()
    for settings, rows in (({"clip_norm": 5.0} if last else {}, runs.text_rows()), ({}, changed)):
        try:
            train(folder, {**NOISY, **settings}, train_dataset=rows)
        except HfDpError as error:
            errors.append(f"{type(error).__name__}: {error}")
    return {"errors": errors, "ledger": (folder / LEDGER_NAME).exists()}


def text_rows_with_another_record() -> Any:
    rows = runs.text_rows().to_list()
    rows[5], rows[6] = rows[6], rows[5]
    return runs.Dataset.from_list(rows)


def refused_shards(folder: Path) -> dict[str, Any]:
    """A tied weight loaded in shards; shards beside whole weights; whole numbers of noise; tensor parallelism."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    runs.arguments(folder)  # joins the processes
    tied, full, beside = (invariance.adapter_on(b, folder, sharded="loaded") for b in ("tied", "full", "full"))
    beside.score = torch.nn.Linear(16, 2)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    split = torch.nn.Linear(4, 4, bias=False).requires_grad_(False)
    split.weight = torch.nn.Parameter(distribute_tensor(split.weight.data, mesh, [Shard(0)]), requires_grad=False)
    people = runs.text_rows().add_column("person", [n // 2 for n in range(24)])
    errors = []
    for model, privacy, more in (
        (tied, {}, {}),
        (beside, {}, {}),
        (full, {"noise": "discrete"}, {}),
        (full, {"unit_column": "person"}, {"train_dataset": people}),
        (split, {}, {}),
    ):
        try:
            runs.trainer(folder, model, {**NOISY, **privacy}, **more)
        except HfDpError as error:
            errors.append(f"{type(error).__name__}: {error}")
    return {"errors": errors}


def real_rows(folder: Path) -> dict[str, Any]:
    """Five private steps of the E2E recipe, and the validation loss before and after, as a sum over examples."""
    torch.set_num_threads(1)
    given = folder.parent / "given"
    overrides = {
        "model.name": os.environ["REAL_MODEL"],
        "data.train": given / "train.jsonl",
        "data.validation": given / "validation.jsonl",
        "training.output_dir": folder / "out",
        "training.max_steps": 5,
        "training.use_cpu": "true",
        "training.disable_tqdm": "true",
        "training.save_strategy": "no",
        "training.learning_rate": 0.01,
        "training.per_device_train_batch_size": 16,
        "privacy.expected_batch_size": 48,
        "privacy.target_delta": "null",
    }
    trainer = task.build(read(RECIPES / "e2e-gpt2.yaml", [f"{name}={value}" for name, value in overrides.items()]))
    before = task.evaluate(trainer)["nats_per_character"]
    trainer.train()
    spent = trainer.privacy_spent()
    return {
        "before": before,
        "after": task.evaluate(trainer)["nats_per_character"],
        "spent": tuple(spent),
        "weights": flat(trainer.model),
    }


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def noise_again(folder: Path) -> dict[str, Any]:
    """As `noise`, with the same `args.seed`."""
    return noise(folder)


SCENARIOS: dict[str, Callable[[Path], dict[str, Any]]] = {
    f.__name__: f
    for f in (
        *(one_step, trajectory, empty_draws, noise, noise_again, discrete, slices, refused, resumed),
        *(dies, exhausted, stopped, scarce),
        *(same_update, same_update_in_all_ways, launched, mixing_shards, replicas, sharded_empty_draws, elastic),
        *(trained_shards, elastic_full),
        *(counted, different, refused_shards, real_rows, on_trls_trainers),
    )
}


def main(folder: Path, names: list[str]) -> None:
    for name in names:
        own = folder / name
        own.mkdir(parents=True, exist_ok=True)
        result = SCENARIOS[name](own)
        torch.save(result, folder / f"{name}.{os.environ.get('RANK', '0')}.pt")
    if dist.is_initialized():
        dist.barrier()


def end_with(folder: Path, names: list[str]) -> None:
    try:
        main(folder, names)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def fork_group(world: int, folder: Path, names: list[str]) -> list[int]:
    """Exit statuses of `world` forked workers, by rank. They die with the process that started this one, not before."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    workers = []
    for rank in range(world):
        workers.append(os.fork())
        if workers[-1] == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            os.environ.update(
                {k: str(v) for k, v in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items()}
            )
            os.dup2(2, 1)  # what the trainer prints is no exit status
            end_with(folder, names)
    return [os.waitstatus_to_exitcode(os.waitpid(w, 0)[1]) for w in workers]


if __name__ == "__main__":
    if sys.argv[1] != "--fork":
        end_with(Path(sys.argv[1]), sys.argv[2:])
    for group in " ".join(sys.argv[1:]).split("--fork ")[1:]:
        size, place, *scenarios = group.split()
        print(*fork_group(int(size), Path(place), scenarios), flush=True)
