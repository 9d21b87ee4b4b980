"""Tasks beyond causal language modelling, trained and evaluated by the trainers a user would take for them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerFast,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

from hf_dp import DPSeq2SeqTrainer, PrivacyConfig, SelfCheckError, UnsupportedOptionError
from tests.support import models as M
from tests.support import reference, runs
from tests.support.marks import quick

PRIVATE = {"noise_multiplier": 1.0, "target_delta": 1e-3}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<pad>": 0, "<unk>": 1, "<end>": 2, "<mask>": 3, **{f"w{i}": i for i in range(4, M.VOCAB)}}
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), **special)


class KeepGradients(TrainerCallback):
    """The gradients that the optimizer saw, by name."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **k: Any) -> None:
        self.seen = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def one_step_equals_the_slow_twin(folder: Path, model: nn.Module, rows: Dataset, example_loss: Any, **k: Any) -> None:
    """At q = 1 and without noise, the gradient is the clipped mean of one example at a time."""
    keep, gradients = KeepGradients(), {n: torch.zeros_like(p) for n, p in reference.trainable(model).items()}
    collate = k.get("data_collator", runs.collate)
    for row in rows:
        one = collate([dict(row)])
        for name, g in reference.clipped_sum(model, one, example_loss, 0.1).items():
            gradients[name] += g / len(rows)
    runs.trainer(folder, model, train_dataset=rows, callbacks=[keep], **k).train()
    assert reference.relative_difference(keep.seen, gradients) < 1e-5  # float32


@pytest.mark.parametrize("build", quick((M.gemma2,), [M.llama, M.gpt2, M.gemma2, M.bloom]))
def test_logits_of_prompts_are_left_out_and_nothing_changes(build: Any, tmp_path: Path) -> None:
    """Prompts of 1 to 8 tokens without targets, and a record that is all prompt."""
    kept = []

    def shorten(row: dict, index: int) -> dict:
        prompt = min(1 + index % 8, len(row["labels"]))
        return {"labels": [-100] * prompt + row["labels"][prompt:]}

    model = M.with_lora(build)
    rows = runs.text_rows(longest=20).map(shorten, with_indices=True).filter(lambda r: len(r["labels"]) > 6)
    head = model.get_base_model().get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, output: kept.append(output.shape[1]))
    one_step_equals_the_slow_twin(
        tmp_path,
        model,
        rows,
        reference.causal_lm_loss,
        privacy={**runs.NOISELESS, "expected_batch_size": len(rows)},
        per_device_train_batch_size=3,
    )
    hook.remove()
    assert min(kept[-3:]) < 15


def test_token_classification(tmp_path: Path, tokenizer: Any) -> None:
    rows = runs.text_rows()
    rows = rows.map(lambda r: {"labels": [t % 5 for t in r["input_ids"]]})
    collate = DataCollatorForTokenClassification(tokenizer)
    one_step_equals_the_slow_twin(
        tmp_path, M.roberta_tokens(), rows, reference.token_loss, data_collator=collate, per_device_train_batch_size=3
    )


def test_multi_label_and_regression(tmp_path: Path) -> None:
    def with_labels(make: Any) -> Dataset:
        rows = runs.text_rows().remove_columns("labels")
        return rows.add_column("labels", [make(i) for i in range(len(rows))])

    def collate(features: list[dict]) -> dict[str, Tensor]:
        batch = runs.collate([{**f, "labels": 0} for f in features])
        return {**batch, "labels": torch.tensor([f["labels"] for f in features], dtype=torch.float32)}

    def multi(model: nn.Module, one: dict) -> Tensor:
        inputs = {k: v for k, v in one.items() if k != "labels"}
        return nn.functional.binary_cross_entropy_with_logits(model(**inputs).logits, one["labels"])

    def score(model: nn.Module, one: dict) -> Tensor:
        inputs = {k: v for k, v in one.items() if k != "labels"}
        return nn.functional.mse_loss(model(**inputs).logits.squeeze(-1), one["labels"])

    several = with_labels(lambda i: [float(i % k == 0) for k in range(2, 7)])
    model = M.bert(problem_type="multi_label_classification")
    one_step_equals_the_slow_twin(tmp_path / "a", model, several, multi, data_collator=collate)
    numbers = with_labels(lambda i: i / 24)
    one_step_equals_the_slow_twin(tmp_path / "b", M.bert(num_labels=1), numbers, score, data_collator=collate)


def test_label_smoothing(tmp_path: Path) -> None:
    def smooth(model: nn.Module, one: dict) -> Tensor:
        logits = model(**{k: v for k, v in one.items() if k != "labels"}).logits[0, :-1]
        labels = one["labels"][0, 1:]
        kept = labels != -100
        return nn.functional.cross_entropy(logits[kept], labels[kept], label_smoothing=0.1)

    model = M.with_lora(M.llama)
    one_step_equals_the_slow_twin(tmp_path, model, runs.text_rows(), smooth, label_smoothing_factor=0.1)


