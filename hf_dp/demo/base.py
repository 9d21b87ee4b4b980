"""Public records -> the model that the demo starts from: a byte-level BPE tokenizer and a small Llama, saved in one folder.

Both see the public half only, so nothing in them depends on a private record.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, END = "<pad>", "<end>"
VOCABULARY = 512  # digits stay single, so that a number is as long as it looks
MAX_TOKENS = 128


def train_tokenizer(public: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the notes of the public half; any other text falls back to bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    notes = [json.loads(line)["note"] for line in public.read_text(encoding="utf-8").splitlines()]
    tokenizer.train_from_iterator(notes, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, model_max_length=MAX_TOKENS, padding_side="right"
    )


def small_llama(tokenizer: Any) -> LlamaForCausalLM:
    """An untrained Llama of about 0.6 million parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=MAX_TOKENS,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
