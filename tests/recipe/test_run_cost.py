"""What `hf-dp plan` says of a run's cost, against runs: passes, bytes of factors held, numbers reduced."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn
from transformers import LlamaConfig

from hf_dp.cli.plan import plan
from hf_dp.errors import ConfigError
from hf_dp.mechanism import Mechanism
from hf_dp.per_example import capture
from hf_dp.per_example.factors import Dense, Outer
from hf_dp.recipe import model_shapes, run_cost
from hf_dp.recipe.run_cost import Shapes, Work
from hf_dp.sampling.poisson import PoissonSampler
from hf_dp.step import PrivateStep
from tests.cli.test_plan import number
from tests.support import models as M
from tests.support import runs
from tests.support.marks import quick

SIZE: dict[str, Any] = {"num_examples": 1000, "expected_batch_size": 40, "max_steps": 10, "noise_multiplier": 1.0}


def mechanism(**k: Any) -> Mechanism:
    settings = {"num_examples": 1000, "expected_batch_size": 40, "num_steps": 10, "noise_multiplier": 1.0}
    return Mechanism(**{**settings, "clip_norm": 1.0, "delta": 1e-4, "target_epsilon": None, **k})


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize(("examples", "tokens"), [(1, None), (8, None), (16, 60)])
def test_micro_batches_are_the_mean_over_draws(processes: int, examples: int, tokens: int | None) -> None:
    """Within 5 standard errors of the sampler's own draws; ceil(B / W / b), of the mean draw, is mostly outside."""
    work, draws = Work(processes, examples, tokens, length=20), 2000
    b = 3 if tokens else examples
    sampler = PoissonSampler(1000, 0.04, 1, key=1)
    taken = [np.ceil(len(sampler.draw(i)[0::processes]) / b) for i in range(draws)]
    expected = run_cost.micro_batches(mechanism(), work)
    assert abs(np.mean(taken) - expected) < 5 * np.std(taken) / np.sqrt(draws)
    whole = mechanism(expected_batch_size=1000)
    assert run_cost.micro_batches(whole, work) == np.ceil(np.ceil(1000 / processes) / b)


@pytest.mark.slow
def test_passes_of_a_run_are_those_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, add, steps = [0], PrivateStep.add, 60

    def counting(step: PrivateStep, batch: Any) -> None:
        passes[0] += 1
        add(step, batch)

    monkeypatch.setattr(PrivateStep, "add", counting)
    privacy = {"noise_multiplier": 1.0, "target_delta": 1e-3, "expected_batch_size": 8}
    trainer = runs.trainer(
        tmp_path, None, privacy, learning_rate=0.0, max_steps=steps, logging_steps=steps, per_device_train_batch_size=3
    )
    trainer.train()
    expected = run_cost.micro_batches(trainer.mechanism, Work(1, 3, None, 15))
    # n has a variance of at most B; passes n / b, rounded up, spread by a third of that and by rounding, at most 1/2
    assert abs(passes[0] / steps - expected) < 5 * (8**0.5 / 3 + 0.5) / steps**0.5


CASES: dict[str, Callable[[], nn.Module]] = {
    "Llama with LoRA": lambda: M.with_lora(M.llama),
    "GPT-2 with LoRA": lambda: M.with_lora(M.gpt2),
    "Llama": M.llama,
    "GPT-2": M.gpt2,  # its head is its table
}


