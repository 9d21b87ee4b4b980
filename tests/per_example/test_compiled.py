"""Compiled blocks give the same factors and the same training as the pass without them, and leave the model alone."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_dp.errors import SelfCheckError, UnsupportedOptionError
from hf_dp.per_example import factors as fx
from hf_dp.per_example import losses
from hf_dp.per_example.batches import MicroBatch
from hf_dp.per_example.capture import per_example_factors
from hf_dp.per_example.compiled import CHECKPOINT, AnchoredLinear, CompiledBlocks
from hf_dp.per_example.forms import ONE, Forms
from hf_dp.per_example.inventory import Inventory, Row, take_inventory
from tests.support import models as M
from tests.support import runs
from tests.support.marks import quick

LORA_WITH_HEAD = partial(M.with_lora, M.bert, task_type="SEQ_CLS", target_modules=["query", "value"])


def example_losses(kind: str, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    batch = dict(batch)
    labels = batch.pop("labels")
    return losses.LOSSES[kind](model(**batch), labels)


def gradients(factors: dict[str, list[fx.Factor]]) -> dict[str, Tensor]:
    return {name: sum(map(fx.materialise, uses)).detach() for name, uses in factors.items()}


CASES: dict[str, tuple[Callable[[], nn.Module], str, Callable[..., dict[str, Tensor]]]] = {
    "llama": (partial(M.with_lora, M.llama), "ForCausalLM", M.token_batch),
    "gpt2, whose base is transposed": (partial(M.with_lora, M.gpt2), "ForCausalLM", M.token_batch),
    "bert, with a head outside of the blocks": (LORA_WITH_HEAD, "ForSequenceClassification", M.class_batch),
}


@pytest.mark.parametrize("case", quick(("llama",), CASES))
def test_factors_are_those_of_the_pass_without_compiling(case: str) -> None:
    build, kind, make = CASES[case]
    torch.manual_seed(0)
    model = build().eval()  # no dropout: masks would differ
    modules, values = dict(model.named_modules()), {n: p.clone() for n, p in model.named_parameters()}
    graphs: list[Any] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    inventory = take_inventory(model, MicroBatch(make(), 3), partial(example_losses, kind))
    compiled, plainly = CompiledBlocks(model, inventory, counting), partial(per_example_factors, forms=inventory.forms)
    for examples, length in ((3, 9), (5, 11), (1, 7)):
        batch = make(examples, length)
        work = model, partial(example_losses, kind, model, batch), examples
        (ours, own_losses), (theirs, plain_losses) = compiled(*work), plainly(*work)
        assert torch.allclose(own_losses, plain_losses, rtol=1e-5)
        ours, theirs = gradients(ours), gradients(theirs)
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            assert float((ours[name] - gradient).norm() / gradient.norm().clamp_min(1e-12)) < 1e-5, name
    assert 1 <= len(graphs) <= 4  # they were traced, once for blocks of a kind and not once for each size
    assert list(dict(model.named_modules()).items()) == list(modules.items())
    assert all(torch.equal(p, values[n]) and p.grad is None for n, p in model.named_parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_run_their_graphs_twice(reentrant: bool) -> None:
    """Forward, and again in backward: nothing between them was kept. The eager pass is the slow twin."""
    torch.manual_seed(0)
    model, calls = M.with_lora(M.llama).train(), [0]
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    own = [vars(m)[CHECKPOINT] for m in model.modules() if CHECKPOINT in vars(m)]

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def forward(*args: Any) -> Any:
            calls[0] += 1
            return graph.forward(*args)

        return forward

    work = partial(example_losses, "ForCausalLM")
    inventory = take_inventory(model, MicroBatch(M.token_batch(), 3), work)
    compiled = CompiledBlocks(model, inventory, counting, checkpointing=True)
    for examples, length in ((3, 9), (4, 11)):
        batch, calls[0] = M.token_batch(examples, length), 0
        ours = gradients(compiled(model, partial(work, model, batch), examples)[0])
        assert calls[0] == 2 * len(model.get_base_model().model.layers)
        theirs = gradients(per_example_factors(model, partial(work, model, batch), examples, forms=inventory.forms)[0])
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            assert float((ours[name] - gradient).norm() / gradient.norm().clamp_min(1e-12)) < 1e-5, name
    assert [vars(m)[CHECKPOINT] for m in model.modules() if CHECKPOINT in vars(m)] == own


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-ins without the compiler, which takes seconds."""
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)


