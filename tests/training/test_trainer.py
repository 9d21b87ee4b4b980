"""DPTrainer as a user meets it: one step equals brute force, what it logs, saves, refuses, and how it resumes."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer as PlainTrainer
from transformers import TrainerCallback, TrainingArguments

from hf_dp import DPTrainer, PrivacyConfig
from hf_dp.errors import CaptureError, ConfigError, LedgerError, UnsupportedOptionError
from hf_dp.ledger.ledger import LEDGER_NAME, read_ledger
from tests.support import models as M
from tests.support import reference, runs
from tests.support.marks import quick

BERT_LORA = partial(M.with_lora, partial(M.bert, pad_token_id=0), task_type="SEQ_CLS")
CASES = {
    "llama": (partial(M.with_lora, M.llama), runs.text_rows, reference.causal_lm_loss),
    "gpt2": (partial(M.with_lora, M.gpt2), runs.text_rows, reference.causal_lm_loss),
    "bert": (BERT_LORA, runs.class_rows, reference.classification_loss),
}


LMS = (
    M.llama, M.mistral, M.qwen2, M.qwen3, M.gemma, M.gemma2, M.gemma3, M.phi3, M.gpt2, M.gpt_neox, M.opt, M.bloom
)  # fmt: skip
CLASSIFIERS = (partial(M.bert, pad_token_id=0), M.distilbert, M.modernbert, M.electra, M.albert, M.deberta)
QUICK = (M.gemma3,)  # the others are marked slow


def brute_force(model: nn.Module, rows: Any, loss: Any, clip_norm: float) -> dict[str, Tensor]:
    """The clipped mean over all rows, each collated alone, in float64."""
    twin = model.double().train()
    total = {name: torch.zeros_like(p) for name, p in reference.trainable(twin).items()}
    for row in rows:
        for name, g in reference.clipped_sum(twin, runs.collate([row]), loss, clip_norm).items():
            total[name] += g / len(rows)
    return total


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in reference.trainable(model).items()}


class Gradients(TrainerCallback):
    """What the optimizer is given."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **k: Any) -> None:
        self.gradients = {name: p.grad.clone() for name, p in reference.trainable(model).items()}


def one_step(folder: Path, model: nn.Module, rows: Any, micro_batch: int) -> dict[str, Tensor]:
    """The gradients of a step at q = 1 without noise; the weights move by them and nothing else, and are put back."""
    before, seen = weights(model), Gradients()
    settings = {"train_dataset": rows, "per_device_train_batch_size": micro_batch, "callbacks": [seen]}
    runs.trainer(folder, model, **settings).train()
    for name, p in reference.trainable(model).items():
        assert torch.equal(p, before[name] - seen.gradients[name])  # SGD of rate 1
        p.data.copy_(before[name])
    return seen.gradients


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("micro_batch", quick((3,), [1, 3, 24]))
def test_one_step_at_q_1_without_noise_is_the_clipped_mean(case: str, micro_batch: int, tmp_path: Path) -> None:
    build, make_rows, loss = CASES[case]
    model, rows = build(), make_rows()
    gradients = one_step(tmp_path, model, rows, micro_batch)
    assert reference.relative_difference(gradients, brute_force(model, rows, loss, 0.1)) < 1e-5  # float32


@pytest.mark.parametrize(
    "build",
    [build if build in QUICK else pytest.param(build, marks=pytest.mark.slow) for build in (*LMS, *CLASSIFIERS)],
    ids=lambda b: getattr(b, "__name__", "bert"),
)
def test_and_so_it_is_for_all_weights_of_many_architectures(build: Any, tmp_path: Path) -> None:
    model = build()
    rows, loss = (
        (runs.class_rows(), reference.classification_loss)
        if build in CLASSIFIERS
        else (runs.text_rows(), reference.causal_lm_loss)
    )
    steps = [one_step(tmp_path / str(n), model, rows, n) for n in (1, 3, 24)]
    expected = brute_force(model, rows, loss, 0.1)
    assert all(reference.relative_difference(g, expected) < 1e-5 for g in steps)  # float32


