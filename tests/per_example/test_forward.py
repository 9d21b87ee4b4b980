"""Logits where there are targets and nowhere else, against the slow twin: all logits, then the loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_dp.per_example import head as forward
from hf_dp.per_example import losses
from hf_dp.per_example.head import next_token_losses
from tests.support import engine
from tests.support import models as M
from tests.support.marks import quick

SMALL = {**M.DECODER, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BUILD = {
    "llama": M.llama,
    "gemma2, capped": lambda: M.gemma2(final_logit_softcapping=3.0),
    "granite, scaled": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**SMALL, logits_scaling=3.0)),
    "cohere, scaled": lambda: tf.CohereForCausalLM(tf.CohereConfig(**SMALL)),
    "phi, with a bias": lambda: tf.PhiForCausalLM(tf.PhiConfig(**SMALL)),
    "gpt2": M.gpt2,
    "gpt_neox": M.gpt_neox,
    "opt": M.opt,
    "bloom": M.bloom,
    "qwen3": M.qwen3,
}


def base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def batch_of(kind: str) -> dict[str, Tensor]:
    batch = M.token_batch(4, prompt=3)
    if kind == "padded left":
        batch = {name: value.flip(1) for name, value in batch.items()}
    if kind == "one without a target":
        batch["labels"][1] = -100
    if kind == "none with a target":
        batch["labels"][:] = -100
    return batch


def slow(model: nn.Module, batch: dict[str, Tensor], smoothing: float) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return losses.causal_lm(model(**inputs), losses.predictable(batch["labels"], batch["attention_mask"]), smoothing)


def fast(model: nn.Module, batch: dict[str, Tensor], smoothing: float) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return next_token_losses(model, base_of(model), inputs, batch["labels"], smoothing)


def sums(model: nn.Module, compute: Any, batch: dict[str, Tensor], smoothing: float) -> tuple[Any, dict[str, Tensor]]:
    into, seen = engine.clipped_sum(model, batch, lambda m, b: compute(m, b, smoothing), 0.05)
    return seen, into


@contextmanager
def rows_of_the_head(model: Any) -> Iterator[list[int]]:
    """How many rows of hidden states the output layer got in each pass; the last one is not of the inventory."""
    seen: list[int] = []
    head = base_of(model).get_output_embeddings()
    inner = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    original = inner.forward

    def counted(hidden: Tensor) -> Tensor:
        seen.append(hidden.shape[:-1].numel())
        return original(hidden)

    inner.forward = counted
    yield seen
    del inner.forward


KINDS = ["padded right", "padded left", "one without a target", "none with a target"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", quick({*[*BUILD][::3]}, BUILD))
def test_losses_norms_and_sums_are_those_of_all_logits(name: str, kind: str) -> None:
    torch.manual_seed(0)
    model, batch = M.with_lora(BUILD[name]), batch_of(kind)
    if kind != "padded left":  # there Bloom and Gemma 2 give NaN in float64
        model = model.double()
    with rows_of_the_head(model) as rows:
        seen, into = sums(model, fast, batch, 0.0)
    targets = losses.shifted(losses.predictable(batch["labels"], batch["attention_mask"]))
    assert rows[-1:] == [int((targets != losses.IGNORED).sum())]
    expected, twin = sums(model, slow, batch, 0.0)
    assert torch.equal(expected.losses == 0, seen.losses == 0)
    torch.testing.assert_close(seen, expected)
    torch.testing.assert_close(into, twin)
    assert kind == "none with a target" or any(value.abs().max() > 0 for value in twin.values())


def test_with_smoothing_and_in_bfloat16() -> None:
    torch.manual_seed(0)
    model, batch = M.with_lora(M.llama), batch_of("padded right")
    torch.testing.assert_close(sums(model, fast, batch, 0.1)[1], sums(model, slow, batch, 0.1)[1])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            sums(model, fast, batch, 0.1)[1], sums(model, slow, batch, 0.1)[1], rtol=0.02, atol=1e-4
        )


@pytest.mark.parametrize("trained", ["all weights", "lora on the head"])
def test_a_trained_head_gets_every_position_from_the_first_target_on(trained: str) -> None:
    torch.manual_seed(0)
    lora = {"target_modules": ["q_proj", "lm_head"]}
    model = (M.llama() if trained == "all weights" else M.with_lora(M.llama, **lora)).double()
    batch = batch_of("padded right")
    with rows_of_the_head(model) as rows:
        seen, into = sums(model, fast, batch, 0.0)
    assert rows[-1:] == [4 * (9 - 2)]  # three positions of prompt, of which the last predicts the first target
    expected, twin = sums(model, slow, batch, 0.0)
    torch.testing.assert_close(seen, expected)
    torch.testing.assert_close(into, twin)


def test_virtual_tokens_in_front_keep_all_logits() -> None:
    torch.manual_seed(0)
    model: nn.Module = get_peft_model(M.llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    batch = batch_of("padded right")
    with rows_of_the_head(model) as rows:
        seen, into = sums(model, fast, batch, 0.0)
    assert rows[-1:] == [4 * (9 + 3)]
    expected, twin = sums(model, slow, batch, 0.0)
    torch.testing.assert_close((seen, into), (expected, twin))


class HeadByHand(tf.LlamaForCausalLM):
    """Takes `logits_to_keep` and reads its head's weight without calling it."""

    def forward(self, input_ids: Any, attention_mask: Any = None, logits_to_keep: int = 0, **kwargs: Any) -> Any:
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return tf.modeling_outputs.CausalLMOutput(logits=hidden @ self.lm_head.weight.t())