@pytest.mark.parametrize("name", quick(("Llama with LoRA",), CASES))
def test_memory_is_that_of_the_factors_of_a_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    norms = capture.squared_norms

    def weighing(factors: Any, blocks: Any, losses: Any) -> Any:
        tensors = [t for uses in factors.values() for f in uses for t in parts(f)] + [b.gradients for b in blocks]
        held.append(sum(t.numel() * t.element_size() for t in tensors))
        return norms(factors, blocks, losses)

    monkeypatch.setattr(capture, "squared_norms", weighing)
    model, rows = CASES[name](), runs.text_rows(8)
    rows = runs.Dataset.from_list([{name: [1, *row[name][1:], *[5] * 20][:12] for name in row} for row in rows])
    for size in (1, 4):
        trainer = runs.trainer(
            tmp_path / str(size),
            model,
            {**runs.NOISELESS, "expected_batch_size": 8},
            train_dataset=rows,
            per_device_train_batch_size=size,
        )
        trainer.train()
        shapes = model_shapes.of_model(trainer.model)
        assert shapes.trainable == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        bound = run_cost.per_example_gradients(shapes, Work(1, size, None, 12))
        assert 0.95 * bound < held[-1] <= bound
        if size == 1 or "LoRA" in name:
            assert held[-1] == bound


def parts(factor: Any) -> list[Any]:
    if isinstance(factor, Dense):
        return [factor.gradient]
    return [factor.inputs, factor.grads] if isinstance(factor, Outer) else [factor.rows, factor.grads]


def test_a_model_by_its_name_is_the_model_that_is_loaded(tmp_path: Path) -> None:
    """Without a weight read: the file with them is not even there."""
    config = LlamaConfig(**M.DECODER, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    assert model_shapes.of_name(str(tmp_path), 4) == model_shapes.of_model(M.with_lora(M.llama, r=4))
    assert model_shapes.of_name(str(tmp_path), None) == model_shapes.of_model(M.llama())


def test_plan_says_what_a_run_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaConfig(**M.DECODER, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    work = {"lora_r": 4, "num_processes": 2, "per_device_train_batch_size": 16, "micro_batch_tokens": 60}
    plan(**SIZE, model=str(tmp_path), max_length=20, **work)
    text = capsys.readouterr().out
    assert number(text, "examples of a micro-batch b") == 3
    expected = run_cost.micro_batches(mechanism(), Work(2, 16, 60, 20))
    assert number(text, "micro-batches a step") == pytest.approx(expected, abs=0.05)  # one digit is printed
    trainable = model_shapes.of_model(M.with_lora(M.llama, r=4)).trainable
    assert f"{run_cost.size(4 * (trainable + 3))} " in re.search(r"all-reduced a step.*", text)[0]
    plan(**SIZE, model=str(tmp_path))
    assert "nothing" in re.search(r"all-reduced a step.*", capsys.readouterr().out)[0]


def test_noise_on_whole_numbers_takes_a_pass_an_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaConfig(**M.DECODER, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    plan(**SIZE, model=str(tmp_path), lora_r=4, num_processes=2, per_device_train_batch_size=16, noise="discrete")
    text = capsys.readouterr().out
    assert number(text, "examples of a micro-batch b") == 1
    assert number(text, "micro-batches a step") == pytest.approx(
        20.25, abs=0.06
    )  # half of 40, rounded up where n is odd
    trainable = model_shapes.of_model(M.with_lora(M.llama, r=4)).trainable
    assert f"{run_cost.size(8 * (trainable + 3))} " in re.search(r"all-reduced a step.*", text)[0]
    assert number(text, "integer sensitivity D") == 1 << 22


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lora_r": 4, "num_processes": 2}, "--lora-r, --num-processes only say what a model's run costs: add --model"),
        ({"model": "no/such/model"}, "neither a model's folder nor a name"),
        ({"model": ".", "num_processes": 0}, "--num-processes: expected 1 or more, got 0"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**SIZE, **arguments)


def test_sizes_are_readable() -> None:
    assert [run_cost.size(n) for n in (12, 2048, 1536 * 1024, 1 << 40)] == ["12 bytes", "2 KiB", "1.5 MiB", "1024 GiB"]
    assert run_cost.all_reduced(mechanism(), Shapes(10, 40, 5)) == 4 * 8
    assert run_cost.all_reduced(mechanism(loss_bound=1.0), Shapes(10, 40, 5)) == 4 * 10