@pytest.mark.usefixtures("untraced")
def test_norms_are_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    model, batch = M.with_lora(M.llama), M.token_batch(4, 9)
    losses_of = partial(example_losses, "ForCausalLM")
    with torch.autocast("cpu", torch.bfloat16):
        inventory = take_inventory(model, MicroBatch(batch, len(batch["labels"])), losses_of)
        work = model, partial(losses_of, model, batch), 4
        ours = gradients(CompiledBlocks(model, inventory)(*work)[0])
        theirs = gradients(per_example_factors(*work, forms=inventory.forms, pairs=False)[0])
    assert all(g.dtype == torch.float32 for g in ours.values())
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).norm() / gradient.norm()) < 1e-2, name  # bf16 has 8 bits


@pytest.mark.usefixtures("untraced")
def test_the_model_is_as_it_was_after_an_error() -> None:
    model = M.with_lora(M.llama)
    before = dict(model.named_modules())
    compiled = CompiledBlocks(
        model, take_inventory(model, MicroBatch(M.token_batch(), 3), partial(example_losses, "ForCausalLM"))
    )

    def failing() -> Tensor:
        example_losses("ForCausalLM", model, M.token_batch(4))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        compiled(model, failing, 4)
    assert list(dict(model.named_modules()).items()) == list(before.items())


def sums_of(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[Tensor]:
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        sums = runs.record_sums(patch)
        runs.trainer(folder, max_steps=2, **settings).train()
    return sums


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])  # inductor needs a C++ compiler, and a minute
def test_a_training_has_the_same_sums(
    backend: str, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = sums_of(tmp_path / "plain", monkeypatch)
    settings = {"torch_compile": True, "torch_compile_backend": backend, "gradient_checkpointing": checkpointing}
    compiled = sums_of(tmp_path / "compiled", monkeypatch, **settings)
    for a, b in zip(compiled, plain, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-5


@pytest.mark.usefixtures("untraced")
def test_the_self_check_goes_through_what_was_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = AnchoredLinear.backward

    def mixing(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gx, nothing, by_example = right(ctx, *grads)
        return gx, nothing, by_example.flip(0)

    monkeypatch.setattr(AnchoredLinear, "backward", staticmethod(mixing))
    with pytest.raises(SelfCheckError, match="differs from its gradient alone"):
        runs.trainer(tmp_path, torch_compile=True).train()


@pytest.mark.slow
@pytest.mark.usefixtures("untraced")
def test_what_cannot_be_compiled_is_refused_by_name(tmp_path: Path) -> None:
    for model, words in (
        (M.llama(), r"found in them, .*input_layernorm\.weight"),
        (M.with_lora(M.llama, lora_bias=True), r"found in them, .*lora_B\.default\.bias"),
        (M.with_lora(M.llama, use_dora=True), r"found in them, .*lora_magnitude_vector"),
        (M.with_lora(M.llama, target_modules=["lm_head"]), "found no such parameter"),
    ):
        with pytest.raises(UnsupportedOptionError, match=words):
            runs.trainer(tmp_path, model, torch_compile=True)
    plain = nn.Sequential(nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(2)))
    forms = Forms({(f"0.{n}.weight", "linear", 3): ONE for n in range(2)})
    rows = [Row(f"0.{n}.weight", (3, 3), "linear", "") for n in range(2)]
    with pytest.raises(UnsupportedOptionError, match="Linear is not checkpointed by itself"):
        CompiledBlocks(plain, Inventory(rows, forms), checkpointing=True)
    with pytest.raises(UnsupportedOptionError, match="torch_compile_mode=reduce-overhead"):
        runs.trainer(tmp_path, torch_compile_mode="reduce-overhead")
