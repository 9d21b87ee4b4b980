"""One process of a distributed run: names of scenarios and a folder in, `<folder>/<scenario>.<rank>.pt` out. Started by `test_processes`.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python worker.py FOLDER SCENARIO...
    python worker.py --fork 2 FOLDER SCENARIO... --fork 2 FOLDER SCENARIO...

The second form imports once and forks groups of processes one after another; it prints each group's exit statuses.
gloo may hang when it is torn down, so a worker ends by a barrier and `os._exit`, and whoever started it has a time-out.
"""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import conftest  # noqa: F401  one thread, no network
import models as M
import reference
import runs
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from hf_dp import HfDpError
from hf_dp.run import PrivateRun

NOISY = {"noise_multiplier": 1.0, "debug_seed": 3, "target_delta": 1e-3, "expected_batch_size": 8}


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in reference.trainable(model).values()])


class Watch(TrainerCallback):
    """A hash of the parameters after each step."""

    def __init__(self) -> None:
        self.hashes: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **k: Any) -> None:
        self.hashes.append(sha256(flat(model).numpy().tobytes()).hexdigest())


def train(folder: Path, privacy: dict[str, Any], *, rank: int = 4, **settings: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    watch, resume = Watch(), settings.pop("resume", None)
    trainer = runs.trainer(folder, M.with_lora(M.llama, r=rank), privacy, callbacks=[watch], **settings)
    trainer.train(resume_from_checkpoint=resume)
    return {
        "weights": flat(trainer.model),
        "hashes": watch.hashes,
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


def slices(folder: Path) -> dict[str, Any]:
    """Which records this process reads, step by step, through the trainer's own loader."""
    trainer = runs.trainer(folder, M.with_lora(M.llama), NOISY, train_dataset=runs.text_rows(40))
    trainer._run = PrivateRun(trainer.mechanism, folder, trainer.args.process_index, trainer.args.world_size)
    trainer._run.open(trainer.train_dataset, None, seed=3)
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
    """The last process is killed at its third release, before it sends its part; every release that returns is seen."""
    release = PrivateRun.release

    def dying(self: PrivateRun, clipped_sum: torch.Tensor, draw_number: int) -> torch.Tensor:
        if self._taken == 2 and self._process == self._processes - 1:
            os.kill(os.getpid(), 9)
        noisy = release(self, clipped_sum, draw_number)
        with open(folder / f"observed.{self._process}", "ab", buffering=0) as file:
            file.write(b"x")
        return noisy

    PrivateRun.release = dying  # type: ignore[method-assign]
    return train(folder, {**NOISY, "debug_seed": None}, max_steps=6)


SCENARIOS: dict[str, Callable[[Path], dict[str, Any]]] = {
    f.__name__: f for f in (one_step, trajectory, empty_draws, noise, slices, refused, resumed, dies)
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
