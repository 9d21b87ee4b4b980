"""Records, data sets, classes and settings that can't be trained with: each error says what to do, and that works."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_dp import DPTrainer
from hf_dp.errors import ConfigError
from tests.support import models as M
from tests.support import runs

SPEECH = {**M.bart().config.to_dict(), "max_source_positions": 16, "max_target_positions": 32}
WHISPER = {**SPEECH, "num_mel_bins": 8}
SPEECH2TEXT = {**SPEECH, "input_feat_per_channel": 8, "conv_channels": 8, "conv_kernel_sizes": (3, 3)}


def whisper() -> nn.Module:
    return tf.WhisperForConditionalGeneration(tf.WhisperConfig(**WHISPER))


def speech2text() -> nn.Module:
    return tf.Speech2TextForConditionalGeneration(tf.Speech2TextConfig(**SPEECH2TEXT))


def sounds(length: int) -> list[dict[str, Any]]:
    shape = (8, length) if length == 32 else (length, 8)
    return [{"input_features": torch.randn(shape), "labels": torch.randint(3, M.VOCAB, (4,))} for _ in range(24)]


def stacked(features: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([f[name] for f in features]) for name in features[0]}


def adapted(folder: Path, build: Any, length: int, task: str | None) -> DPTrainer:
    model = get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj"], task_type=task))
    settings = {"data_collator": stacked, "remove_unused_columns": False}
    return runs.trainer(folder, model, train_dataset=sounds(length), **settings)


@pytest.mark.parametrize(
    ("build", "length", "tasks"),
    [
        (whisper, 32, ["SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", "CAUSAL_LM"]),
        (speech2text, 20, ["SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"]),
    ],
)
def test_an_adapter_whose_task_adds_inputs_is_told_to_leave_the_task_out(
    build: Any, length: int, tasks: list[str], tmp_path: Path
) -> None:
    for task in tasks:
        with pytest.raises(ConfigError, match=r"gives it inputs that it does not take.*leave task_type out"):
            adapted(tmp_path, build, length, task)
    adapted(tmp_path, build, length, None)
