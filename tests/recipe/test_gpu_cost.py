"""What `hf-dp plan` says of memory, speed and days, against a pass that is made here, and by hand where none can be."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from hf_dp.cli.plan import plan
from hf_dp.errors import ConfigError
from hf_dp.per_example import MicroBatch, per_example_factors, take_inventory
from hf_dp.per_example.head import next_token_losses
from hf_dp.recipe import gpu_cost, model_shapes, run_cost
from hf_dp.recipe.run_cost import Shapes, Work
from tests.recipe.test_run_cost import mechanism
from tests.support import models as M

B, L = 4, 128
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4}


class Pass(NamedTuple):
    model: nn.Module
    run: Callable[[], Any]


@pytest.fixture(scope="module")
def small() -> Pass:
    """A pass over 4 examples of 128 tokens through a Llama with LoRA, its logits formed in full."""
    torch.manual_seed(0)
    model = M.with_lora(
        lambda: LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=512, max_position_embeddings=L, use_cache=False)), r=8
    )
    ids = torch.randint(0, 512, (B, L))
    batch = MicroBatch({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}, B)

    def losses(model: Any, batch: Any) -> torch.Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return next_token_losses(model, model.get_base_model(), inputs, batch["labels"], 0.0)

    forms = take_inventory(model, batch, losses).forms
    run = partial(per_example_factors, model, lambda: losses(model, batch), B, forms=forms)
    run()
    return Pass(model, run)


def peak(run: Callable[[], Any]) -> int:
    """The most bytes that live at once of those that are allocated within."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = run()
    live = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    del kept
    return most


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_that_of_a_pass(small: Pass, checkpointing: bool) -> None:
    shapes = model_shapes.of_model(small.model)
    stated = gpu_cost.memory(shapes, Work(1, B, None, L))
    if checkpointing:
        small.model.gradient_checkpointing_enable({"use_reentrant": False})
        small.model.enable_input_require_grads()
    measured = peak(small.run)
    small.model.gradient_checkpointing_disable()
    of_a_pass = stated.total(sharded=False, checkpointing=checkpointing) - stated.weights - stated.trained
    assert 0.75 < of_a_pass / measured < 1.25


def test_operations_are_those_that_are_counted(small: Pass) -> None:
    with FlopCounterMode(display=False) as counted:
        small.run()
    stated = B * L * gpu_cost.operations(model_shapes.of_model(small.model), L)
    # norms and sums of the adapter's gradients are left out, which count in a model of 64 hidden units alone
    assert 0.75 < stated / counted.get_total_flops() < 1.1


BIG = Shapes(  # 8 B in bfloat16 with LoRA, as of Llama 3
    parameters=8_030_000_000,
    bytes_of_weights=16_100_000_000,
    trainable=42_000_000,
    linear=((4096, 16),) * 32,
    maps=((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)) * 32,
    blocks=32,
    width=4096,
    vocabulary=128_256,
)


def said(shapes: Shapes, work: Work, gpu: str | None = None) -> dict[str, str]:
    rows = gpu_cost.derivation(mechanism(), shapes, work, gpu)
    return {row[0]: f"{row[1]} {row[2]}" for row in rows}


def test_weights_are_sharded_where_they_do_not_fit() -> None:
    whole = said(BIG, Work(64, 8, None, 256))
    assert "weights 14.99 GiB" in whole["memory a GPU"]
    assert "gathered" not in whole["tokens a second"]
    seventy = BIG._replace(parameters=70_000_000_000, bytes_of_weights=140_000_000_000, maps=BIG.maps * 8, blocks=80)
    shards = said(seventy, Work(64, 8, None, 256))
    assert "weights in shards 5.297 GiB" in shards["memory a GPU"]  # 140 GB / 64 + 2 / 80 of 140 GB
    assert "gathered twice a pass at 50 GB/s, which takes longer than computing" in shards["tokens a second"]
    assert "MORE THAN AN H100 HAS" in said(seventy, Work(1, 8, None, 256))["memory a GPU"]
    full = seventy._replace(trainable=seventy.parameters)
    assert "MORE THAN AN H200 HAS" in said(full, Work(64, 8, None, 256), "h200")["memory a GPU"]


def test_speed_and_days_are_as_worked_out_by_hand() -> None:
    work = Work(1, 8, None, 256)
    seconds = gpu_cost.seconds_of_a_pass(BIG, work, gpu_cost.CARDS["H100"], sharded=False)
    assert seconds == pytest.approx(2048 * 4 * 7.5e9 / (0.4 * 989e12), rel=0.05)  # 7.5 G weights in linear maps
    passes = run_cost.micro_batches(mechanism(), work)
    rows = said(BIG, work, "H200")
    assert rows["tokens a second"].startswith(f"{2048 / seconds:,.0f} ")
    assert float(rows["days"].split()[0]) == pytest.approx(10 * passes * seconds / 86_400, rel=0.01)
    slower = gpu_cost.seconds_of_a_pass(BIG, work, gpu_cost.CARDS["H100"], sharded=True)
    assert slower == pytest.approx(2 * 16.1e9 / 50e9)


def test_plan_says_it_of_64_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaConfig(**M.DECODER, architectures=["LlamaForCausalLM"], dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert model_shapes.of_name(str(tmp_path), None).bytes_of_weights == 2 * model_shapes.of_model(M.llama()).parameters
    settings: dict[str, Any] = {"num_examples": 1000, "expected_batch_size": 40, "max_steps": 10}
    plan(**settings, target_epsilon=8.0, model=str(tmp_path), lora_r=4, num_processes=64, gpu="a100")
    text = " ".join(capsys.readouterr().out.split())
    for words in ("memory a GPU", "tokens a second", "on 64 A100, assumed at 40%", "days", "epsilon"):
        assert words in text
    with pytest.raises(ConfigError, match="--gpu: expected one of A100, H100, H200, L40S, got abacus"):
        plan(**settings, noise_multiplier=1.0, model=str(tmp_path), gpu="abacus")
    with pytest.raises(ConfigError, match="--gpu only say what a model's run costs: add --model"):
        plan(**settings, noise_multiplier=1.0, gpu="H100")