@pytest.mark.parametrize(
    "settings",
    quick(
        ({"micro_batch_tokens": 20},),
        [{"per_device_train_batch_size": 2}, {"micro_batch_tokens": 20}, {"dataloader_num_workers": 2}],
    ),
)
def test_micro_batches_are_a_matter_of_memory_alone(settings: dict[str, int], tmp_path: Path) -> None:
    start = M.with_lora(M.llama).state_dict()

    def final(folder: Path, **k: int) -> dict[str, Tensor]:
        model = M.with_lora(M.llama)
        model.load_state_dict(start)
        privacy = {"noise_multiplier": 1.0, "debug_seed": 3, "target_delta": 1e-3, "expected_batch_size": 8}
        runs.trainer(folder, model, privacy, max_steps=4, learning_rate=0.1, **k).train()
        return weights(model)

    assert (
        reference.relative_difference(final(tmp_path / "a", **settings), final(tmp_path / "b")) < 1e-6
    )  # float32 sums


def test_no_clipping_and_no_noise_give_plain_training(tmp_path: Path) -> None:
    """Over the same draws: the mean of per-example means, divided by the expected batch."""
    model, rows, seen = M.with_lora(M.llama), runs.text_rows(), Gradients()
    before = weights(model)
    privacy = {**runs.NOISELESS, "clip_norm": 1e6}
    runs.trainer(tmp_path, model, privacy, train_dataset=rows, callbacks=[seen]).train()
    with torch.no_grad():
        for name, p in reference.trainable(model).items():
            p.copy_(before[name])
    mean = torch.stack([reference.causal_lm_loss(model, runs.collate([row])) for row in rows]).mean()
    mean.backward()
    expected = {name: p.grad for name, p in reference.trainable(model).items()}
    assert reference.relative_difference(seen.gradients, expected) < 1e-5  # float32


def test_removing_any_one_record_moves_the_sum_by_at_most_c(tmp_path: Path) -> None:
    """Neighbour replay with the same draws: short, long, duplicate and extreme rows; C straddles the gradient norms."""
    rows = runs.text_rows(12).to_list()
    rows += [rows[0], {"input_ids": [5], "attention_mask": [1], "labels": [5]}]
    rows.append({"input_ids": [7] * 60, "attention_mask": [1] * 60, "labels": [8] * 60})
    model = M.with_lora(M.llama)
    sums: list[Tensor] = []
    trainer = runs.trainer(
        tmp_path,
        model,
        train_dataset=runs.Dataset.from_list(rows),
        privacy={**runs.NOISELESS, "expected_batch_size": 15},
    )
    for clip_norm in (1e-3, 0.2, 1e3):
        sums = []
        for kept in [rows, *[rows[:i] + rows[i + 1 :] for i in range(len(rows))]]:
            sums.append(runs.clipped_sum(trainer, runs.collated(kept, 4), clip_norm=clip_norm))
        moves = torch.stack([(s - sums[0]).norm() for s in sums[1:]]) / clip_norm
        assert float(moves.max()) <= 1 + 1e-5  # float32 sums
        assert float(moves.max()) > (0.99 if clip_norm < 1 else 0.0)


def test_noise_has_the_stated_standard_deviation(tmp_path: Path) -> None:
    """Two-sided: sigma x C / B on the update, and 2/3 or 3/2 of it would be far outside."""
    model = M.with_lora(partial(M.llama, hidden_size=64, intermediate_size=128), r=16)
    before = weights(model)
    privacy = {"noise_multiplier": 2.0, "clip_norm": 0.5, "expected_batch_size": 8, "target_delta": 1e-3}
    runs.trainer(tmp_path, model, privacy, learning_rate=1e6).train()  # the step drowns the weights' rounding
    noise = torch.cat([((before[n] - p) / 1e6).flatten() for n, p in weights(model).items()])
    ratio = float(noise.std()) / (2.0 * 0.5 / 8)
    bound = 5 / math.sqrt(2 * noise.numel()) + 0.02  # five standard errors, and the signal: norm below C in the sum
    assert abs(ratio - 1) < bound < 1 / 3


