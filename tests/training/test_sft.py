"""trl's SFTTrainer, made private: exact sums for each loss mask, and refusals of what joins or drops records."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast, TrainerCallback

import hf_dp
from hf_dp import ConfigError, PrivacyConfig, UnsupportedOptionError
from hf_dp.card.readme import section_of
from hf_dp.per_example.clipping import ROUNDING_MARGIN
from tests.support import models as M
from tests.support import reference, runs
from tests.support.marks import quick
from tests.support.on_trl import settings, tokenizer, words

trl = pytest.importorskip("trl", reason="trl is not installed")


def rows(count: int = 24) -> Dataset:
    g = random.Random(0)
    return Dataset.from_list([{"prompt": words(g, 9), "completion": " " + words(g, 5)} for _ in range(count)])


def sft(
    folder: Path,
    data: Dataset,
    callbacks: Any = None,
    privacy: Any = runs.NOISELESS,
    model: Any = None,
    formatting_func: Any = None,
    **k: Any,
) -> Any:
    return hf_dp.DPSFTTrainer(
        model=M.llama() if model is None else model,
        args=trl.SFTConfig(**{**settings(folder), "max_length": 32, **k}),
        privacy=PrivacyConfig(**privacy, expected_batch_size=len(data), clip_norm=0.1),
        train_dataset=data,
        processing_class=chatty(tokenizer()),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        callbacks=callbacks,
        formatting_func=formatting_func,
    )


TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}w3 {% generation %}{{ m['content'] }} <end> "
    "{% endgeneration %}{% else %}w4 {{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w3 {% endif %}"
)


def chatty(of: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    of.chat_template = TEMPLATE
    return of


def chats(count: int = 6) -> Dataset:
    g = random.Random(1)
    turns = [
        [{"role": role, "content": words(g, 5)} for role in ("user", "assistant") * (1 + i % 2)] for i in range(count)
    ]
    return Dataset.from_list([{"messages": some} for some in turns])


def completions(count: int = 6) -> Dataset:
    return rows(count)


def chat_completions(count: int = 6) -> Dataset:
    return Dataset.from_list([{"prompt": m[:-1], "completion": m[-1:]} for m in chats(count)["messages"]])


def texts(count: int = 6) -> Dataset:
    return Dataset.from_list([{"text": row["prompt"] + row["completion"]} for row in rows(count)])


# what is trained on: records, settings, whether some tokens are no targets
MASKS: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "a text": (texts, {}, False),
    "a text, formatted": (
        completions,
        {"formatting_func": lambda row: f"w5 {row['prompt']}", "completion_only_loss": False},
        False,
    ),
    "a completion": (completions, {}, True),
    "prompt and completion": (completions, {"completion_only_loss": False}, False),
    "a chat": (chats, {}, False),
    "the assistant's turns": (chats, {"assistant_only_loss": True}, True),
    "a chat's completion": (chat_completions, {}, True),
}


@pytest.mark.parametrize("mask", quick(("a completion", "the assistant's turns"), MASKS))
def test_each_loss_mask_is_exact_one_record_at_a_time_in_float64(tmp_path: Path, mask: str) -> None:
    data, options, some_are_no_targets = MASKS[mask]
    trainer = sft(tmp_path, data(), model=M.llama(num_hidden_layers=1).double(), **options)
    M.stirred(trainer.model)
    assert trainer.alone_because == ""
    records = list(trainer._columns_for_model()[0])
    assert any(-100 in row["labels"] for row in records) == some_are_no_targets
    slow: Any = 0.0
    for record in records:
        one, bound = trainer.data_collator([record]), 0.1 * (1 - ROUNDING_MARGIN)
        found = reference.clipped_sum(trainer.model, one, reference.causal_lm_loss, bound)
        slow = slow + torch.cat([part.flatten() for part in found.values()])
    fast = runs.clipped_sum(trainer, trainer._collation()(records))
    assert float((fast - slow).norm() / slow.norm()) < 1e-6  # the sum is in float32


class Keep(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **k: Any) -> None:
        self.seen = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def test_one_step_of_supervised_fine_tuning_is_exact(tmp_path: Path) -> None:
    keep = Keep()
    trainer = sft(tmp_path, rows(), [keep])
    M.stirred(trainer.model)
    slow = {n: torch.zeros_like(p) for n, p in reference.trainable(trainer.model).items()}
    for row in trainer.train_dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        assert (labels == -100).any()
        one = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        for name, g in reference.clipped_sum(trainer.model, one, reference.causal_lm_loss, 0.1).items():
            slow[name] += g / 24
    trainer.train()
    assert reference.relative_difference(keep.seen, slow) < 1e-5  # float32


@pytest.mark.parametrize("option", ["packing", "padding_free"])
def test_records_in_one_row_are_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=f"{option}=True"):
        sft(tmp_path, rows(), **{option: True})


def test_a_trainer_that_drops_records_is_refused(tmp_path: Path) -> None:
    """trl drops records whose completion was cut off: N, q and epsilon would silently be those of another data set."""
    long_prompt = {"prompt": " ".join(["w5"] * 40), "completion": " w6"}
    with pytest.raises(ConfigError, match="made 24 training records out of the 25"):
        sft(tmp_path, Dataset.from_list([*rows(), long_prompt]))


def test_the_privacy_section_survives_trls_card_and_is_the_same_in_the_checkpoint(tmp_path: Path) -> None:
    """trl writes README.md from a template of its own, PEFT rewrites its tags at each save."""
    noisy = {"noise_multiplier": 1.0, "target_delta": 1e-3}
    trainer = sft(tmp_path, rows(), privacy=noisy, save_strategy="steps", save_steps=1)
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert not {name for name in logged if "token" in name or "entropy" in name or "loss" in name}
    trainer.save_model()
    written = section_of((tmp_path / "README.md").read_text())
    for _ in range(3):
        trainer.create_model_card(model_name="mine", tags=["mine"])
        trainer.save_model()
        loaded = ModelCard.load(tmp_path / "README.md")
        assert "TRL" not in loaded.text  # nothing there but the template's words
        assert loaded.text.count("## How to use it") == 1
        assert loaded.text.count("## Privacy") == 1
        assert section_of(loaded.content) == written
        assert {"trl", "sft", "differential-privacy", "dp-sgd"} <= set(loaded.data.tags)
        assert loaded.data["privacy"]["num_steps"] == 1
        again = ModelCardData(**loaded.data.to_dict()).to_dict()
        assert again["privacy"] == loaded.data["privacy"] == yaml.safe_load(loaded.content.split("---")[1])["privacy"]
    checkpoint = ModelCard.load(tmp_path / "checkpoint-1" / "README.md")
    assert section_of(checkpoint.content) == written
    assert checkpoint.data["privacy"] == loaded.data["privacy"]
    assert (tmp_path / "checkpoint-1/privacy.json").read_bytes() == (tmp_path / "privacy.json").read_bytes()
