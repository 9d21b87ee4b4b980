"""Records, data sets, classes and settings that can't be trained with: each error says what to do, and that works."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from datasets import Dataset, DatasetDict, IterableDatasetDict
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_dp import DPTrainer, DPTrainerMixin, PrivacyConfig
from hf_dp.errors import ConfigError, UnsupportedOptionError
from tests.support import models as M
from tests.support import runs
from tests.support.exact import exact

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


# ---- data sets -------------------------------------------------------------------------------------------------------


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        yield from runs.text_rows()


class StreamOfKnownLength(Stream):
    def __len__(self) -> int:
        return 24


ROWS = runs.text_rows()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "train_dataset is empty"),
        (ROWS.select([]), "train_dataset is empty"),
        (DatasetDict(train=ROWS, test=ROWS), r"DatasetDict of the splits train, test: give .*data\['train'\]"),
        (IterableDatasetDict(all=ROWS.to_iterable_dataset()), r"of the splits all: give .*data\['all'\]"),
        (ROWS.to_dict(), r"a dict of columns: .*Dataset.from_dict"),
        (ROWS.to_pandas(), r"table of pandas: give datasets.Dataset.from_pandas"),
        (ROWS.to_iterable_dataset(), "IterableDataset: .* load it as a map-style dataset"),
        (Stream(), "Stream: .* load it as a map-style dataset"),
        (StreamOfKnownLength(), "StreamOfKnownLength: .* load it as a map-style dataset"),
        (iter([]), "load it as a map-style dataset"),
        ("imdb", r"is a name: give datasets.load_dataset\('imdb', split='train'\)"),
        (Path("rows.json"), "is a name"),
    ],
)
def test_a_data_set_that_cannot_be_drawn_from_is_named(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match=message):
        runs.trainer(tmp_path, M.llama(), train_dataset=given)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (
            "privacy",
            {"target_epsilon": 8.0},
            r"PrivacyConfig, got a dict: give privacy=PrivacyConfig\(\*\*privacy\)",
        ),
        ("privacy", 8.0, r"type PrivacyConfig, got a float: give privacy=PrivacyConfig\(\.\.\.\)"),
        ("privacy", None, r"type PrivacyConfig, got a NoneType"),
        ("audit", {"num_canaries": 100}, r"audit=AuditConfig\(\*\*audit\)"),
        ("args", PrivacyConfig(target_epsilon=8.0), r"type TrainingArguments, got a PrivacyConfig"),
        ("micro_batch_tokens", "100", r"a whole number, 1 or more \(got '100'\)"),
        ("micro_batch_tokens", 0, r"a whole number, 1 or more \(got 0\)"),
        ("check_records", ROWS[0], r"a list of public records, .* \(got a dict\)"),
        ("check_records", [], r"a list of public records, .* \(got an empty list\)"),
        ("model_init", M.llama, r"hyperparameter search.*give model=model_init\(\)"),
    ],
)
def test_an_argument_of_another_type_is_named(name: str, given: Any, message: str, tmp_path: Path) -> None:
    settings = {"args": runs.arguments(tmp_path), "privacy": PrivacyConfig(**runs.NOISELESS, expected_batch_size=24)}
    with pytest.raises(ConfigError, match=message):
        DPTrainer(**{**settings, "train_dataset": ROWS, "data_collator": runs.collate, name: given})


def test_a_first_trainer_warns_of_nothing_in_the_checks(tmp_path: Path) -> None:
    """PyTorch warns where a number is read out of a graph: once a process, unless it is told otherwise."""
    model, before = M.with_lora(M.bert, task_type="SEQ_CLS"), torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            runs.trainer(tmp_path, model, train_dataset=runs.class_rows()).self_check()
    finally:
        torch.set_warn_always(before)


def test_without_records_there_is_nothing_to_train(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to plan or train without a train_dataset"):
        runs.trainer(tmp_path, M.llama(), train_dataset=None).train()


# ---- classes ---------------------------------------------------------------------------------------------------------


def test_the_mixin_stands_before_the_trainer() -> None:
    with pytest.raises(ConfigError, match=r"without privacy: .* class Mine\(DPTrainerMixin, Trainer\)"):
        type("Mine", (tf.Trainer, DPTrainerMixin), {})
    with pytest.raises(ConfigError, match=r"class Mine\(DPTrainerMixin, Seq2SeqTrainer\)"):
        type("Mine", (tf.Seq2SeqTrainer, DPTrainer), {})


def test_the_mixin_needs_a_trainer(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match=r"Alone has no Trainer beside DPTrainerMixin"):
        type("Alone", (DPTrainerMixin,), {})(privacy=PrivacyConfig(noise_multiplier=1.0))


def of_trl(name: str) -> tuple[type, type]:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    return getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")


PAIRS = [{"prompt": "w4", "chosen": " w5", "rejected": " w6"}] * 24
JUDGED = [{"prompt": "w4", "completion": " w5", "label": True}] * 24


@pytest.mark.parametrize(
    ("name", "rows", "message", "extra"),
    [
        ("DPO", PAIRS, "its loss is of pairs", {}),
        ("Reward", PAIRS, "its loss is of pairs", {}),
        ("KTO", JUDGED, "a term over the whole batch", {}),
        ("GRPO", PAIRS, "texts that the model writes", {"reward_funcs": len}),
        ("RLOO", PAIRS, "texts that the model writes", {"reward_funcs": len}),
    ],
)
def test_a_trainer_of_trl_that_is_not_of_records_is_one_error(
    name: str, rows: Any, message: str, extra: Any, tmp_path: Path
) -> None:
    trainer, config = of_trl(name)
    settings = {"num_generations": 2} if extra else {}
    args = config(str(tmp_path), per_device_train_batch_size=2, use_cpu=True, bf16=False, report_to=[], **settings)
    mine = type("Mine", (DPTrainerMixin, trainer), {})
    privacy = PrivacyConfig(noise_multiplier=1.0, expected_batch_size=8)
    with pytest.raises(UnsupportedOptionError, match=message) as refusal:
        mine(model=M.llama(), args=args, privacy=privacy, train_dataset=Dataset.from_list(rows), **extra)
    assert f"trl's {name}Trainer" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def preferences(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Records with two answers -> tensors [B, 2, T]."""
    rows = [f["prompt"] + f[answer] for f in features for answer in ("chosen", "rejected")]
    starts, longest = [len(f["prompt"]) for f in features for _ in range(2)], max(map(len, rows))
    batch = runs.collate(
        [
            {"input_ids": row, "attention_mask": [1] * len(row), "labels": [-100] * start + row[start:]}
            for row, start in zip(rows, starts, strict=True)
        ]
    )
    return {name: x.view(len(features), 2, longest) for name, x in batch.items()}


