"""The table of what people train: each row equals one example at a time in float64, or is refused with its message.

Models come from their config classes; LoRA's zeros are stirred so that no gradient is hidden. The clip norm is the
median of the gradient norms: coupling would hide where all examples or none are clipped.
"""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    IA3Config,
    LoHaConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor, nn

from hf_dp.errors import CaptureError, UnsupportedParameterError
from hf_dp.per_example import losses
from hf_dp.per_example.batches import MicroBatch
from hf_dp.per_example.capture import Capture, Pass, clipped_gradient_sum, per_example_factors
from hf_dp.per_example.forms import Forms
from tests.support import engine, reference
from tests.support import models as M
from tests.support.marks import quick

# The clip factor aims 1e-6 below C (clipping.ROUNDING_MARGIN); float64 adds nothing to that.
EXACT = 2e-6

LM, CLASSES = ("ForCausalLM", M.token_batch), ("ForSequenceClassification", M.class_batch)
MASKED, TAGS = ("ForMaskedLM", M.token_batch), ("ForTokenClassification", M.tag_batch)
PAIRS, IMAGES = ("ForConditionalGeneration", M.pair_batch), ("ForImageClassification", M.image_batch)
REFERENCE = {
    "ForCausalLM": reference.causal_lm_loss,
    "ForSequenceClassification": reference.classification_loss,
    "ForImageClassification": reference.classification_loss,
    "ForMaskedLM": reference.token_loss,
    "ForTokenClassification": reference.token_loss,
    "ForConditionalGeneration": reference.token_loss,
}

FULL = {
    "llama": (M.llama, LM),
    "llama-tied": (partial(M.llama, tie_word_embeddings=True), LM),
    "mistral": (M.mistral, LM),
    "qwen2": (M.qwen2, LM),
    "qwen3": (M.qwen3, LM),
    "gemma-tied": (M.gemma, LM),
    "gemma2": (M.gemma2, LM),
    "gemma3-scaled-embedding": (M.gemma3, LM),
    "phi3": (M.phi3, LM),
    "gpt2-conv1d-tied-broadcast-positions": (M.gpt2, LM),
    "gpt-neox": (M.gpt_neox, LM),
    "opt-flattened": (M.opt, LM),
    "bloom": (M.bloom, LM),
    "bert": (M.bert, CLASSES),
    "distilbert": (M.distilbert, CLASSES),
    "modernbert": (M.modernbert, CLASSES),
    "electra": (M.electra, CLASSES),
    "albert-shared-layers": (M.albert, CLASSES),
    "deberta-relative-positions": (M.deberta, CLASSES),
    "bert-masked-lm": (M.bert_masked_lm, MASKED),
    "roberta-token-classification": (M.roberta_tokens, TAGS),
    "t5-relative-bias": (M.t5, PAIRS),
    "bart": (M.bart, PAIRS),
    "vit-conv2d-class-token": (M.vit, IMAGES),
}


def _adapter(build: Callable[[], nn.Module], config: Any) -> nn.Module:
    return M.stirred(get_peft_model(build(), config))


def _two_adapters() -> nn.Module:
    model = M.with_lora(M.llama)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    return M.stirred(model)


def _bias_only() -> nn.Module:
    model = M.bert()
    for name, p in model.named_parameters():
        p.requires_grad = name.endswith("bias")
    return model


