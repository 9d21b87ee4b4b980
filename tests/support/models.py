"""Small models of many architectures, built from their config classes, and batches for them. No network, no files."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

VOCAB = 97
DROPOUT_FREE = {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {**WIDE, "vocab_size": VOCAB, "max_position_embeddings": 64}
DECODER = {**TEXT, "num_key_value_heads": 2}


def llama(**k: Any) -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**DECODER, **k}))


def mistral(**k: Any) -> nn.Module:
    return tf.MistralForCausalLM(tf.MistralConfig(**{**DECODER, "sliding_window": 4, **k}))


def qwen2(**k: Any) -> nn.Module:
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**{**DECODER, **k}))


def qwen3(**k: Any) -> nn.Module:
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**{**DECODER, "head_dim": 4, **k}))


def gemma(**k: Any) -> nn.Module:
    return tf.GemmaForCausalLM(tf.GemmaConfig(**{**DECODER, "head_dim": 4, **k}))


def gemma2(**k: Any) -> nn.Module:
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**{**DECODER, "head_dim": 4, "query_pre_attn_scalar": 4, **k}))


def gemma3(**k: Any) -> nn.Module:
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**{**DECODER, "head_dim": 4, "query_pre_attn_scalar": 4, **k}))


def phi3(**k: Any) -> nn.Module:
    return tf.Phi3ForCausalLM(tf.Phi3Config(**{**DECODER, "pad_token_id": 0, **k}))


def gpt2(**k: Any) -> nn.Module:
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    size = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**{**size, **no_dropout, **k}))


def gpt_neox(**k: Any) -> nn.Module:
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**{**TEXT, **k}))


def opt(**k: Any) -> nn.Module:
    size = {"vocab_size": VOCAB, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tf.OPTForCausalLM(
        tf.OPTConfig(**{**size, "max_position_embeddings": 64, "dropout": 0.0, "word_embed_proj_dim": 16, **k})
    )


def bloom(**k: Any) -> nn.Module:
    return tf.BloomForCausalLM(tf.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=4, **k))


def bert(**k: Any) -> nn.Module:
    return tf.BertForSequenceClassification(tf.BertConfig(**{**TEXT, **DROPOUT_FREE, "num_labels": 5, **k}))


def bert_masked_lm(**k: Any) -> nn.Module:
    return tf.BertForMaskedLM(tf.BertConfig(**{**TEXT, **DROPOUT_FREE, **k}))


def roberta_tokens(**k: Any) -> nn.Module:
    return tf.RobertaForTokenClassification(tf.RobertaConfig(**{**TEXT, **DROPOUT_FREE, "num_labels": 5, **k}))


def distilbert(**k: Any) -> nn.Module:
    size = {
        "vocab_size": VOCAB,
        "dim": 16,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 24,
        "max_position_embeddings": 64,
    }
    no_dropout = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    return tf.DistilBertForSequenceClassification(tf.DistilBertConfig(**{**size, **no_dropout, "num_labels": 5, **k}))


def modernbert(**k: Any) -> nn.Module:
    size = {**WIDE, "vocab_size": VOCAB, "max_position_embeddings": 64, "local_attention": 4, "pad_token_id": 0}
    extra = {"global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2, "num_labels": 5}
    return tf.ModernBertForSequenceClassification(tf.ModernBertConfig(**{**size, **extra, **k}))


def electra(**k: Any) -> nn.Module:
    return tf.ElectraForSequenceClassification(
        tf.ElectraConfig(**{**TEXT, **DROPOUT_FREE, "embedding_size": 8, "num_labels": 5, **k})
    )


def albert(**k: Any) -> nn.Module:
    return tf.AlbertForSequenceClassification(
        tf.AlbertConfig(
            **{**TEXT, **DROPOUT_FREE, "embedding_size": 8, "classifier_dropout_prob": 0.0, "num_labels": 5, **k}
        )
    )


def deberta(**k: Any) -> nn.Module:
    extra = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    return tf.DebertaV2ForSequenceClassification(
        tf.DebertaV2Config(**{**TEXT, **DROPOUT_FREE, **extra, "pooler_dropout": 0.0, "num_labels": 5, **k})
    )


def t5(**k: Any) -> nn.Module:
    size = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    extra = {"dropout_rate": 0.0, "relative_attention_num_buckets": 8, "decoder_start_token_id": 0, "pad_token_id": 0}
    return tf.T5ForConditionalGeneration(tf.T5Config(**{**size, **extra, **k}))


def bart(**k: Any) -> nn.Module:
    size = {"vocab_size": VOCAB, "d_model": 16, "max_position_embeddings": 64, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    extra = {"dropout": 0.0, "decoder_start_token_id": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return tf.BartForConditionalGeneration(tf.BartConfig(**{**size, **heads, **extra, **k}))


def vit(**k: Any) -> nn.Module:
    return tf.ViTForImageClassification(
        tf.ViTConfig(**{**WIDE, **DROPOUT_FREE, "image_size": 8, "patch_size": 4, "num_labels": 5, **k})
    )


def token_batch(examples: int = 3, length: int = 9, prompt: int = 2) -> dict[str, torch.Tensor]:
    """Right-padded rows of different lengths; the first `prompt` positions are no targets."""
    ids = torch.randint(3, VOCAB, (examples, length))
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(examples):
        end = length - (2 * row) % max(1, length - 3)
        mask[row, end:], ids[row, end:], labels[row, end:] = 0, 0, -100
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def class_batch(examples: int = 3, length: int = 9) -> dict[str, torch.Tensor]:
    return {**token_batch(examples, length), "labels": torch.randint(0, 5, (examples,))}


def tag_batch(examples: int = 3, length: int = 9) -> dict[str, torch.Tensor]:
    batch = token_batch(examples, length)
    batch["labels"] = torch.where(batch["labels"] == -100, -100, batch["labels"] % 5)
    return batch


def pair_batch(examples: int = 3, length: int = 9) -> dict[str, torch.Tensor]:
    """Source and target of different lengths, for encoder-decoders."""
    target = token_batch(examples, 7, prompt=0)["labels"]
    decoder = torch.cat([torch.zeros_like(target[:, :1]), target[:, :-1].clamp_min(0)], 1)
    source = token_batch(examples, length)
    return {**source, "labels": target, "decoder_input_ids": decoder}


def image_batch(examples: int = 3) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(examples, 3, 8, 8), "labels": torch.randint(0, 5, (examples,))}


def stirred(model: nn.Module) -> nn.Module:
    """Moves every trainable parameter a little: zeros (LoRA's B) would hide half of the gradients."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.is_floating_point():
                p += 0.02 * torch.randn_like(p)
    return model


def with_lora(build: Callable[[], nn.Module], **k: Any) -> nn.Module:
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **k}
    return stirred(get_peft_model(build(), LoraConfig(**settings)))


MARK = 96  # the token that makes an example of `poisoned` go wrong


def poisoned(layer: str, bad: float) -> nn.Module:
    """A model in which the output of `layer` is `bad` times too large for every example that has the mark."""
    torch.manual_seed(0)
    model = with_lora(llama)
    marked: list[torch.Tensor] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        marked[:] = [(kwargs["input_ids"] == MARK).any(1)]

    def poison(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        scale = torch.where(marked[0].view(-1, *[1] * (first.dim() - 1)), bad, 1.0)
        wrong = first * scale  # a product, so that what flows back is spoilt as well
        return (wrong, *output[1:]) if isinstance(output, tuple) else wrong

    base = model.get_base_model()
    base.register_forward_pre_hook(look, with_kwargs=True)
    base.get_submodule(layer).register_forward_hook(poison)
    if layer == "lm_head":  # unknown as the output layer, it gets every position: `poison` needs the examples apart
        base.get_output_embeddings = lambda: None
    return model
