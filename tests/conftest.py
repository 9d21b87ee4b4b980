"""What every test shares: one thread, a fixed seed, no network, quiet libraries."""

import gc
import os
import sys
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_DISABLED", "true")
os.environ["COLUMNS"] = "132"  # so that the words of a table's cell stay on one line

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_dp.cli import main

torch.set_num_threads(1)
LONG = ("distributed", "training", "test_schedule.py", "test_mutants.py", "test_readme.py", "ledger", "audit")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real text that `HF_DP_DATA` names; tests that want it are skipped where it is not."""
    folder = Path(os.environ.get("HF_DP_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}: set HF_DP_DATA to run this test")
    return folder


@pytest.fixture
def hf_dp(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs `hf-dp ARGUMENTS` in this process: (exit status, stdout, stderr)."""

    def run(*arguments: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-dp", *map(str, arguments)])
        status: Any = 0
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files, and folders of such, come first, so that no process is left with one of them at the end."""
    items.sort(key=lambda item: next((i for i, name in enumerate(LONG) if name in item.path.parts), len(LONG)))


def pytest_collection_finish() -> None:
    """Trainer collects garbage twice a run: it need not walk through the libraries each time."""
    gc.collect()
    gc.freeze()
