"""Groups of workers and their scenarios -> exit statuses and findings of every process. None outlives the time-out."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.distributed import worker

WORKER = str(Path(worker.__file__))
SECONDS = 900.0  # on a busy machine too


def environment(**changed: Any) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "TORCHELASTIC"))}
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "GLOO_SOCKET_IFNAME": "lo"}
    root = {"PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), kept.get("PYTHONPATH")]))}
    return {**kept, **quiet, **root, **{k: str(v) for k, v in changed.items()}}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run_groups(*groups: list[Any], seconds: float = SECONDS) -> tuple[list[list[int]], str]:
    """Exit statuses of each group of workers [world, folder, scenario, ...], and what they said on stderr."""
    words = [str(word) for group in groups for word in ("--fork", *group)]
    done = finish([sys.executable, WORKER, *words], seconds=seconds)[0]
    return [[int(word) for word in line.split()] for line in done.stdout.splitlines()], done.stderr


def finish(*commands: list[str], seconds: float = SECONDS) -> list["subprocess.CompletedProcess[str]"]:
    """Runs commands at once, each in its own session; all that they start ends with them, or with the time-out."""
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(c, env=environment(), start_new_session=True, **streams) for c in commands]
    try:
        said = [process.communicate(timeout=seconds) for process in started]
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return [subprocess.CompletedProcess(p.args, p.returncode, *s) for p, s in zip(started, said, strict=True)]


def collected(folder: Path, world: int, *names: str) -> dict[str, list[dict[str, Any]]]:
    """What every process found out, by scenario."""
    return {n: [torch.load(folder / f"{n}.{r}.pt", weights_only=True) for r in range(world)] for n in names}


def results(folder: Path, world: int, *names: str) -> dict[str, list[dict[str, Any]]]:
    statuses, errors = run_groups([world, folder, *names])
    assert statuses == [[0] * world], errors
    return collected(folder, world, *names)


def all_alike(values: list[Any]) -> bool:
    return all(v == values[0] for v in values)