ADAPTERS = {
    "lora-linear-llama": (partial(M.with_lora, M.llama), LM),
    "lora-conv1d-gpt2": (partial(M.with_lora, M.gpt2), LM),
    "lora-head-bert": (partial(M.with_lora, M.bert, task_type="SEQ_CLS"), CLASSES),
    "lora-deberta-shared-positions": (partial(M.with_lora, M.deberta, task_type="SEQ_CLS"), CLASSES),
    "lora-albert-shared-layers": (partial(M.with_lora, M.albert, task_type="SEQ_CLS"), CLASSES),
    "lora-t5": (partial(M.with_lora, M.t5, task_type="SEQ_2_SEQ_LM"), PAIRS),
    "lora-embedding": (partial(M.with_lora, M.llama, target_modules=["embed_tokens", "q_proj"]), LM),
    "rslora": (partial(M.with_lora, M.llama, use_rslora=True), LM),
    "lora-bias": (partial(M.with_lora, partial(M.llama, attention_bias=True), bias="lora_only"), LM),
    "lora-b-with-bias": (partial(M.with_lora, M.llama, lora_bias=True), LM),
    "dora": (partial(M.with_lora, M.llama, use_dora=True), LM),
    "dora-conv1d": (partial(M.with_lora, M.gpt2, use_dora=True), LM),
    "modules-to-save": (partial(M.with_lora, M.llama, modules_to_save=["lm_head", "embed_tokens", "norm"]), LM),
    "modules-to-save-tied": (
        partial(
            M.with_lora,
            partial(M.llama, tie_word_embeddings=True),
            modules_to_save=["embed_tokens"],
            ensure_weight_tying=True,
        ),
        LM,
    ),
    "trainable-tokens": (partial(M.with_lora, M.llama, trainable_token_indices=[5, 9, 11, 20]), LM),
    "trainable-tokens-tied": (
        partial(M.with_lora, partial(M.llama, tie_word_embeddings=True), trainable_token_indices=[5, 9, 20]),
        LM,
    ),
    "ia3": (
        partial(
            _adapter,
            M.llama,
            IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        ),
        LM,
    ),
    "prompt-tuning": (
        partial(_adapter, M.llama, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
        LM,
    ),
    "p-tuning": (
        partial(
            _adapter, M.llama, PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8)
        ),
        LM,
    ),
    "prefix-tuning": (
        partial(_adapter, M.llama, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
        LM,
    ),
    "two-adapters-one-active": (_two_adapters, LM),
    "bias-only": (_bias_only, CLASSES),
}


def engine_sum(
    model: nn.Module, batch: dict[str, Tensor], kind: str, clip_norm: float, factors_of: Pass | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """The engine's clipped sum by parameter name, and the norms."""
    into, seen = engine.clipped_sum(model, batch, partial(_losses, kind), clip_norm, factors_of)
    return into, seen.norms


def _losses(kind: str, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    return losses.LOSSES[kind](model(**inputs), batch["labels"])


def _squares(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"]).square().flatten(1).sum(1)


def _double(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


@pytest.mark.parametrize("row", quick({*[*FULL, *ADAPTERS][1::2]}, [*FULL, *ADAPTERS]))
def test_the_clipped_sum_is_that_of_one_example_at_a_time(row: str) -> None:
    build, (kind, make_batch) = {**FULL, **ADAPTERS}[row]
    model, batch = build().double().train(), _double(make_batch())
    _, norms = engine_sum(model, batch, kind, 1e9)
    clip_norm = float(norms.median())
    ours, _ = engine_sum(model, batch, kind, clip_norm)
    slow = reference.clipped_sum(model, batch, REFERENCE[kind], clip_norm)
    assert reference.relative_difference(ours, slow) < EXACT
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("row", quick({*[*FULL, *ADAPTERS][::4]}, [*FULL, *ADAPTERS]))
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 2e-5),  # float32 matrix products of another shape
        (torch.bfloat16, 0.05),  # 8 bits of mantissa: each activation is off by up to 0.4 %
    ],
)
def test_lower_precision_differs_by_its_rounding_alone(row: str, dtype: torch.dtype, tolerance: float) -> None:
    """From float64: by the tolerance at most, or by twice what one example at a time in the same precision differs."""
    build, (kind, make_batch) = {**FULL, **ADAPTERS}[row]
    model, batch = build().to(dtype).train(), make_batch()
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    into, _ = engine_sum(model, batch, kind, 0.05)
    plain = reference.clipped_sum(model, batch, REFERENCE[kind], 0.05)
    slow = reference.clipped_sum(model.double(), _double(batch), REFERENCE[kind], 0.05)
    plain = {name: g.double() for name, g in plain.items()}
    allowed = max(tolerance, 2 * reference.relative_difference(plain, slow))
    assert reference.relative_difference(into, slow) < allowed < 0.5


@pytest.mark.parametrize(
    "row", ["llama", "gpt2-conv1d-tied-broadcast-positions", "lora-linear-llama", "dora", "lora-conv1d-gpt2"]
)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(row: str, reentrant: bool) -> None:
    build, (kind, make_batch) = {**FULL, **ADAPTERS}[row]
    model, batch = build().double().train(), make_batch()
    plain, _ = engine_sum(model, batch, kind, 0.05)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    checkpointed, _ = engine_sum(model, batch, kind, 0.05)
    assert reference.relative_difference(checkpointed, plain) < 1e-12  # the same operations in the same order


@pytest.mark.parametrize("row", ["llama", "bert", "lora-linear-llama", "lora-conv1d-gpt2"])
def test_autocast_to_bfloat16_is_near_float32(row: str) -> None:
    build, (kind, make_batch) = {**FULL, **ADAPTERS}[row]
    model, batch = build().train(), make_batch()
    exact, _ = engine_sum(model, batch, kind, 0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, _ = engine_sum(model, batch, kind, 0.05)
    assert reference.relative_difference(low, exact) < 0.05  # bfloat16 has 8 bits
    assert all(v.dtype == torch.float32 for v in low.values())


def test_dropout_and_checkpointing_together_stay_within_the_bound() -> None:
    """One forward, and a recomputation with the same masks: each clipped gradient has norm at most C."""
    model = M.with_lora(partial(M.gpt2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    into, norms = engine_sum(model, M.token_batch(1), "ForCausalLM", 1e-3)
    into_many, _ = engine_sum(model, M.token_batch(5), "ForCausalLM", 1e-3)
    assert float(reference.norm(into)) <= 1e-3
    assert float(norms) > 1e-3
    assert float(reference.norm(into_many)) <= 5e-3


def test_one_token_rows_and_the_empty_batch() -> None:
    model = M.llama().double()
    ids = torch.randint(3, M.VOCAB, (4, 1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    into, norms = engine_sum(model, batch, "ForCausalLM", 1.0)
    assert (
        float(norms.abs().max()) < 1e-150
    )  # a single token predicts nothing; a bound leaves room for squares that underflow
    assert float(reference.norm(into)) == 0.0
    seen = clipped_gradient_sum(model, lambda: pytest.fail("no forward for no examples"), 0, 1.0, into)
    assert [x.shape for x in seen] == [(0,), (0,)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
def test_an_example_without_a_finite_gradient_adds_exactly_nothing(bad: float) -> None:
    model = M.bert().train()
    batch = {**M.class_batch(4), "scale": torch.tensor([1.0, bad, 1.0, 1.0])}

    def scaled(model: nn.Module, part: dict[str, Tensor]) -> Tensor:
        inputs = {k: v for k, v in part.items() if k not in ("labels", "scale")}
        return losses.classification(model(**inputs), part["labels"]) * part["scale"]

    def run(rows: list[int]) -> dict[str, Tensor]:
        return engine.clipped_sum(model, {k: v[rows] for k, v in batch.items()}, scaled, 0.1)[0]

    with_bad, without = run([0, 1, 2, 3]), run([0, 2, 3])
    assert all(bool(torch.isfinite(v).all()) for v in with_bad.values())
    assert reference.relative_difference(with_bad, without) < 1e-5  # float32, another batch shape


def test_the_model_is_given_back_after_an_error() -> None:
    model = M.with_lora(M.llama)
    before = {name: id(p) for name, p in model.named_parameters()}

    def fails() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        per_example_factors(model, fails, 3, forms=Forms())
    assert {name: id(p) for name, p in model.named_parameters()} == before


class _Hidden(torch.autograd.Function):
    """Somebody's fused kernel: takes the weight and hides its use from PyTorch's functions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight, grads[0].t() @ x


class _Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return _Hidden.apply(x, self.weight)


class _Distances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fmin(torch.cdist(x, self.weight), self.bias)


class _Outputs(nn.Module):
    """A layer that answers with a tuple: attention's output and weights, a recurrent layer's output."""

    def __init__(self, layer: nn.Module, inputs: int = 1, **k: Any) -> None:
        super().__init__()
        self.layer, self.inputs, self.options = layer, inputs, k

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.layer(*[x] * self.inputs, **self.options)
        return torch.cat([o.flatten(1) for o in outputs[: 1 + (self.inputs > 1)]], 1)


class _Crossed(nn.Module):
    """Attention to other keys and values, of other sizes, under both kinds of mask."""

    def __init__(self, positions: int, **k: Any) -> None:
        super().__init__()
        self.layer, self.positions = nn.MultiheadAttention(6, 2, batch_first=True, **k), positions

    def forward(self, x: Tensor) -> Tensor:
        size = self.layer.kdim
        other = x[:, :-1, :size].sin()
        mask = torch.zeros(self.positions, self.positions - 1, dtype=torch.bool).index_fill(1, torch.tensor([0]), True)
        weights = torch.linspace(-1, 0, self.positions - 1).to(x).expand(len(x), -1)
        return torch.cat(
            self.layer(x, other, other.cos(), attn_mask=mask.to(x).mul(-2), key_padding_mask=weights), 2
        ).contiguous()


class _Weighted(nn.Module):
    """A parameter of its own, and what it does with the input."""

    def __init__(self, shape: tuple[int, ...], function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(*shape)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.weight, x)


def _positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1]).repeat(len(x), 1)


WEIGHTED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "matrix-from-the-left": (lambda: _Weighted((3, 4), lambda w, x: (w @ x.transpose(1, 2)).contiguous()), (5, 4)),
    "matrix-from-the-left-of-heads": (lambda: _Weighted((3, 5), lambda w, x: torch.matmul(w, x)), (2, 5, 4)),
    "a-matrix-a-head": (lambda: _Weighted((2, 4, 3), lambda w, x: x @ w), (2, 5, 4)),
    "a-matrix-a-head-from-the-left": (lambda: _Weighted((1, 2, 3, 5), lambda w, x: w @ x), (2, 5, 4)),
    "decay-over-states": (
        lambda: _Weighted((4, 3), lambda w, x: torch.exp(-w.exp()[None, :, None] * x.transpose(1, 2)[..., None])),
        (5, 4),
    ),
    "shift-over-states": (lambda: _Weighted((1, 4, 3), lambda w, x: x[..., None] + w), (5, 4)),
    "difference-over-states": (lambda: _Weighted((4, 3), lambda w, x: w - x[..., None]), (4,)),
    "positions-of-a-table": (lambda: _Weighted((7, 4), lambda w, x: x * w[_positions(x)]), (5, 4)),
    "positions-from-the-end": (lambda: _Weighted((7, 4), lambda w, x: x + w[-1 - _positions(x)]), (5, 4)),
    "class-token-of-a-vector": (
        lambda: _Weighted((4,), lambda w, x: torch.cat([w.expand(len(x), 1, -1), x], 1)),
        (5, 4),
    ),
    "attention-sinks": (
        lambda: _Weighted(
            (2,), lambda w, x: torch.cat([x, w.reshape(1, -1, 1, 1).expand(len(x), -1, x.shape[2], -1)], -1)
        ),
        (2, 5, 4),
    ),
    "prompt-repeated-along-positions": (lambda: _Weighted((1, 1, 4), lambda w, x: x * w.repeat(len(x), 5, 1)), (5, 4)),
    "a-dtype-to-follow": (lambda: _Weighted((4,), lambda w, x: x.type_as(w) * w), (5, 4)),
    "einsum-linear": (lambda: _Weighted((3, 4), lambda w, x: torch.einsum("btd,rd->btr", x, w)), (5, 4)),
    "einsum-of-heads": (lambda: _Weighted((2, 4, 3), lambda w, x: torch.einsum("bhtd,hdk->bthk", x, w)), (2, 5, 4)),
    "einsum-of-two": (lambda: _Weighted((4, 4), lambda w, x: torch.einsum("bsi,btj,ij->bst", x, x.sin(), w)), (5, 4)),
    "einsum-with-a-constant": (
        lambda: _Weighted((4,), lambda w, x: torch.einsum("btd,d,td->bd", [x, w, torch.ones(5, 4).double()])),
        (5, 4),
    ),
}
LAYERS = {
    **WEIGHTED,
    "attention": (lambda: _Outputs(nn.MultiheadAttention(6, 2, batch_first=True), 3), (5, 6)),
    "attention-per-head": (
        lambda: _Outputs(nn.MultiheadAttention(6, 3, bias=False, batch_first=True), 3, average_attn_weights=False),
        (5, 6),
    ),
    "attention-to-others": (lambda: _Crossed(4), (4, 6)),
    "attention-of-three-sizes": (lambda: _Crossed(4, kdim=5, vdim=5), (4, 6)),
    "transformer-layer": (lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), (5, 6)),
    "lstm": (lambda: _Outputs(nn.LSTM(6, 3, 2, batch_first=True, bidirectional=True)), (4, 6)),
    "lstm-projected": (lambda: _Outputs(nn.LSTM(6, 5, bias=False, batch_first=True, proj_size=2)), (4, 6)),
    "gru": (lambda: _Outputs(nn.GRU(6, 3, 2, batch_first=True, bidirectional=True)), (4, 6)),
    "rnn-tanh": (lambda: _Outputs(nn.RNN(6, 3, batch_first=True)), (4, 6)),
    "rnn-relu": (lambda: _Outputs(nn.RNN(6, 3, batch_first=True, nonlinearity="relu")), (4, 6)),
    "reparametrised": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), (6,)),
    "group-norm": (lambda: nn.GroupNorm(2, 6), (6, 5)),
    "instance-norm": (lambda: nn.InstanceNorm1d(6, affine=True), (6, 5)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding=1), (6, 5)),
    "conv2d-grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2, padding="same"), (6, 5, 5)),
    "conv2d-strided-dilated": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=2, dilation=2), (6, 7, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 3, 3)),
    "conv-transpose": (lambda: nn.ConvTranspose2d(6, 4, 3), (6, 5, 5)),
    "prelu": (lambda: nn.PReLU(6), (6, 5)),
    "rms-norm": (lambda: nn.RMSNorm(6), (5, 6)),
    "layer-norm-over-two": (lambda: nn.LayerNorm([5, 6]), (5, 6)),
    "linear-on-4-dimensions": (lambda: nn.Linear(6, 4), (3, 5, 6)),
    "linear-on-2-dimensions": (lambda: nn.Linear(6, 4), (6,)),
}


@pytest.mark.parametrize("row", LAYERS)
@pytest.mark.parametrize("first", [True, False])
def test_plain_layers_are_exact_on_their_own(row: str, first: bool) -> None:
    """`first`: the layer's input needs no gradient. Otherwise a trained scale comes before it and is compared too."""
    build, shape = LAYERS[row]
    parts = [build()] if first else [nn.Linear(shape[-1], shape[-1]), build()]
    model, x = M.stirred(nn.Sequential(*parts)).double(), torch.randn(5, *shape).double()
    into, _ = engine.clipped_sum(model, {"x": x}, _squares, 1.0)
    slow = reference.clipped_sum(model, {"x": x, "labels": x}, lambda m, one: m(one["x"]).square().sum(), 1.0)
    assert reference.relative_difference(into, slow) < EXACT


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: torch.einsum("tbd,rd->tbr", x.transpose(0, 1), w),
        lambda w, x: torch.einsum("btd,rd->r", x, w),
        lambda w, x: torch.einsum("b...d,rd->b...r", x, w),
        lambda w, x: w @ x[0].t(),
    ],
)
def test_operations_whose_rows_are_not_the_examples_have_no_rule(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), _Weighted((3, 4), function)), torch.randn(5, 6, 4)
    with pytest.raises(UnsupportedParameterError, match=r"1\.weight \(used by"):
        engine.factors(model, {"x": x}, lambda m, b: m(b["x"]).sum() * torch.ones(len(b["x"])))


class _Bag(nn.Module):
    def __init__(self, **k: Any) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(7, 4, **k)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_of_embeddings(mode: str) -> None:
    model, x = _Bag(mode=mode).double(), torch.randint(0, 7, (5, 6))
    into, _ = engine.clipped_sum(model, {"x": x}, _squares, 1.0)
    slow = reference.clipped_sum(model, {"x": x, "labels": x}, lambda m, one: m(one["x"]).square().sum(), 1.0)
    assert reference.relative_difference(into, slow) < EXACT


def test_bags_with_a_maximum_are_refused() -> None:
    model, x = _Bag(mode="max"), torch.randint(0, 7, (5, 6))
    with pytest.raises(UnsupportedParameterError, match=r"table.weight \(used by embedding_bag\)"):
        engine.factors(model, {"x": x}, _squares)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=0, max_size=5),
    row=st.sampled_from(["llama-tied", "gpt2-conv1d-tied-broadcast-positions", "lora-linear-llama", "dora"]),
    seed=st.integers(0, 999),
)
@settings(max_examples=30, deadline=None)
def test_any_number_of_rows_of_any_length(lengths: list[int], row: str, seed: int) -> None:
    """Batch 0, rows of one token, padding of any amount; each row alone is not padded at all."""
    torch.manual_seed(seed)
    model = {**FULL, **ADAPTERS}[row][0]().double().train()
    rows = [torch.randint(3, M.VOCAB, (n,)) for n in lengths]
    slow = {name: torch.zeros_like(p) for name, p in reference.trainable(model).items()}
    for ids in rows:
        one = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], "labels": ids[None]}
        for name, g in reference.clipped_sum(model, one, reference.causal_lm_loss, 0.05).items():
            slow[name] += g
    longest = max(lengths, default=0)
    batch = {
        "input_ids": torch.zeros(len(rows), longest, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), longest, dtype=torch.long),
        "labels": torch.full((len(rows), longest), -100),
    }
    for i, ids in enumerate(rows):
        batch["input_ids"][i, : len(ids)], batch["labels"][i, : len(ids)] = ids, ids
        batch["attention_mask"][i, : len(ids)] = 1
    public = MicroBatch({name: torch.randint(3, M.VOCAB, (3, 5)) for name in ("input_ids", "labels")}, 3)
    ours, _ = engine_sum(
        model, batch, "ForCausalLM", 0.05, engine.passes(model, public, partial(_losses, "ForCausalLM"))
    )
    assert reference.relative_difference(ours, slow) < EXACT or float(reference.norm(slow)) == 0.0


