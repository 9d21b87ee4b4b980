"""A tokenizer, texts and settings for trainers of trl."""

import random
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import PreTrainedTokenizerFast

import hf_dp
from hf_dp import PrivacyConfig
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


def pairs(count: int) -> Dataset:
    """Prompts of 2 to 6 words with two answers."""
    g = random.Random(0)
    rows = [{"prompt": words(g, 6), "chosen": " " + words(g, 7), "rejected": " " + words(g, 5)} for _ in range(count)]
    return Dataset.from_list(rows)


def base() -> nn.Module:
    """A decoder of one block."""
    torch.manual_seed(0)
    return M.llama(num_hidden_layers=1)


def adapters() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")


OF_THE_TRAINER = ("ref_model", "peft_config", "callbacks", "micro_batch_tokens")


def dpo(folder: Path, model: nn.Module, data: Dataset, privacy: PrivacyConfig, **k: Any) -> Any:
    """A DPDPOTrainer; keywords of `DPOConfig` and of the trainer may be mixed."""
    import trl

    own = {name: k.pop(name) for name in OF_THE_TRAINER if name in k}
    args = trl.DPOConfig(**{**settings(folder), **k})
    return hf_dp.DPDPOTrainer(
        model=model, args=args, privacy=privacy, train_dataset=data, processing_class=tokenizer(), **own
    )


def reward(folder: Path, data: Dataset, privacy: PrivacyConfig, **k: Any) -> Any:
    """A DPRewardTrainer of a whole small model in float64."""
    import trl

    torch.manual_seed(0)
    config = tf.LlamaConfig(**{**M.DECODER, "num_hidden_layers": 1, "num_labels": 1, "pad_token_id": 0})
    return hf_dp.DPRewardTrainer(
        model=tf.LlamaForSequenceClassification(config).double(),
        args=trl.RewardConfig(**{**settings(folder), **k}),
        privacy=privacy,
        train_dataset=data,
        processing_class=tokenizer(),
    )
