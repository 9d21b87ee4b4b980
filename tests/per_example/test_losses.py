"""Per-example losses against torch's own, one example at a time; the loss of each model; what is never held."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_dp.per_example import losses
from tests.support import models as M

quick = settings(max_examples=30, deadline=None)


def outputs(logits: Tensor) -> SimpleNamespace:
    return SimpleNamespace(logits=logits)


def logits_and_labels(seed: int, batch: int, length: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, length, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (batch, length), generator=generator)
    drop = torch.rand(batch, length, generator=generator) < 0.4
    return logits.requires_grad_(), labels.masked_fill(drop, -100)


def mean_of_own_targets(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    kept = labels != -100
    if not kept.any():
        return logits.sum() * 0.0
    return F.cross_entropy(logits[kept], labels[kept], label_smoothing=smoothing)


shapes = st.tuples(st.integers(0, 9999), st.integers(0, 4), st.integers(1, 6), st.integers(2, 7))


@given(shapes, st.sampled_from([0.0, 0.1]), st.sampled_from([1, 10, 1 << 24]))
@quick
def test_token_mean_is_torchs_cross_entropy_of_each_example(shape, smoothing: float, chunk: int) -> None:
    logits, labels = logits_and_labels(*shape)
    before, losses.CHUNK_ELEMENTS = losses.CHUNK_ELEMENTS, chunk
    try:
        ours = losses.token_mean(logits, labels, smoothing)
        (gradient,) = torch.autograd.grad((ours * torch.arange(1, len(ours) + 1)).sum(), logits)
    finally:
        losses.CHUNK_ELEMENTS = before
    theirs = [mean_of_own_targets(logits[b], labels[b], smoothing) for b in range(len(labels))]
    weighted = sum((b + 1) * loss for b, loss in enumerate(theirs)) if theirs else logits.sum()
    (expected,) = torch.autograd.grad(weighted, logits)
    assert ours.shape == (len(labels),)
    assert all(torch.isclose(a, b, rtol=1e-10) for a, b in zip(ours, theirs, strict=True))
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_an_example_without_targets_has_loss_zero_and_gradient_zero() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    labels = torch.tensor([[-100, -100, -100], [-100, 1, 2]])
    ours = losses.causal_lm(outputs(logits), labels)
    ours.sum().backward()
    assert ours[0] == 0.0
    assert ours[1] > 0.0
    assert logits.grad[0].abs().max() == 0.0


def test_causal_lm_is_what_the_model_itself_computes_for_one_example() -> None:
    model, batch = M.llama(), M.token_batch(3)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    ours = losses.causal_lm(model(**inputs), batch["labels"])
    for row in range(3):
        assert torch.isclose(ours[row], model(**{k: v[row : row + 1] for k, v in batch.items()}).loss, rtol=1e-5)


def test_virtual_tokens_in_front_are_no_targets() -> None:
    logits, labels = torch.randn(2, 7, 5), torch.tensor([[1, 2, 3], [4, -100, 0]])
    ours = losses.causal_lm(outputs(logits), labels)
    first = F.cross_entropy(logits[0, 3:6], labels[0])  # the last virtual token predicts the first label
    assert torch.isclose(ours[0], first)


def test_a_target_that_only_padding_could_predict_is_dropped() -> None:
    labels = torch.tensor([[-100, 7, 8, 9], [5, 6, 7, 8]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert losses.predictable(labels, mask).tolist() == [[-100, -100, 8, 9], [5, 6, 7, 8]]
    assert losses.predictable(labels, None) is labels


def test_regression_and_multi_label() -> None:
    logits, targets = torch.randn(3, 2), torch.randn(3, 2)
    expected = torch.stack([F.mse_loss(a, b) for a, b in zip(logits, targets, strict=True)])
    torch.testing.assert_close(losses.regression(outputs(logits), targets), expected)
    torch.testing.assert_close(losses.regression(outputs(logits[:, :1]), targets[:, 0]), (logits - targets)[:, 0] ** 2)
    chosen = (targets > 0).float()
    expected = torch.stack([F.binary_cross_entropy_with_logits(a, b) for a, b in zip(logits, chosen, strict=True)])
    torch.testing.assert_close(losses.multi_label(outputs(logits), chosen), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, 11).to(dtype).requires_grad_()
    labels = torch.randint(0, 11, (2, 3))
    ours = losses.token_mean(logits, labels)
    ours.sum().backward()
    assert ours.dtype == torch.float32
    assert logits.grad.dtype == dtype
    wide = torch.stack([F.cross_entropy(logits[b].float(), labels[b]) for b in range(2)])
    torch.testing.assert_close(ours, wide, rtol=1e-6, atol=1e-6)


def test_logits_of_a_large_vocabulary_never_exist_in_float32_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every float32 tensor made in forward and backward holds at most one chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(t, Tensor) and t.dtype == torch.float32:
                    largest = max(largest, t.numel())
            return result

    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 4096)
    logits = torch.randn(4, 16, 1024).to(torch.bfloat16).requires_grad_()  # 65,536 numbers
    labels = torch.randint(0, 1024, (4, 16))
    with Watch():
        losses.token_mean(logits, labels, 0.1).sum().backward()
    assert 0 < largest <= 4096


@pytest.mark.parametrize("rows", [1, 3, 512])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("bias", [True, False])
def test_the_loss_of_a_head_is_that_of_its_logits(
    rows: int, smoothing: float, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "HEAD_ROWS", rows)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight, b = torch.randn(11, 5, dtype=torch.float64), torch.randn(11, dtype=torch.float64) if bias else None
    labels, upstream = torch.tensor([3, 7, 0, 10, 4, 1, 4]), torch.randn(7, dtype=torch.float64)
    ours = losses.HeadCrossEntropy.apply(hidden, weight, b, labels, smoothing)
    (gradient,) = torch.autograd.grad(ours @ upstream, hidden)
    twin = F.cross_entropy(F.linear(hidden, weight, b), labels, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(ours, twin)
    torch.testing.assert_close(gradient, torch.autograd.grad(twin @ upstream, hidden)[0])
    assert torch.equal(losses.HeadCrossEntropy.apply(hidden.detach(), weight, b, labels, smoothing), ours)


CONFIG = SimpleNamespace(problem_type=None, num_labels=5, is_encoder_decoder=False)


@pytest.mark.parametrize(
    ("name", "changes", "kind"),
    [
        ("LlamaForCausalLM", {}, "ForCausalLM"),
        ("GPT2LMHeadModel", {}, "ForCausalLM"),
        ("BertForMaskedLM", {}, "ForMaskedLM"),
        ("BertForTokenClassification", {}, "ForTokenClassification"),
        ("T5ForConditionalGeneration", {"is_encoder_decoder": True}, "ForConditionalGeneration"),
        ("LlavaForConditionalGeneration", {}, "ForCausalLM"),
        ("BertForSequenceClassification", {}, "ForSequenceClassification"),
        ("BertForSequenceClassification", {"num_labels": 1}, "regression"),
        ("BertForSequenceClassification", {"problem_type": "regression"}, "regression"),
        (
            "BertForSequenceClassification",
            {"problem_type": "multi_label_classification"},
            "multi_label_classification",
        ),
        ("ViTForImageClassification", {}, "ForSequenceClassification"),
    ],
)
def test_the_loss_of_a_model_is_that_of_transformers(name: str, changes: dict, kind: str) -> None:
    assert losses.loss_kind(name, SimpleNamespace(**{**vars(CONFIG), **changes})) == kind
    assert kind in losses.LOSSES


@pytest.mark.parametrize("name", ["BertForQuestionAnswering", "BertForMultipleChoice", "Wav2Vec2ForCTC"])
def test_a_model_without_a_known_loss_has_no_kind(name: str) -> None:
    assert losses.loss_kind(name, CONFIG) is None


def test_an_encoder_decoder_that_classifies_has_no_kind() -> None:
    config = SimpleNamespace(**{**vars(CONFIG), "is_encoder_decoder": True})
    assert losses.loss_kind("BartForSequenceClassification", config) is None
