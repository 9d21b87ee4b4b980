"""Random `TrainingArguments` and `PrivacyConfig`: one step that equals brute force, or a refusal with its message."""

import copy
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from hf_dp.errors import HfDpError
from hf_dp.per_example.batches import Batch, MicroBatch
from hf_dp.randomness.grid import STD
from hf_dp.sampling.microbatch import micro_batches
from hf_dp.step.run import PrivateRun
from tests.support import models as M
from tests.support import reference, runs

OPTIONS: dict[str, list[Any]] = {
    "per_device_train_batch_size": [1, 2, 5, 24],
    "gradient_accumulation_steps": [1, 2, 8],
    "max_grad_norm": [0.0, 1.0, 0.5],
    "bf16": [True],
    "fp16": [True],
    "tf32": [True],
    "gradient_checkpointing": [True],
    "gradient_checkpointing_kwargs": [{"use_reentrant": False}],
    "optim": ["sgd", "adamw_torch", "adafactor", "adagrad", "rmsprop", "lomo", "galore_adamw_layerwise"],
    "lr_scheduler_type": ["linear", "cosine", "constant", "inverse_sqrt", "reduce_lr_on_plateau"],
    "warmup_steps": [2],
    "weight_decay": [0.1],
    "label_smoothing_factor": [0.1],
    "dataloader_drop_last": [True],
    "dataloader_pin_memory": [False],
    "train_sampling_strategy": ["random", "group_by_length", "sequential"],
    "remove_unused_columns": [False],
    "include_num_input_tokens_seen": ["all"],
    "neftune_noise_alpha": [5.0],
    "use_liger_kernel": [True],
    "torch_compile_backend": ["eager"],
    "auto_find_batch_size": [True],
    "average_tokens_across_devices": [False, True],
    "accelerator_config": [{"split_batches": True}, {"dispatch_batches": True}, {"even_batches": False}],
    "seed": [1],
    "data_seed": [3],
    "full_determinism": [False],
    "logging_steps": [2],
    "logging_nan_inf_filter": [False],
    "skip_memory_metrics": [False, True],
    "debug": ["underflow_overflow"],
    "ignore_data_skip": [True],
    "num_train_epochs": [2],
    "torch_empty_cache_steps": [1],
    "prediction_loss_only": [True],
    "ddp_find_unused_parameters": [True],
}
OPTIONS = {name: values for name, values in OPTIONS.items() if name in TrainingArguments.__dataclass_fields__}
PRIVACY: dict[str, list[Any]] = {
    "noise_multiplier": [1.0, 1.0, 0.5, None, -1.0],
    "target_epsilon": [None, None, None, None, 50.0],
    "expected_batch_size": [1, 6, 12, 24, 24, 25],
    "clip_norm": [1e-3, 0.1, 0.1, 1e3, 0.0],
    "target_delta": [1e-3, 1e-3, None, 0.5],
    "noise": [*["gaussian"] * 6, "gaussian-chacha20", "discrete"],
}
EXTRA: dict[str, list[Any]] = {"micro_batch_tokens": [None, None, 20, 100]}
MODELS = [partial(M.with_lora, M.llama), partial(M.with_lora, M.gpt2), M.llama]


def example(batch: MicroBatch, row: int) -> Batch:
    """One example without its padding."""
    one = batch.rows(slice(row, row + 1))
    columns = slice(0, int(one["attention_mask"].sum()))
    return {name: value[:, columns] for name, value in one.items()}


class Watched(runs.DPTrainer):
    """Keeps the examples that were drawn."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.drawn = [
            {k: v.clone() for k, v in example(batch, i).items()}
            for batch in micro_batches(inputs)
            for i in range(batch.size)
        ]
        return super().training_step(model, inputs, num_items_in_batch)


class Gradients(TrainerCallback):
    """What the optimizer is given."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **k: Any) -> None:
        self.flat = torch.cat([p.grad.flatten() for p in reference.trainable(model).values()])


