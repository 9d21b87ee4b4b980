"""A campaign of faults against toy runs: each comes at random, and what it must never do is counted.

under-reports       the ledger has fewer steps than an observer saw released
checkpoints lost    a checkpoint that was whole is gone or changed
hangs               a session ran into its time limit
wrong               a session that should have gone on did not, or one that should have been refused was not
"""

import contextlib
import hashlib
import math
import os
import random
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hf_dp.errors import HfDpError
from hf_dp.ledger.checkpoints import COMPLETE
from hf_dp.ledger.ledger import LEDGER_NAME, read_ledger
from tests.support import models as M
from tests.support import runs
from tests.support.children import KILLED, start, status_of

PRIVACY = {"noise_multiplier": 1.0, "target_delta": 1e-3, "expected_batch_size": 8}
WENT_ON, FAILED, REFUSED, NOT_FINITE = 0, 1, 3, 4  # exit statuses of a session
SECONDS = 120.0


class Observer(TrainerCallback):
    """Leaves a byte outside the process for each step whose noisy gradient it sees; may kill itself after one."""

    def __init__(self, path: Path, dies_after: int | None) -> None:
        self.path, self.dies_after = path, dies_after

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **k: Any) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, b".")
        os.close(descriptor)

    def on_step_end(self, args: Any, state: Any, control: Any, **k: Any) -> None:
        if state.global_step == self.dies_after:
            os.kill(os.getpid(), signal.SIGKILL)


class Limit(TrainerCallback):
    """From a given step on, no file may grow beyond so many bytes."""

    def __init__(self, step: int, size: int) -> None:
        self.step, self.size = step, size

    def on_step_begin(self, args: Any, state: Any, control: Any, **k: Any) -> None:
        if state.global_step >= self.step:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


@dataclass
class Count:
    """What one kind of fault did; `planted` counts the faults that came."""

    planted: int = 0
    under_reports: int = 0
    checkpoints_lost: int = 0
    hangs: int = 0
    wrong: int = 0
    refused: int = 0
    charged_twice: int = 0

    def clean(self) -> bool:
        """Whether nothing happened that must never happen."""
        return not (self.under_reports or self.checkpoints_lost or self.hangs or self.wrong)


class Victim:
    """One run in one folder, seen from outside."""

    def __init__(self, folder: Path, generator: random.Random) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.out, self.observed_path = folder / "out", folder / "observed"
        self.ledger = self.out / LEDGER_NAME
        self.generator, self.count = generator, Count()
        self.statuses: list[int] = []  # of the last session's processes
        self._newest = (0, "")  # the newest whole checkpoint: step and digest of its files

    def run(self, *expected: int, processes: int = 1, kill_after: float = math.inf, **session: Any) -> int | None:
        """Runs a session in its own processes and counts what must not happen. Its exit status; None where it hung."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        children = [start(lambda rank=r: self._session(rank, processes, address, **session)) for r in range(processes)]
        statuses = []
        for child in children:
            try:
                statuses.append(status_of(child, SECONDS, kill_after=kill_after))
            except TimeoutError:
                self.count.hangs += 1
                return None
        self.statuses, ended = statuses, max(statuses, key=abs)
        self.count.wrong += ended not in expected
        self.count.refused += ended == REFUSED
        step = self.last_checkpoint()
        digest = _digest(self.out / f"checkpoint-{step}")
        before, self._newest = self._newest, (step, digest)
        self.count.checkpoints_lost += step < before[0] or (step == before[0] > 0 and digest != before[1])
        return ended

    def charged(self) -> int:
        """The ledger's steps, compared with what was seen."""
        steps, seen = read_ledger(self.ledger).num_steps, self.observed_path.stat().st_size
        self.count.under_reports += steps < seen
        self.count.charged_twice = max(self.count.charged_twice, steps - seen)
        return steps

    def last_checkpoint(self) -> int:
        """The step of the newest whole checkpoint, or 0."""
        return max((int(p.parent.name.rpartition("-")[2]) for p in self.out.glob(f"*/{COMPLETE}")), default=0)

    def _session(
        self,
        rank: int,
        processes: int,
        address: dict[str, str],
        *,
        steps: int,
        privacy: dict[str, Any] | None = None,
        callbacks: tuple[TrainerCallback, ...] = (),
        dies_after: int | None = None,
        poison: tuple[str, float] | None = None,
        **settings: Any,
    ) -> None:
        """Trains on to `steps` from the newest whole checkpoint, then leaves the process."""
        torch.manual_seed(0)
        if processes > 1:
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            os.environ.update(address | ranks | {"ACCELERATE_USE_CPU": "true"})
            settings["ddp_backend"] = "gloo"
        watch = [Observer(self.observed_path, dies_after)] if rank == 0 else []
        saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 3}
        options = {**saving, "learning_rate": 0.01, "max_steps": steps, **settings}
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            try:
                model = None if poison is None else M.poisoned(*poison)
                trainer = runs.trainer(
                    self.out, model, {**PRIVACY, **(privacy or {})}, callbacks=[*watch, *callbacks], **options
                )
                trainer.train(resume_from_checkpoint=self.last_checkpoint() > 0 or None)
            except HfDpError:
                os._exit(REFUSED)
            finite = all(bool(p.isfinite().all()) for p in trainer.model.parameters())
            os._exit(WENT_ON if finite else NOT_FINITE)


def _digest(folder: Path) -> str:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in files)).hexdigest()


