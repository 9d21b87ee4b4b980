"""A toy model folder, data files and a recipe for tests of the command line: made here, no network."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "<pad> <end> <unk> name price pub cheap the a is | : red blue green sad glad".split()
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A word a token, split at white space."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=32, **marks)


def save_causal_lm(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": len(WORDS), "max_position_embeddings": 32}
    LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, eos_token_id=1, bos_token_id=None)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_encoder(folder: Path) -> Path:
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**SIZES, vocab_size=len(WORDS), max_position_embeddings=32)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def notes(count: int) -> list[dict[str, Any]]:
    return [{"mr": f"name {WORDS[3 + i % 3]}", "ref": "the pub is " + WORDS[11 + i % 3]} for i in range(count)]


def moods(count: int) -> list[dict[str, Any]]:
    return [{"text": ("red the pub", "blue a price")[i % 2], "label": ("sad", "glad")[i % 2]} for i in range(count)]


def sections(folder: Path, **changes: Any) -> dict[str, Any]:
    """A whole recipe on files made in `folder`; a change replaces one key: `training__max_steps=3`; None drops it."""
    recipe: dict[str, Any] = {
        "model": {"name": str(save_causal_lm(folder / "base"))},
        "lora": {"r": 2, "target_modules": "all-linear"},
        "data": {
            "train": str(write_lines(folder / "train.jsonl", notes(40))),
            "validation": str(write_lines(folder / "validation.jsonl", notes(6))),
            "prompt": "{mr} | ",
            "target": "{ref}",
        },
        "training": {
            "output_dir": str(folder / "out"),
            "max_steps": 2,
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
        },
        "privacy": {"target_epsilon": 8, "expected_batch_size": 10},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        recipe[section][key] = value
        if value is None:
            del recipe[section][key]
    return recipe


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(sections(folder, **changes)), encoding="utf-8")
    return path


def write_classifier(folder: Path, **changes: Any) -> Path:
    recipe = {
        "model__name": str(save_encoder(folder / "encoder")),
        "model__task": "sequence_classification",
        "data__train": str(write_lines(folder / "train_moods.jsonl", moods(40))),
        "data__validation": str(write_lines(folder / "validation_moods.jsonl", moods(6))),
        "data__prompt": None,
        "data__target": None,
        "data__text": "{text}",
        "data__label": "label",
    }
    return write(folder, **{**recipe, **changes})


def opinions(count: int) -> list[dict[str, Any]]:
    return [{"mr": f"name {WORDS[3 + i % 3]}", "good": "the pub is red", "bad": "a price"} for i in range(count)]


def write_preferences(folder: Path, **changes: Any) -> Path:
    recipe = {
        "model__task": "preference",
        "data__train": str(write_lines(folder / "train_opinions.jsonl", opinions(40))),
        "data__validation": str(write_lines(folder / "validation_opinions.jsonl", opinions(6))),
        "data__target": None,
        "data__chosen": "{good}",
        "data__rejected": "{bad}",
        "data__max_length": 16,
        "training__beta": 0.5,
    }
    return write(folder, **{**recipe, **changes})
