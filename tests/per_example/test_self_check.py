"""The self-check catches whatever couples examples or keeps something of them, and passes models that do neither."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from hf_dp.errors import CaptureError, SelfCheckError, UnsupportedParameterError
from hf_dp.per_example import losses
from hf_dp.per_example.self_check import Report, self_check
from tests.support import engine, runs
from tests.support import models as M

Batch = dict[str, Tensor]
LENGTHS = (5, 9, 7)


def token_rows(left: bool = False) -> list[Batch]:
    """Three rows of different lengths, collated together and then alone."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, M.VOCAB, (n,), generator=generator) for n in LENGTHS]
    return [_collated(rows, left), *(_collated([row], left) for row in rows)]


def _collated(rows: list[Tensor], left: bool) -> Batch:
    longest = max(len(r) for r in rows)
    ids, mask, labels = (torch.full((len(rows), longest), filler) for filler in (0, 0, -100))
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[i, where], mask[i, where], labels[i, where] = row, 1, row
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def vector_rows(width: int = 4) -> list[Batch]:
    """Three rows of numbers, together and then alone."""
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(1))
    return [{"x": x, "labels": x}, *({"x": x[i : i + 1], "labels": x[i : i + 1]} for i in range(3))]


def lm_loss(model: nn.Module, batch: Batch) -> Tensor:
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    return losses.causal_lm(model(**inputs), losses.predictable(batch["labels"], batch["attention_mask"]))


def square_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["x"]).square().flatten(1).sum(1)


def checked(model: nn.Module, rows: list[Batch], example_losses: Any, clip_norm: float) -> Report:
    def passes(*work: Any) -> Any:
        return engine.passes(model, rows[0], example_losses)(*work)

    return self_check(model, rows, example_losses, clip_norm, passes)


@pytest.mark.parametrize("build", [M.llama, M.gpt2, M.opt, partial(M.with_lora, M.llama), partial(M.with_lora, M.gpt2)])
def test_sound_models_pass(build: Callable[[], nn.Module]) -> None:
    report = checked(build(), token_rows(), lm_loss, 0.05)
    assert report["difference"] < 1e-5  # float32 rounding; the tolerance leaves room for other machines
    assert 0.1 < report["sensitivity"] <= 1 + 1e-5


def test_dropout_does_not_disturb_the_check() -> None:
    model = partial(M.gpt2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)()
    assert checked(model, token_rows(), lm_loss, 0.05)["difference"] < 1e-5


def test_left_padding_with_absolute_positions_is_caught() -> None:
    with pytest.raises(SelfCheckError, match="padding on the left"):
        checked(M.gpt2(), token_rows(left=True), lm_loss, 0.05)


def test_left_padding_with_relative_positions_passes() -> None:
    checked(M.llama(), token_rows(left=True), lm_loss, 0.05)


def test_left_padding_whose_first_token_is_a_target_of_padding_is_caught() -> None:
    def naive(model: nn.Module, batch: Batch) -> Tensor:
        return losses.causal_lm(model(**batch), batch["labels"])

    with pytest.raises(SelfCheckError, match="padding on the left"):
        checked(M.llama(), token_rows(left=True), naive, 0.05)


def test_a_mean_over_the_batch_is_caught() -> None:
    def mean(model: nn.Module, batch: Batch) -> Tensor:
        return lm_loss(model, batch) / len(batch["labels"])

    with pytest.raises(SelfCheckError, match="averaged over the batch"):
        checked(M.llama(), token_rows(), mean, 0.05)


def test_a_mean_over_the_batchs_tokens_is_caught() -> None:
    def token_mean(model: nn.Module, batch: Batch) -> Tensor:
        return lm_loss(model, batch) * len(batch["labels"]) / (batch["labels"] != -100).sum()

    with pytest.raises(SelfCheckError, match="averaged over the batch or over its"):
        checked(M.llama(), token_rows(), token_mean, 0.05)


