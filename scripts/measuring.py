"""What benchmarks and studies share: ratios with their intervals, peak memory in a process of its own, pictures, hf-dp
in a process of its own, and what runs came to."""

import json
import math
import os
import statistics
import subprocess
import sys
from math import comb
from pathlib import Path
from typing import Any

# Arguments of Trainer with which a run saves, logs and shows nothing.
QUIET = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}


def interval(ratios: list[float]) -> tuple[float, float]:
    """Two order statistics with the median between them at 95 % confidence or more; the outermost where n is small."""
    n, ordered, below = len(ratios), sorted(ratios), 0.0
    for k in range(n // 2):
        below += comb(n, k) / 2**n
        if below > 0.025:
            return ordered[max(k - 1, 0)], ordered[n - 1 - max(k - 1, 0)]
    return ordered[0], ordered[-1]


def ratio(of: list[float], to: list[float]) -> str:
    """The median over the rounds, and its 95 % interval."""
    ratios = [a / b for a, b in zip(of, to, strict=True)]
    low, high = interval(ratios)
    return f"{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]"


def resident(field: str = "VmRSS") -> int:
    """Bytes of memory that this process holds; with "VmHWM", held at most since `begin_peak`."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def begin_peak() -> None:
    """Resets the high-water mark of this process's memory."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def in_a_process(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with an allocator that returns freed memory at once, so that memory held is memory needed."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment.pop("MALLOC_MMAP_MAX_", None)
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)


def canvas(rows: int, columns: int, *, width: float, height: float) -> tuple[Any, Any]:
    """A figure of `width` by `height` inches that needs no display, and its axes: an array of [rows, columns]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def middles(values: list[list[float]]) -> tuple[list[float], list[list[float]]]:
    """The median of each list; and its distances to the least and to the greatest value, as matplotlib takes errors."""
    medians = [statistics.median(some) for some in values]
    below = [m - min(some) for m, some in zip(medians, values, strict=True)]
    above = [max(some) - m for m, some in zip(medians, values, strict=True)]
    return medians, [below, above]


def save(figure: Any, path: Path) -> None:
    """Writes a figure, each of its axes without a frame above and to the right."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def run_hf_dp(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `hf-dp ARGUMENTS` in a process of its own."""
    command = [sys.executable, "-m", "hf_dp", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def verified(folder: Path) -> bool:
    """Runs `hf-dp verify` on a folder, and prints what it ends with, and whether the card states the unit."""
    done = run_hf_dp("verify", str(folder))
    unit = json.loads((folder / "privacy.json").read_text(encoding="utf-8"))["unit"]
    stated = unit in (folder / "README.md").read_text(encoding="utf-8")
    said = (done.stdout.strip().splitlines() or [done.stderr.strip()])[-1]
    print(
        f"{folder.name}: the card {'states' if stated else 'does not state'} the unit, a {unit}. hf-dp verify: {said}"
    )
    return done.returncode == 0 and stated


class Results:
    """results.json: the settings, by name, and what each run came to. Infinity is null."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        found = json.loads(path.read_text()) if path.exists() else {"settings": {}, "runs": {}}
        if any(settings.get(name, old) != old for name, old in found["settings"].items()):
            raise SystemExit(f"{path} holds runs with other settings: choose another folder, or move it away")
        self.settings, self.runs = {**found["settings"], **settings}, found["runs"]

    def add(self, key: str, figures: dict[str, Any]) -> None:
        self.runs[key] = {name: None if value == math.inf else value for name, value in figures.items()}
        staged = self._path.with_suffix(".new")
        staged.write_text(json.dumps({"settings": self.settings, "runs": self.runs}, indent=1))
        staged.replace(self._path)