def test_two_runs_with_the_same_seed_have_different_noise(tmp_path: Path) -> None:
    start = M.with_lora(M.llama).state_dict()

    def final(folder: Path) -> Tensor:
        model = M.with_lora(M.llama)
        model.load_state_dict(start)
        privacy = {"noise_multiplier": 50.0, "target_delta": 1e-3, "expected_batch_size": 8}
        runs.trainer(folder, model, privacy, seed=42, data_seed=42).train()
        return torch.cat([(p - start[n]).flatten() for n, p in weights(model).items()])

    a, b = final(tmp_path / "a"), final(tmp_path / "b")
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / math.sqrt(len(a))


def test_empty_batches_are_noise_only_steps_and_are_charged(tmp_path: Path) -> None:
    model = M.with_lora(M.llama)
    privacy = {"noise_multiplier": 1.0, "expected_batch_size": 1, "target_delta": 1e-3}
    settings = {"max_steps": 40, "logging_steps": 40, "learning_rate": 0.01}
    trainer = runs.trainer(tmp_path, model, privacy, train_dataset=runs.text_rows(200), **settings)
    moved: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **k: Any) -> None:
            now = torch.cat([p.detach().flatten() for p in reference.trainable(model).values()])
            moved.append(float((now - self.last).norm()) if moved or hasattr(self, "last") else 1.0)
            self.last = now

    trainer.add_callback(Watch())
    trainer.train()
    assert len(moved) == 40  # a run without an empty draw, where this test sees nothing, has a chance of 1e-8
    assert min(moved) > 0
    assert trainer.privacy_spent().num_steps == 40


# ---- what leaves -----------------------------------------------------------------------------------------------------


def test_logs_have_epsilon_and_no_unnoised_number(tmp_path: Path) -> None:
    privacy = {"target_epsilon": 8.0, "target_delta": 1e-3, "expected_batch_size": 8}
    trainer = runs.trainer(tmp_path, None, privacy, max_steps=6, eval_dataset=runs.text_rows(8, seed=1))
    output = trainer.train()
    trainer.evaluate()
    history = trainer.state.log_history
    assert not any({"loss", "train_loss", "total_flos"} & set(entry) for entry in history)
    epsilons = [entry["epsilon"] for entry in history if "learning_rate" in entry]
    assert len(epsilons) == 6
    assert epsilons == sorted(epsilons)
    assert epsilons[-1] <= 8.0
    assert math.isnan(output.training_loss)
    assert "train_loss" not in output.metrics
    assert history[-1]["eval_not_covered_by_privacy"] == 1.0
    assert math.isfinite(history[-1]["eval_loss"])


@pytest.mark.slow
def test_a_saved_adapter_loads_with_peft_alone_in_a_fresh_process(tmp_path: Path) -> None:
    base = M.llama()
    base.save_pretrained(tmp_path / "base")
    model = M.with_lora(lambda: base)
    trainer = runs.trainer(
        tmp_path / "out", model, {"noise_multiplier": 1.0, "target_delta": 1e-3, "expected_batch_size": 8}
    )
    trainer.train()
    trainer.save_model()
    batch = M.token_batch(2)
    del batch["labels"]
    torch.save((batch, model.eval()(**batch).logits), tmp_path / "expected.pt")
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
folder = sys.argv[1]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder + "/base"), folder + "/out").eval()
batch, expected = torch.load(folder + "/expected.pt")
assert torch.allclose(model(**batch).logits, expected, atol=1e-5)
assert not any(name.startswith("hf_dp") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)