def one_run(folder: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """'refused', or 'exact' where sum, noise and gradient of one step were what they must be."""
    generator = random.Random(number)
    chosen = generator.sample(sorted(OPTIONS), generator.choice([0, 1, 2, 4]))
    options = {name: generator.choice(OPTIONS[name]) for name in chosen}
    privacy = {name: generator.choice(values) for name, values in PRIVACY.items()}
    if generator.random() < 0.7:  # mostly what is in range, so that more than refusals are seen
        privacy |= {"noise_multiplier": 1.0, "target_epsilon": None, "target_delta": 1e-3}
        privacy |= {
            "expected_batch_size": min(24, privacy["expected_batch_size"]),
            "clip_norm": privacy["clip_norm"] or 0.1,
        }
    extra = {name: generator.choice(values) for name, values in EXTRA.items()}
    torch.manual_seed(number)
    model, seen, sums = generator.choice(MODELS)(), Gradients(), []
    twin = copy.deepcopy(model)
    release, refused = PrivateRun.release, ""

    def noted(self: PrivateRun, clipped_sum: Tensor, draw_number: int) -> Tensor:
        before = clipped_sum.clone()
        noisy = release(self, clipped_sum, draw_number)
        sums.append((before, noisy.clone()))
        return noisy

    with monkeypatch.context() as patch:
        patch.setattr(PrivateRun, "release", noted)
        try:
            args = runs.arguments(folder, **options)
        except (ValueError, ImportError):  # transformers' own refusals, before there is any trainer
            return "refused"
        try:
            trainer = Watched(
                model,
                args,
                privacy=runs.PrivacyConfig(**privacy),
                train_dataset=runs.text_rows(),
                data_collator=runs.collate,
                callbacks=[seen],
                **extra,
            )
            trainer.train()
        except (HfDpError, ValueError) as error:  # ValueError: transformers' own, when it makes optimizer and scheduler
            refused = str(error)
    if not sums:
        assert len(refused) > 30
        return "refused"
    (before, noisy), mechanism = sums[0], trainer.mechanism
    assert (before.dtype == torch.int64) == mechanism.is_discrete
    step = mechanism.noise_std / STD if mechanism.is_discrete else 0.0
    before = before * step if mechanism.is_discrete else before
    smoothing = args.label_smoothing_factor
    twin = twin.double().train()
    expected = torch.zeros(len(before), dtype=torch.float64)
    for one in trainer.drawn:
        one = {k: v.unsqueeze(0) if v.dim() < 2 else v for k, v in one.items()}
        parts = reference.clipped_sum(twin, one, partial(_loss, smoothing), mechanism.clip_norm)
        expected += torch.cat([parts[name].flatten() for name in reference.trainable(twin)])
    scale = max(float(expected.norm()), mechanism.clip_norm * 1e-3)
    # float32; in bfloat16 each activation is off by up to 0.4 %
    rounding = len(trainer.drawn) * step / 2 * len(before) ** 0.5  # to the grid, of each coordinate and example
    allowed = (0.1 if args.bf16 else 1e-4) * scale + rounding
    assert float((before - expected).norm()) < allowed, (number, options, privacy, extra)
    noise = (noisy - before) / (mechanism.noise_multiplier * mechanism.clip_norm)
    assert abs(float(noise.square().mean()) - 1) < 8 * (2 / len(noise)) ** 0.5
    assert torch.allclose(seen.flat, noisy / mechanism.expected_batch_size, rtol=1e-6, atol=0)
    assert trainer.privacy_spent().num_steps == len(sums) == 1
    return "exact"


def _loss(smoothing: float, model: nn.Module, one: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).logits[0, :-1]
    labels = one["labels"][0, 1:]
    kept = labels != -100
    if not bool(kept.any()):
        return logits.sum() * 0.0
    return nn.functional.cross_entropy(logits[kept], labels[kept], label_smoothing=smoothing)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(50))
def test_random_settings_are_exact_or_refused(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 combinations a chunk, 1,000 in all."""
    ends = [one_run(tmp_path / str(n), n, monkeypatch) for n in range(20 * chunk, 20 * chunk + 20)]
    assert ends.count("exact") >= 2
    assert ends.count("refused") >= 2