def test_a_use_hidden_in_a_fused_kernel_is_an_error() -> None:
    layer, x = _Fused(), torch.randn(5, 4)
    with pytest.raises(UnsupportedParameterError, match=r"weight \(used by a use hidden"):
        engine.factors(layer, {"x": x}, _squares)


class _KeepsASecondList(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kept[0].t()


def test_a_parameter_used_from_elsewhere_than_its_module_is_an_error() -> None:
    layer = _KeepsASecondList(4, 3)
    layer.kept = [layer.weight]
    for size in (5, 1):
        x = torch.randn(size, 4)
        with pytest.raises((UnsupportedParameterError, CaptureError), match="weight"):
            per_example_factors(layer, lambda x=x: layer(x).square().sum(1), size, forms=Forms())


def test_a_packed_sequence_is_refused_by_name() -> None:
    layer, x = nn.LSTM(4, 3), nn.utils.rnn.pack_sequence([torch.randn(n, 4) for n in (6, 4, 1)])
    with pytest.raises(UnsupportedParameterError, match=r"weight_ih_l0 \(used by lstm\); weight_hh_l0"):
        per_example_factors(layer, lambda: layer(x)[1][0][0].square().sum(1), 3, forms=Forms())


class _AsksWhetherItIsTrained(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.weight.requires_grad else torch.zeros_like(x)


def test_a_layer_that_asks_whether_its_weight_is_trained_hears_yes() -> None:
    layer, x = _AsksWhetherItIsTrained(4, 4), torch.randn(3, 4)
    factors, losses_ = engine.factors(layer, {"x": x}, _squares)
    assert set(factors) == {"weight", "bias"}
    assert bool((losses_ > 0).all())


def test_a_gradient_that_was_there_before_is_neither_used_nor_lost() -> None:
    model, batch = M.llama().double(), M.token_batch()
    clean, _ = engine_sum(model, batch, "ForCausalLM", 0.05)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e9)
    poisoned, _ = engine_sum(model, batch, "ForCausalLM", 0.05)
    assert reference.relative_difference(poisoned, clean) == 0.0
    assert all(float(p.grad.flatten()[0]) == 1e9 for p in model.parameters())


def test_a_pass_leaves_nothing_for_the_garbage_collector() -> None:
    """Per-example gradients are large: they must be freed as the pass ends, not when Python next looks for cycles."""
    model, batch = M.with_lora(M.llama), M.token_batch()
    factors_of = engine.passes(model, batch, partial(_losses, "ForCausalLM"))
    gc.collect()
    gc.disable()
    try:
        before = sum(t.numel() for t in gc.get_objects() if isinstance(t, Tensor))
        for _ in range(3):
            engine_sum(model, batch, "ForCausalLM", 0.05, factors_of)
        after = sum(t.numel() for t in gc.get_objects() if isinstance(t, Tensor))
    finally:
        gc.enable()
    assert after == before


def test_every_parameter_without_a_rule_is_named_with_the_remedy() -> None:
    layer, x = _Distances(), torch.randn(5, 4)
    capture = Capture(5, Forms(), collecting=True)
    per_example_factors(layer, lambda: layer(x).square().sum(1), 5, capture=capture)
    assert capture.refusals == {("weight", "cdist"): None, ("bias", "fmin"): None}
    with pytest.raises(UnsupportedParameterError, match=r"weight \(used by cdist\).*per_device_train_batch_size=1"):
        engine.factors(layer, {"x": x}, _squares)


def test_one_example_at_a_time_is_exact_for_any_layer() -> None:
    """The remedy that the error names."""
    layer, x = _Distances().double(), torch.randn(5, 4).double()
    into = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    for row in range(5):
        one = x[row : row + 1]
        clipped_gradient_sum(layer, lambda one=one: layer(one).square().sum(1), 1, 0.5, into)
    batch = {"x": x, "labels": x}
    slow = reference.clipped_sum(layer, batch, lambda m, one: m(one["x"]).square().sum(), 0.5)
    assert reference.relative_difference(into, slow) < EXACT


def test_a_scalar_loss_is_refused() -> None:
    layer = nn.Linear(4, 3)
    with pytest.raises(CaptureError, match=r"shape \[5\]; got shape \[\]"):
        per_example_factors(
            layer, lambda: layer(torch.randn(5, 4)).mean(), 5, forms=Forms({("weight", "linear", 2): True})
        )


def test_several_examples_without_forms_are_refused_with_the_remedy() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    with pytest.raises(CaptureError, match=r"a pass of 5 examples needs .* forms=take_inventory\(model, batch"):
        per_example_factors(layer, lambda: layer(x).square().sum(1), 5)


def test_an_adapter_with_a_fused_operation_is_refused_by_name() -> None:
    """LoHa computes its product in an autograd function of its own."""
    model = M.stirred(get_peft_model(M.llama(), LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])))
    with pytest.raises(UnsupportedParameterError, match=r"q_proj.hada_w1_a.default \(used by a use hidden.*=1 "):
        engine_sum(model, M.token_batch(), "ForCausalLM", 0.01)


def test_orthogonal_adapters_are_refused_by_name() -> None:
    model = M.stirred(get_peft_model(M.llama(), OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])))
    with pytest.raises(UnsupportedParameterError, match=r"oft_R.default.weight .*per_device_train_batch_size=1"):
        engine_sum(model, M.token_batch(), "ForCausalLM", 0.01)