def test_a_head_that_is_not_called_gives_the_same_losses() -> None:
    model, batch = M.with_lora(lambda: HeadByHand(tf.LlamaConfig(**M.DECODER))), batch_of("padded right")
    torch.testing.assert_close(fast(model, batch, 0.0), slow(model, batch, 0.0))


COMES_LAST = {name: not any(word in name for word in ("capped", "scaled")) for name in BUILD}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", quick({*[*BUILD][1::3]}, BUILD))
def test_once_seen_at_work_a_head_that_comes_last_gives_losses_without_logits(name: str, kind: str) -> None:
    torch.manual_seed(0)
    model, batch = M.with_lora(BUILD[name]), batch_of(kind)
    if kind != "padded left":
        model = model.double()
    head = base_of(model).get_output_embeddings()
    assert head not in forward._comes_last
    fast(model, batch_of("padded right"), 0.0)
    assert forward._comes_last[head] is COMES_LAST[name]
    seen, into = sums(model, fast, batch, 0.0)
    expected, twin = sums(model, slow, batch, 0.0)
    torch.testing.assert_close(seen, expected)
    torch.testing.assert_close(into, twin)
    assert torch.equal(expected.losses == 0, seen.losses == 0)
    assert "forward" not in vars(head)


def test_without_logits_smoothed_in_bfloat16_and_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batch = M.with_lora(M.llama), batch_of("padded right")
    fast(model, batch, 0.0)
    twin = sums(model, slow, batch, 0.1)[1]
    torch.testing.assert_close(sums(model, fast, batch, 0.1)[1], twin)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(sums(model, fast, batch, 0.1)[1], twin, rtol=0.05, atol=1e-3)
        with Products() as types:
            fast(model, batch, 0.1)
        assert types == {torch.bfloat16}
    monkeypatch.setattr(losses, "HEAD_ROWS", 2)
    with Shapes() as made:
        torch.testing.assert_close(sums(model, fast, batch, 0.1)[1], twin)
    width, vocabulary = base_of(model).config.hidden_size, base_of(model).config.vocab_size
    assert {shape[0] for shape in made if shape[1:] == (vocabulary,)} <= {1, 2, width, vocabulary}  # and the weight's
    assert not {shape for shape in made if len(shape) == 3 and shape[-1] == vocabulary}


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that operations make."""

    def __enter__(self) -> Any:
        super().__enter__()
        self.made: set[tuple[int, ...]] = set()
        return self.made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made |= {tuple(x.shape) for x in tree_leaves(result) if isinstance(x, Tensor)}
        return result


class Products(TorchDispatchMode):
    """The types of all matrix products' operands."""

    def __enter__(self) -> Any:
        super().__enter__()
        self.types: set[torch.dtype] = set()
        return self.types

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in str(func):
            self.types |= {x.dtype for x in args if isinstance(x, Tensor)}
        return func(*args, **(kwargs or {}))