@pytest.mark.parametrize("build", quick((M.t5,), [M.t5, M.bart]))
def test_sequence_to_sequence(build: Any, tmp_path: Path, tokenizer: Any) -> None:
    """One exact step, and generation in evaluation."""
    rows = runs.text_rows(longest=9)
    model = build()
    collate = DataCollatorForSeq2Seq(tokenizer, model=model)
    with_prompt = rows.map(lambda r: {"labels": r["labels"][1:]})
    loss = reference.token_loss
    one_step_equals_the_slow_twin(tmp_path / "a", model, with_prompt, loss, data_collator=collate)
    seen = {}
    plain = runs.arguments(tmp_path / "b", max_steps=2).to_dict()
    kept = {k: plain[k] for k in "output_dir use_cpu report_to disable_tqdm max_steps save_strategy optim".split()}
    model = build()
    trainer = DPSeq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(**kept, predict_with_generate=True, generation_max_length=6),
        privacy=PrivacyConfig(**PRIVATE, expected_batch_size=8),
        train_dataset=with_prompt,
        eval_dataset=with_prompt,
        data_collator=collate,
        compute_metrics=lambda p: seen.update(shape=p.predictions.shape) or {"length": p.predictions.shape[1]},
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert seen["shape"][0] == 24
    assert metrics["eval_length"] == seen["shape"][1] > 1
    assert trainer.privacy_spent().num_steps == 2


def test_masked_language_modelling_draws_its_masks_in_secret(tmp_path: Path, tokenizer: Any) -> None:
    """The collator draws from the global generator: it must neither depend on `args.seed` nor move that generator."""
    batches = []

    class Watch(DataCollatorForLanguageModeling):
        def __call__(self, features: Any, return_tensors: Any = None) -> Any:
            batch = super().__call__(features, return_tensors)
            batches.append(batch["labels"].clone())
            return batch

    rows = runs.text_rows().remove_columns("labels")
    states = []
    for folder in ("a", "b"):
        torch.manual_seed(0)
        trainer = runs.trainer(
            tmp_path / folder,
            M.bert_masked_lm(),
            {**PRIVATE, "expected_batch_size": 24},
            train_dataset=rows,
            data_collator=Watch(tokenizer, mlm_probability=0.5),
            per_device_train_batch_size=24,
        )
        batches.clear()
        trainer.train()
        step = batches[-len(rows) :]  # each record by itself: those of the step come last
        states.append((torch.get_rng_state(), torch.cat([labels.flatten() for labels in step])))
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1].shape == states[1][1].shape
    assert not torch.equal(states[0][1], states[1][1])


def test_masked_language_modelling_still_passes_through_the_self_check(tmp_path: Path, tokenizer: Any) -> None:
    """Its masks differ from call to call: the check compares rows of one collated batch, without their padding."""
    rows = runs.text_rows().remove_columns("labels")

    class Coupled(type(M.bert_masked_lm())):
        def forward(self, **inputs: Any) -> Any:
            outputs = super().forward(**inputs)
            outputs.logits = outputs.logits - outputs.logits.mean(0, keepdim=True)
            return outputs

    model = M.bert_masked_lm()
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5)  # else made-up records may have no mask
    sound = runs.trainer(tmp_path, model, train_dataset=rows, data_collator=collate)
    assert sound.self_check()["difference"] < 1e-4
    model.__class__ = type("CoupledForMaskedLM", (Coupled,), {})
    with pytest.raises(SelfCheckError, match="mixes examples"):
        sound.self_check()


def test_a_collator_with_a_seed_of_its_own_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    rows = runs.text_rows().remove_columns("labels")
    collate = DataCollatorForLanguageModeling(tokenizer, seed=1)
    with pytest.raises(UnsupportedOptionError, match=r"DataCollatorForLanguageModeling\(seed="):
        runs.trainer(tmp_path, M.bert_masked_lm(), train_dataset=rows, data_collator=collate)


def test_pictures(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = [
        {"pixel_values": torch.tensor(generator.normal(size=(3, 8, 8)), dtype=torch.float32), "labels": i % 5}
        for i in range(12)
    ]

    class Pictures(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict:
            return rows[index]

    def collate(features: list[dict]) -> dict[str, Tensor]:
        pixels = torch.stack([f["pixel_values"] for f in features])
        return {"pixel_values": pixels, "labels": torch.tensor([f["labels"] for f in features])}

    model, keep = M.vit(), KeepGradients()
    batch = collate(rows)
    slow = reference.clipped_sum(model, batch, reference.classification_loss, 0.1)
    runs.trainer(
        tmp_path,
        model,
        {**runs.NOISELESS, "expected_batch_size": 12},
        train_dataset=Pictures(),
        data_collator=collate,
        callbacks=[keep],
    ).train()
    assert reference.relative_difference(keep.seen, {n: g / 12 for n, g in slow.items()}) < 1e-5  # float32