def kill(victim: Victim) -> None:
    """SIGKILL at a random moment of one long run, which is then resumed."""
    if victim.count.planted == 0:
        victim.run(WENT_ON, steps=2)
    victim.run(KILLED, steps=100_000, kill_after=victim.generator.uniform(0.05, 1.5))
    victim.charged()


def fill_the_disk(victim: Victim) -> None:
    """No file may grow beyond a random size, from a random step on; then there is room again."""
    if victim.count.planted == 0:
        victim.run(WENT_ON, steps=2)
    step, size = victim.last_checkpoint(), victim.ledger.stat().st_size
    limit = Limit(step + victim.generator.randrange(2), size + victim.generator.choice([0, 10, 200, 400, 4000]))
    victim.run(FAILED, REFUSED, steps=step + 4, callbacks=(limit,))
    victim.charged()
    victim.run(WENT_ON, steps=victim.last_checkpoint() + 2)
    victim.charged()


def tear(victim: Victim) -> None:
    """The last record, of a step behind the last checkpoint, is cut short: charged all the same."""
    before, sound = _a_step_behind_the_checkpoint(victim)
    last = sound.rstrip(b"\n").rpartition(b"\n")[2]
    victim.ledger.write_bytes(sound[: len(sound) - 1 - victim.generator.randrange(len(last))])
    victim.run(WENT_ON, steps=victim.last_checkpoint() + 2)
    victim.count.wrong += victim.charged() < before + 2


def alter(victim: Victim) -> None:
    """One bit of the ledger is changed: refused, until it is put back."""
    before, sound = _a_step_behind_the_checkpoint(victim)
    place, bit = victim.generator.randrange(len(sound)), 1 << victim.generator.randrange(8)
    victim.ledger.write_bytes(sound[:place] + bytes([sound[place] ^ bit]) + sound[place + 1 :])
    victim.run(REFUSED, steps=victim.last_checkpoint() + 2)
    victim.ledger.write_bytes(sound)
    victim.run(WENT_ON, steps=victim.last_checkpoint() + 2)
    victim.count.wrong += victim.charged() < before + 2


def _a_step_behind_the_checkpoint(victim: Victim) -> tuple[int, bytes]:
    if victim.count.planted == 0:
        victim.run(WENT_ON, steps=2)
    step = victim.last_checkpoint()
    victim.run(KILLED, steps=step + 4, dies_after=step + 1)
    return victim.charged(), victim.ledger.read_bytes()


CHANGES: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (WENT_ON, {"noise_multiplier": 2.0}, {}),
    (WENT_ON, {"clip_norm": 0.7}, {}),
    (WENT_ON, {"expected_batch_size": 12}, {}),
    (WENT_ON, {}, {"per_device_train_batch_size": 1}),
    (REFUSED, {"target_delta": 1e-4}, {}),
    (REFUSED, {"debug_seed": 1}, {}),
    (REFUSED, {}, {"count": 23}),
    (REFUSED, {}, {"seed": 5}),
]


def change_the_settings(victim: Victim) -> None:
    """Another sigma, C or q becomes a segment of its own; another delta, mode, N or data set is refused."""
    if victim.count.planted == 0:
        victim.run(WENT_ON, steps=2)
    expected, privacy, settings = CHANGES[victim.count.planted % len(CHANGES)]
    if expected == REFUSED and settings:
        settings = {"train_dataset": runs.text_rows(**settings)}
    before = victim.charged()
    victim.run(expected, steps=victim.last_checkpoint() + 2, privacy=privacy, **settings)
    victim.count.wrong += victim.charged() != before + (2 if expected == WENT_ON else 0)


def change_the_processes(victim: Victim) -> None:
    """Resumed on another number of processes."""
    processes = (1, 2, 3, 2)[victim.count.planted % 4]
    victim.run(WENT_ON, steps=victim.last_checkpoint() + 2, processes=processes)
    victim.count.wrong += victim.charged() != 2 * (victim.count.planted + 1)


def plant_no_number(victim: Victim) -> None:
    """A record with gradients that are no numbers, in a random layer: weights stay finite, every step is charged."""
    layer = victim.generator.choice(["model.embed_tokens", "model.layers.0.mlp", "model.norm", "lm_head"])
    bad = victim.generator.choice([math.nan, math.inf, 1e38])
    rows = [
        *runs.text_rows(23).to_list(),
        {"input_ids": [5, M.MARK, 7], "attention_mask": [1] * 3, "labels": [-100, 6, 7]},
    ]
    victim.run(
        WENT_ON,
        steps=victim.last_checkpoint() + 2,
        privacy={"expected_batch_size": 24},
        train_dataset=runs.Dataset.from_list(rows),
        poison=(layer, bad),
    )
    victim.count.wrong += victim.charged() != 2 * (victim.count.planted + 1)


FAULTS: dict[str, Callable[[Victim], None]] = {
    "SIGKILL at a random moment": kill,
    "disk full": fill_the_disk,
    "torn ledger": tear,
    "altered ledger": alter,
    "changed settings": change_the_settings,
    "changed number of processes": change_the_processes,
    "example that is no number": plant_no_number,
}


def campaign(fault: str, folder: Path, times: int, seed: int) -> Iterator[Count]:
    """Plants a fault so many times in one run; yields the count after each."""
    victim = Victim(folder, random.Random(seed))
    for _ in range(times):
        FAULTS[fault](victim)
        victim.count.planted += 1
        yield victim.count