class Masked(tf.LlamaForCausalLM):
    """Changes its logits where they lie: entries of the vocabulary that no tokenizer gives."""

    def forward(self, input_ids: Any, attention_mask: Any = None, logits_to_keep: int = 0, **kwargs: Any) -> Any:
        outputs = super().forward(input_ids, attention_mask, logits_to_keep=logits_to_keep, **kwargs)
        with torch.no_grad():
            outputs.logits[..., 90:] = -1e9
        return outputs


class Hooked(tf.LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head.register_forward_hook(lambda head, args, out: out * 3.0)


@pytest.mark.parametrize("model_class", [Masked, Hooked])
def test_a_head_with_something_behind_it_forms_logits(model_class: Any) -> None:
    torch.manual_seed(0)
    model, batch = M.with_lora(lambda: model_class(tf.LlamaConfig(**M.DECODER))), batch_of("padded right")
    for _ in range(2):
        torch.testing.assert_close(fast(model, batch, 0.0), slow(model, batch, 0.0))
    assert forward._comes_last[base_of(model).get_output_embeddings()] is False


class Tempered(tf.LlamaForCausalLM):
    """Logits over a temperature, once there is one."""

    temperature = 1.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        if self.temperature != 1.0:
            outputs.logits = outputs.logits / self.temperature
        return outputs


class Scaled(tf.LlamaForCausalLM):
    """Logits that are changed where they lie, once there is a scale."""

    scale = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        if self.scale is not None:
            outputs.logits.mul_(self.scale)
        return outputs


class Steered(tf.LlamaForCausalLM):
    """Logits whose gradient is changed on its way back, once it is asked for."""

    times = 1.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        if self.times != 1.0:
            outputs.logits.register_hook(lambda gradient: (self.times * gradient).clamp(-0.01, 0.01))
        return outputs


@pytest.mark.parametrize(
    ("model_class", "name", "value"), [(Tempered, "temperature", 3.0), (Scaled, "scale", 2.0), (Steered, "times", 4.0)]
)
def test_what_comes_after_the_head_later_is_seen_in_the_same_pass(model_class: Any, name: str, value: float) -> None:
    torch.manual_seed(0)
    model, batch = M.with_lora(lambda: model_class(tf.LlamaConfig(**M.DECODER))), batch_of("padded right")
    for _ in range(2):
        torch.testing.assert_close(sums(model, fast, batch, 0.0)[1], sums(model, slow, batch, 0.0)[1])
    vars(base_of(model))[name] = value
    for _ in range(2):
        torch.testing.assert_close(sums(model, fast, batch, 0.0), sums(model, slow, batch, 0.0))


def test_a_head_that_two_models_share_is_looked_at_in_each() -> None:
    torch.manual_seed(0)
    plain, tempered = (M.with_lora(lambda: Tempered(tf.LlamaConfig(**M.DECODER))) for _ in range(2))
    base_of(tempered).lm_head, base_of(tempered).temperature = base_of(plain).lm_head, 3.0
    batch = batch_of("padded right")
    for model in (plain, plain, tempered, plain):
        torch.testing.assert_close(sums(model, fast, batch, 0.0), sums(model, slow, batch, 0.0))


def test_a_soft_cap_that_few_bits_do_not_show_is_known_by_its_name() -> None:
    """Logits near zero, divided and multiplied by 1,024, which is exact: in bfloat16 the cap changes none of them."""
    torch.manual_seed(0)
    model = M.with_lora(lambda: M.gemma2(final_logit_softcapping=1024.0)).bfloat16()
    head, made = base_of(model).get_output_embeddings(), []
    handle = head.register_forward_hook(lambda head, args, out: made.append(out))
    batch = batch_of("padded right")
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    handle.remove()
    assert torch.equal(logits, made[0])
    fast(model, batch, 0.0)
    assert forward._comes_last[head] is False


SHORT = {"vocab_size": 97, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "dropout_rate": 0.0}
T5 = {**SHORT, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
BERT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 97}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BART = {**SHORT, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "dropout": 0.0, "bos_token_id": 2}
ALIGNED: dict[str, tuple[Any, list[str], bool]] = {  # model, where LoRA is, whether its head comes last
    "t5": (lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)), ["q", "v"], True),
    "bart, whose head has zeros added": (
        lambda: tf.BartForConditionalGeneration(tf.BartConfig(**BART)),
        ["q_proj"],
        False,
    ),
    "bert": (lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT, **NO_DROPOUT)), ["query"], True),
    "roberta": (lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**BERT, **NO_DROPOUT)), ["query"], True),
}


