"""The table of what the plan says of each architecture is what `scripts/architectures` prints."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "hf_dp/per_example/README.md").read_text(encoding="utf-8").splitlines()
SHOWN = [line for line in PAGE if line.startswith("| ")][1:]
PEOPLE_TAKE = "Llama Mistral Qwen2 Qwen3 Gemma Phi-3 BERT RoBERTa T5 BART GPT-2 ViT Whisper".split()


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts/architectures"))


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["Whisper", "gpt-oss", "ResNet"])
def test_rows_of_the_table_are_what_the_plan_says(script: dict[str, Any], name: str) -> None:
    assert script["row"](name) in SHOWN


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_table_is_what_the_plan_says(script: dict[str, Any]) -> None:
    assert script["table"](list(script["MODELS"]))[2:] == SHOWN


def test_what_most_people_take_is_proved() -> None:
    assert len(SHOWN) >= 40
    assert {f"| {name} | proved | proved |" for name in PEOPLE_TAKE} <= set(SHOWN)
