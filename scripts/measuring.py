"""What the benchmarks share: ratios with their intervals, and peak memory in a process of its own."""

import os
import statistics
import subprocess
import sys
from math import comb


def interval(ratios: list[float]) -> tuple[float, float]:
    """Order statistics that hold the median with 95 % confidence or more (all of them, where there are too few)."""
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
    """Starts the high-water mark anew."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def in_a_process(*command: str) -> subprocess.CompletedProcess[str]:
    """Python, with an allocator that gives back at once what is freed, so that memory held is memory needed."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment.pop("MALLOC_MMAP_MAX_", None)
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)
