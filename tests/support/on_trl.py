"""A tokenizer, texts and settings for trainers of trl."""

import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from tests.support import models as M
from tests.support import runs

KEPT = "output_dir use_cpu report_to disable_tqdm max_steps per_device_train_batch_size save_strategy optim".split()


def tokenizer() -> PreTrainedTokenizerFast:
    """The words w3, w4, ..., of which each is a token."""
    words = {"<pad>": 0, "<unk>": 1, "<end>": 2, **{f"w{i}": i for i in range(3, M.VOCAB)}}
    model = Tokenizer(WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", unk_token="<unk>", eos_token="<end>")


def words(generator: random.Random, most: int) -> str:
    """2 to `most` of them."""
    return " ".join(f"w{generator.randrange(3, M.VOCAB)}" for _ in range(generator.randint(2, most)))


def settings(folder: Path) -> dict[str, Any]:
    """One plain step in float32, for any of trl's configurations."""
    plain = runs.arguments(folder).to_dict()
    chosen = {name: plain[name] for name in (*KEPT, "lr_scheduler_type")}
    return {**chosen, "bf16": False, "gradient_checkpointing": False}