def of_preferences(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of direct preference optimisation, with the model without its adapter as the reference."""

    def score(answer: int) -> Tensor:
        ids, mask, labels = (batch[name][:, answer] for name in ("input_ids", "attention_mask", "labels"))
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        each = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        return -each.sum(1)

    with torch.no_grad(), model.disable_adapter():
        reference_gap = score(0) - score(1)
    return -F.logsigmoid(0.5 * (score(0) - score(1) - reference_gap))


class Preferring(DPTrainer):
    def example_losses(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return of_preferences(model, inputs)


def test_preferences_are_trained_as_the_error_says(tmp_path: Path) -> None:
    torch.manual_seed(0)
    words = lambda count: torch.randint(3, M.VOCAB, (count,)).tolist()  # noqa: E731
    rows = [{"prompt": words(3), "chosen": words(3 + i % 3), "rejected": words(2 + i % 4)} for i in range(6)]
    settings = {"data_collator": preferences, "trainer_class": Preferring}
    assert exact(tmp_path, M.with_lora(M.llama), rows, of_preferences, **settings).alone_because == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="flex attention has gradients there")
def test_an_attention_that_has_no_gradients_here_is_told_another(tmp_path: Path) -> None:
    size = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    with pytest.raises(ConfigError, match=r"is not implemented on this device.*attn_implementation='sdpa'"):
        runs.trainer(tmp_path, M.llama(attn_implementation="flex_attention", **size))
    runs.trainer(tmp_path, M.llama(attn_implementation="sdpa", **size)).train()