def test_the_card_states_what_the_ledger_says(tmp_path: Path) -> None:
    trainer = runs.trainer(
        tmp_path, None, {"noise_multiplier": 1.0, "target_delta": 1e-3, "expected_batch_size": 8}, max_steps=5
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    spent = trainer.privacy_spent()
    record = json.loads((tmp_path / "privacy.json").read_text())
    assert spent.num_steps == read_ledger(tmp_path / LEDGER_NAME).num_steps == 5
    assert str(spent.epsilon)[:5] in json.dumps(record)
    assert "differential-privacy" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("privacy", [runs.NOISELESS, {"noise_multiplier": 1.0, "debug_seed": 1, "target_delta": 1e-3}])
def test_a_run_without_a_guarantee_says_so(
    privacy: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = runs.trainer(tmp_path, None, privacy)
    trainer.train()
    trainer.save_model()
    assert trainer.privacy_spent().epsilon == math.inf
    assert "NOT PRIVATE" in capsys.readouterr().out
    assert "NOT PRIVATE" in (tmp_path / "README.md").read_text()


def test_evaluate_predict_and_compute_metrics_work(tmp_path: Path) -> None:
    def accuracy(prediction: Any) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = runs.trainer(
        tmp_path, BERT_LORA(), train_dataset=runs.class_rows(), eval_dataset=runs.class_rows(), compute_metrics=accuracy
    )
    trainer.train()
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
    assert trainer.predict(runs.class_rows()).predictions.shape == (24, 5)


def test_the_callers_arguments_stay_as_they_are(tmp_path: Path) -> None:
    args = runs.arguments(tmp_path)
    trainer = DPTrainer(
        M.with_lora(M.llama),
        args,
        privacy=PrivacyConfig(noise_multiplier=1.0, expected_batch_size=8),
        train_dataset=runs.text_rows(),
        data_collator=runs.collate,
    )
    assert (args.max_grad_norm, trainer.args.max_grad_norm) == (1.0, 0.0)


def test_tensorboard_gets_epsilon_and_no_loss(tmp_path: Path) -> None:
    import os

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "tb")
    trainer = runs.trainer(
        tmp_path / "out",
        None,
        {"noise_multiplier": 1.0, "target_delta": 1e-3, "expected_batch_size": 8},
        report_to="tensorboard",
        max_steps=3,
    )
    trainer.train()
    del os.environ["TENSORBOARD_LOGGING_DIR"]
    events = [p for p in tmp_path.rglob("events.out.tfevents*")]
    tags = {tag for e in events for tag in EventAccumulator(str(e.parent)).Reload().Tags()["scalars"]}
    assert "train/epsilon" in tags
    assert not {t for t in tags if t.endswith("loss")}


# ---- resuming --------------------------------------------------------------------------------------------------------

PRIVATE = {"target_epsilon": 8.0, "target_delta": 1e-3, "expected_batch_size": 8}


def test_resuming_continues_the_ledger_and_ends_within_the_target(tmp_path: Path) -> None:
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01}

    class StopAtThree(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **k: Any) -> None:
            control.should_training_stop = state.global_step == 3

    first = runs.trainer(tmp_path, None, PRIVATE, callbacks=[StopAtThree()], **settings)
    first.train()
    assert first.privacy_spent().num_steps == 3
    second = runs.trainer(tmp_path, None, PRIVATE, **settings)
    second.train(resume_from_checkpoint=True)  # from step 2: the third step is done, and charged, again
    spent = second.privacy_spent()
    assert second.state.global_step == 5  # the sixth would have been the seventh charge
    assert spent.num_steps == 6
    assert spent.epsilon <= 8.0


def test_another_training_in_the_same_folder_is_refused_and_the_ledger_stays(tmp_path: Path) -> None:
    first = runs.trainer(tmp_path, None, PRIVATE)
    first.train()
    before = (tmp_path / LEDGER_NAME).read_bytes()
    second = runs.trainer(tmp_path, None, PRIVATE)
    with pytest.raises(LedgerError, match="resume_from_checkpoint=True"):
        second.train()
    assert second.privacy_spent() == first.privacy_spent() != (0.0, 1e-3, 0)
    assert (tmp_path / LEDGER_NAME).read_bytes() == before


@pytest.mark.slow
def test_a_second_train_of_the_same_trainer_needs_budget(tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path, None, PRIVATE, max_steps=3)
    trainer.train()
    with pytest.raises(ConfigError, match=r"the budget is spent: epsilon .* after 3 steps"):
        trainer.train()
    free = runs.trainer(
        tmp_path / "b", None, {"noise_multiplier": 1.0, "target_delta": 1e-3, "expected_batch_size": 8}, max_steps=3
    )
    free.train()
    free.train()
    assert free.privacy_spent().num_steps == 6