def test_a_routers_auxiliary_loss_is_caught() -> None:
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    model = M.with_lora(
        lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**{**M.DECODER, **settings})),
        target_modules=["q_proj", "v_proj"],
    )

    def with_auxiliary(model: nn.Module, batch: Batch) -> Tensor:
        outputs = model(**batch)
        return losses.causal_lm(outputs, batch["labels"]) + outputs.aux_loss

    with pytest.raises(SelfCheckError, match="router's auxiliary loss"):
        checked(model, token_rows(), with_auxiliary, 0.05)
    checked(model, token_rows(), lm_loss, 0.05)  # without it the same model is sound


def test_batch_norm_is_caught() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 2))

    def doubled(model: nn.Module, batch: Batch) -> Tensor:  # BatchNorm wants more than one value a channel
        return model(torch.stack([batch["x"], 3 * batch["x"]], 1).flatten(0, 1)).square().sum(1).view(-1, 2).sum(1)

    with pytest.raises(SelfCheckError, match=r"writes to 1.running_mean, 1.running_var"):
        checked(model, vector_rows(), doubled, 0.05)
    model[1].track_running_stats, model[1].running_mean, model[1].running_var = False, None, None
    with pytest.raises(SelfCheckError, match="batch statistics"):
        checked(model, vector_rows(), doubled, 0.05)


class _Mixes(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y - 0.5 * y.mean(0, keepdim=True)


def test_a_layer_that_mixes_examples_is_caught() -> None:
    with pytest.raises(SelfCheckError, match="a layer that mixes examples"):
        checked(_Mixes(4, 3), vector_rows(), square_loss, 0.05)


class _GradientByHand(torch.autograd.Function):
    """A linear map that writes its weight's gradient into `.grad` by itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return x @ layer.weight.data.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        ctx.layer.weight.grad = grads[0].t() @ x
        return grads[0] @ ctx.layer.weight.data, None


class _Bypass(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return _GradientByHand.apply(x, self)


def test_a_gradient_written_past_the_capture_is_caught() -> None:
    model = nn.Sequential(nn.Linear(4, 4), _Bypass(4, 3, bias=False))
    with pytest.raises((UnsupportedParameterError, CaptureError), match=r"1.weight"):
        checked(model, vector_rows(), square_loss, 0.05)


class _KeepsTheLast(nn.Linear):
    """Stores the mean of what it saw in its own weight, or in a frozen one, in place and without gradient."""

    def __init__(self, where: str) -> None:
        super().__init__(4, 4)
        self.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            {"bias": self.bias, "frozen": self.frozen, "weight": self.weight.data[0]}[self.where].copy_(x.mean(0))
        return super().forward(x)


@pytest.mark.parametrize("where", ["bias", "frozen", "weight"])
def test_a_layer_that_writes_what_it_saw_into_its_parameters_is_caught(where: str) -> None:
    model = _KeepsTheLast(where)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(SelfCheckError, match=rf"writes to {where}"):
        checked(model, vector_rows(), square_loss, 0.05)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_a_loss_that_is_no_longer_finite_is_caught() -> None:
    with pytest.raises(SelfCheckError, match="nan"):
        checked(nn.Linear(4, 3), vector_rows(), lambda m, b: square_loss(m, b) * float("nan"), 0.05)


def test_the_model_and_the_generators_are_left_as_they_were() -> None:
    model = M.gpt2().eval()
    values, state = {n: v.clone() for n, v in model.state_dict().items()}, torch.get_rng_state()
    checked(model, token_rows(), lm_loss, 0.05)
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, values[n]) for n, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


UNDER_AUTOCAST: set[bool] = (
    set()
)  # of the module: what a hook's closure holds is put back after a check, as all of a model


def note_autocast(*_: Any) -> None:
    UNDER_AUTOCAST.add(torch.is_autocast_enabled("cpu"))


def test_a_trainer_checks_in_the_precision_of_its_training_however_often_it_trains(tmp_path: Path) -> None:
    """Accelerate puts the forward under autocast within `train`: the check before it runs in that precision too."""
    model = M.with_lora(M.llama)
    trainer = runs.trainer(tmp_path, model, bf16=True)
    UNDER_AUTOCAST.clear()
    model.get_base_model().model.layers[0].register_forward_hook(note_autocast)
    trainer.self_check()
    assert len(UNDER_AUTOCAST) == 1
    assert all(UNDER_AUTOCAST)
    trainer.train()
    assert trainer.self_check()["tolerance"] == 0.08  # that of bfloat16, after training too