@pytest.mark.parametrize("name", ALIGNED)
def test_masked_and_encoder_decoder_models_form_logits_at_targets_alone(name: str) -> None:
    torch.manual_seed(0)
    build, where, comes_last = ALIGNED[name]
    model: Any = get_peft_model(build(), LoraConfig(r=2, target_modules=where, init_lora_weights=False)).double()
    batch = batch_of("one without a target")
    head = base_of(model).get_output_embeddings()

    def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        return given | forward.decoder_inputs(base_of(model), given, batch["labels"])

    def few(model: nn.Module, batch: dict[str, Tensor], smoothing: float) -> Tensor:
        return forward.aligned_losses(model, base_of(model), inputs(batch), batch["labels"], smoothing)

    def all_of_them(model: nn.Module, batch: dict[str, Tensor], smoothing: float) -> Tensor:
        return losses.aligned_tokens(model(**inputs(batch)), batch["labels"], smoothing)

    expected, twin = sums(model, all_of_them, batch, 0.1)
    with rows_of_the_head(model) as rows:
        seen, into = sums(model, few, batch, 0.1)
    assert rows[-1:] == [int((batch["labels"] != losses.IGNORED).sum())]
    torch.testing.assert_close((seen, into), (expected, twin))
    assert any(value.abs().max() > 0 for value in twin.values())
    del forward._comes_last[head]  # a head with a method of its own is not plain
    for _ in range(3):
        torch.testing.assert_close(sums(model, few, batch, 0.1), (expected, twin))
    assert forward._comes_last[head] is comes_last


def test_a_hook_that_comes_later_is_seen() -> None:
    torch.manual_seed(0)
    model, batch = M.with_lora(M.llama), batch_of("padded right")
    fast(model, batch, 0.0)
    head = base_of(model).get_output_embeddings()
    handle = head.register_forward_hook(lambda head, args, out: out * 3.0)
    tripled = fast(model, batch, 0.0)
    torch.testing.assert_close(tripled, slow(model, batch, 0.0))
    handle.remove()
    assert not torch.allclose(fast(model, batch, 0.0), tripled)


def test_the_head_is_left_as_it_was_also_after_an_exception() -> None:
    model, batch = M.with_lora(M.llama), batch_of("padded right")
    fast(model, batch, 0.0)
    with pytest.raises(RuntimeError, match="shape"):  # the model's own loss, which meets losses for logits
        next_token_losses(model, base_of(model), batch, batch["labels"], 0.0)
    head = base_of(model).get_output_embeddings()
    assert "forward" not in vars(head)
    del forward._comes_last[head]
    with pytest.raises(ValueError, match="batch_size"):  # which meets fewer logits than labels
        next_token_losses(model, base_of(model), batch, batch["labels"], 0.0)
    assert not head._forward_pre_hooks
    assert not head._forward_hooks