@pytest.mark.slow
def test_resuming_on_other_data_or_without_the_ledger_is_refused(tmp_path: Path) -> None:
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    runs.trainer(tmp_path, None, PRIVATE, **settings).train()
    other = runs.trainer(tmp_path, None, PRIVATE, train_dataset=runs.text_rows(seed=9), **settings)
    with pytest.raises(LedgerError, match="data_fingerprint"):
        other.train(resume_from_checkpoint=True)
    (tmp_path / LEDGER_NAME).unlink()
    with pytest.raises(LedgerError, match=LEDGER_NAME):
        runs.trainer(tmp_path, None, PRIVATE, **settings).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.01}
    privacy = {**PRIVATE, "target_epsilon": None, "noise_multiplier": 1.0}

    class StopAtTwo(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **k: Any) -> None:
            control.should_training_stop = state.global_step == 2

    runs.trainer(tmp_path, None, privacy, callbacks=[StopAtTwo()], **settings).train()
    (tmp_path / "checkpoint-2" / "privacy_complete.json").unlink()
    resumed = runs.trainer(tmp_path, None, privacy, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert resumed.privacy_spent().num_steps == 2 + 3


# ---- what is refused -------------------------------------------------------------------------------------------------

REFUSED: dict[str, dict[str, Any]] = {
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 8},
    "max_grad_norm": {"max_grad_norm": 0.5},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "ignore_data_skip": {"ignore_data_skip": True},
    "include_num_input_tokens_seen": {"include_num_input_tokens_seen": True},
    "train_sampling_strategy": {"train_sampling_strategy": "group_by_length"},
    "dataloader_drop_last": {"dataloader_drop_last": True},
    "lr_scheduler_type": {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1},
    "accelerator_config.split_batches": {"accelerator_config": {"split_batches": True}},
    "accelerator_config.dispatch_batches": {"accelerator_config": {"dispatch_batches": True}},
    "optim": {"optim": "lomo"},
    "use_liger_kernel": {"use_liger_kernel": True},
    "torch_compile_mode": {"torch_compile_mode": "max-autotune"},
    "save_strategy='best'": {
        "save_strategy": "best",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "loss",
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_void_the_guarantee_are_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptionError) as refusal:
        runs.trainer(tmp_path / "out", eval_dataset=runs.text_rows(4), **REFUSED[name])
    assert name in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_all_wrong_options_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptionError) as refusal:
        runs.trainer(tmp_path / "out", gradient_accumulation_steps=2, neftune_noise_alpha=1.0, ignore_data_skip=True)
    assert all(
        name in str(refusal.value)
        for name in ("gradient_accumulation_steps", "neftune_noise_alpha", "ignore_data_skip")
    )


def test_fp16_is_refused() -> None:
    args = TrainingArguments(output_dir="unused", use_cpu=True, report_to="none")
    args.fp16 = True  # transformers itself asks for a GPU at construction
    with pytest.raises(UnsupportedOptionError, match="fp16=True: loss scaling"):
        DPTrainer(M.llama(), args, privacy=PrivacyConfig(noise_multiplier=1.0))


def test_choosing_a_checkpoint_needs_public_evaluation_data(tmp_path: Path) -> None:
    settings = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
    }
    with pytest.raises(UnsupportedOptionError, match="public_eval=True"):
        runs.trainer(tmp_path, eval_dataset=runs.text_rows(4), **settings)
    runs.trainer(tmp_path, None, {**PRIVATE, "public_eval": True}, eval_dataset=runs.text_rows(4), **settings).train()


def test_a_model_with_batch_statistics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match="batch statistics in 1"):
        runs.trainer(tmp_path, nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))


def test_merged_adapters_and_data_dependent_initialisation_are_refused(tmp_path: Path) -> None:
    merged = M.with_lora(M.llama)
    merged.merge_adapter()
    with pytest.raises(UnsupportedOptionError, match="unmerge_adapter"):
        runs.trainer(tmp_path, merged)
    other = M.with_lora(M.llama)
    other.peft_config["default"].init_lora_weights = "eva"
    with pytest.raises(UnsupportedOptionError, match="'eva'"):
        runs.trainer(tmp_path, other)


def test_compiled_models_are_refused(tmp_path: Path) -> None:
    inner = M.with_lora(M.llama)
    with pytest.raises(UnsupportedOptionError, match=r"OptimizedModule is compiled.*as it was before torch.compile"):
        runs.trainer(tmp_path, torch.compile(inner, backend="eager"))
    inner.base_model.model.model.layers[1].compile(backend="eager")
    with pytest.raises(UnsupportedOptionError, match=r"layers\.1 is compiled"):
        runs.trainer(tmp_path, inner)


