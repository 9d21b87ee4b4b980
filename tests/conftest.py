"""What every test shares: one thread, a fixed seed, no network, quiet libraries."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_DISABLED", "true")

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


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


def pytest_collection_finish() -> None:
    """Trainer collects garbage twice a run: it need not walk through the libraries each time."""
    gc.collect()
    gc.freeze()