def test_parameters_without_a_rule_are_named_in_the_reason_for_one_example_a_pass(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.odd = inner, nn.Parameter(torch.ones(3, M.VOCAB))
            self.config = inner.config

        def forward(self, **inputs: Any) -> Any:
            outputs = self.inner(**inputs)
            outputs.logits = outputs.logits + torch.cdist(outputs.logits, self.odd).sum(-1, keepdim=True)
            return outputs

    model = M.with_lora(M.llama)

    def logits_alone(input_ids: Tensor, attention_mask: Tensor) -> Any:
        return type(model).forward(model, input_ids=input_ids, attention_mask=attention_mask)

    model.forward = logits_alone  # it has no loss of its own to be held against
    OddForCausalLM = type("OddForCausalLM", (Odd,), {})
    trainer = runs.trainer(tmp_path, OddForCausalLM(model), remove_unused_columns=False)
    assert "odd (used by cdist)" in trainer.alone_because


def test_q_above_one_and_q_of_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="25"):
        runs.trainer(tmp_path, None, {**PRIVATE, "expected_batch_size": 25})
    trainer = runs.trainer(tmp_path, None, {**PRIVATE, "expected_batch_size": 24})
    trainer.train()
    assert trainer.mechanism.sample_rate == 1.0


def _mean(outputs: Any, labels: Tensor, **k: Any) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits, labels)


def _truncated(outputs: Any, labels: Tensor, **k: Any) -> Tensor:
    """Without the larger half of the losses of whatever it is given."""
    each = nn.functional.cross_entropy(outputs.logits, labels, reduction="none")
    return each * (each <= each.median())


def _contrastive(outputs: Any, labels: Tensor, **k: Any) -> Tensor:
    """Against the other examples of whatever it is given."""
    logits = outputs[0] - outputs[0].mean(0, keepdim=True) / 2
    return nn.functional.cross_entropy(logits, labels, reduction="none")


@pytest.mark.parametrize("function", [_mean, _truncated, _contrastive])
def test_a_users_loss_of_the_whole_batch_sees_one_example_at_a_time(
    function: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum of a step is that of the loss on each record alone, whatever it would make of a batch."""
    sums, rows = runs.record_sums(monkeypatch), runs.class_rows(7)
    model, clip_norm = BERT_LORA(), 0.05
    slow = torch.zeros(())
    for row in rows:
        inputs = runs.collate([row])
        labels = inputs.pop("labels")
        found = torch.autograd.grad(function(model(**inputs), labels).sum(), list(reference.trainable(model).values()))
        flat = torch.cat([g.flatten() for g in found]).double()
        slow = slow + flat * min(1.0, clip_norm / float(flat.norm()))
    privacy = {**runs.NOISELESS, "expected_batch_size": 7, "clip_norm": clip_norm}
    runs.trainer(tmp_path, model, privacy, train_dataset=rows, compute_loss_func=function).train()
    assert float((sums[0].double() - slow).norm() / slow.norm()) < 1e-4


def test_a_users_loss_of_several_numbers_an_example_is_an_error(tmp_path: Path) -> None:
    def two(outputs: Any, labels: Tensor, **k: Any) -> Tensor:
        return outputs.logits[:, :2].flatten()

    with pytest.raises(CaptureError, match=r"one example at a time: expected its loss, .* got shape \[2\]"):
        runs.trainer(tmp_path, BERT_LORA(), train_dataset=runs.class_rows(), compute_loss_func=two)


def test_plain_evaluation_agrees_with_plain_trainer(tmp_path: Path) -> None:
    model, rows = M.with_lora(M.llama), runs.text_rows(8, seed=3)
    ours = runs.trainer(tmp_path, model, eval_dataset=rows).evaluate()["eval_loss"]
    plain = PlainTrainer(
        model, runs.arguments(tmp_path / "b"), eval_dataset=rows, data_collator=runs.collate
    ).evaluate()["eval_loss"]
    assert np.isclose(ours, plain)
