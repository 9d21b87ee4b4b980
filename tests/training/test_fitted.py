"""Where the learning rate was left alone, one comes from the rule, is said, and lasts; a given one is never touched."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import nn
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments
from trl import DPOConfig, SFTConfig

from hf_dp import DPTrainer, PrivacyConfig
from hf_dp.config import BY_RULE
from hf_dp.recipe import read, task
from hf_dp.training.fitted import learning_rate, left_alone, with_clip_norm
from hf_dp.training.progress import print_plan_of
from tests.support import models as M
from tests.support import recipes as R
from tests.support import runs

PRIVATE = {"noise_multiplier": 1.0, "target_delta": 1e-3, "expected_batch_size": 8}
SETTINGS = {"optim": "adamw_torch", "learning_rate": TrainingArguments.learning_rate, "lr_scheduler_type": "linear"}
OF_LORA = partial(learning_rate, 2.0)  # M.with_lora: r = 4, lora_alpha = 8


@dataclass
class Mine(TrainingArguments):
    """With a default of its user's own."""

    learning_rate: float = 3e-4


def test_left_alone_is_what_has_the_default_of_its_own_library(tmp_path: Path) -> None:
    folder = {"output_dir": str(tmp_path), "use_cpu": True}
    for arguments in (TrainingArguments(**folder), SFTConfig(**folder, bf16=False), DPOConfig(**folder, bf16=False)):
        assert left_alone(arguments, "learning_rate")
    assert not left_alone(TrainingArguments(**folder, learning_rate=2e-5), "learning_rate")  # SFTConfig's default
    assert not left_alone(SFTConfig(**folder, bf16=False, learning_rate=5e-5), "learning_rate")
    assert not left_alone(Mine(**folder), "learning_rate")


def test_the_rule_gives_what_was_left_alone_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = runs.arguments(tmp_path, **SETTINGS)
    before = arguments.to_dict()
    config = PrivacyConfig(**PRIVATE)
    trainer = DPTrainer(M.with_lora(M.llama), arguments, runs.collate, runs.text_rows(), privacy=config)
    assert arguments.to_dict() == before  # the user's own stay as they were
    assert trainer.args.learning_rate == OF_LORA(1)
    print_plan_of(trainer, "The plan")
    said = " ".join(capsys.readouterr().out.split())
    assert f"{OF_LORA(1):g}" in said
    assert "hf_dp's rule for LoRA" in said
    assert (config.clip_norm, trainer.mechanism.clip_norm) == (1.0, BY_RULE)
    assert "hf_dp's rule for Adam" in said


OWN = {
    "a rate": {"learning_rate": 1e-4},
    "another optimizer": {"optim": "sgd"},
    "the word": {"if_unset": "trainer"},
}


@pytest.mark.parametrize("case", OWN)
def test_what_the_user_gave_is_never_touched(case: str, tmp_path: Path) -> None:
    given = dict(OWN[case])
    config = PrivacyConfig(**PRIVATE, if_unset=given.pop("if_unset", "fitted"))
    arguments = runs.arguments(tmp_path, **{**SETTINGS, **given})
    trainer = DPTrainer(M.with_lora(M.llama), arguments, runs.collate, runs.text_rows(), privacy=config)
    assert trainer.args.learning_rate == given.get("learning_rate", TrainingArguments.learning_rate)
    assert trainer.rate_by_rule == ""
    assert trainer.mechanism.clip_norm == (BY_RULE if case == "a rate" else 1.0)


@pytest.mark.parametrize(("given", "said"), [({}, "TrainingArguments' default"), ({"learning_rate": 1e-4}, "given")])
def test_the_plan_says_whose_the_learning_rate_is(
    given: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of full fine-tuning, for which there is no rule."""
    arguments = runs.arguments(tmp_path, max_steps=1, log_level="info", **given)
    arguments.learning_rate = given.get("learning_rate", TrainingArguments.learning_rate)
    DPTrainer(M.llama(), arguments, runs.collate, runs.text_rows(), privacy=PrivacyConfig(**PRIVATE)).train()
    line = next(line for line in capsys.readouterr().out.splitlines() if "learning rate" in line)
    assert said in line


def test_a_given_clip_norm_of_1_is_told_from_none(tmp_path: Path) -> None:
    parser = HfArgumentParser((TrainingArguments, PrivacyConfig))
    given = f"--output_dir {tmp_path} --use_cpu --target_epsilon 3".split()
    others = {"trainer": DPTrainer}
    for words, clip_norm in (([], BY_RULE), (["--clip_norm", "1.0"], 1.0)):
        arguments, privacy = parser.parse_args_into_dataclasses([*given, *words])
        assert with_clip_norm(privacy, arguments, others).clip_norm == clip_norm
        assert with_clip_norm(replace(privacy, debug_seed=1), arguments, others).clip_norm == clip_norm
        own = others | {"optimizers": (torch.optim.SGD([torch.ones(1)], lr=1.0), None)}
        assert with_clip_norm(privacy, arguments, own).clip_norm == 1.0


def test_an_optimizer_of_the_users_keeps_its_rate(tmp_path: Path) -> None:
    model = M.with_lora(M.llama)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    trainer = runs.trainer(tmp_path, model, PRIVATE, optimizers=(optimizer, None), **SETTINGS)
    trainer.train()
    assert trainer.rate_by_rule == ""
    assert trainer.state.log_history[0]["learning_rate"] == 1e-4


class Rates(TrainerCallback):
    """The rate of each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **k: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


@pytest.mark.slow
def test_resuming_keeps_the_rates_and_the_card_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, rate = {**SETTINGS, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}, OF_LORA(4)

    class StopAtTwo(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **k: Any) -> None:
            control.should_training_stop = state.global_step == 2

    first, second = Rates(), Rates()
    runs.trainer(tmp_path, None, PRIVATE, callbacks=[first, StopAtTwo()], **settings).train()
    monkeypatch.setattr("hf_dp.training.fitted.RATE", 1.0)  # as another version of the rule would
    resumed = runs.trainer(tmp_path, None, PRIVATE, callbacks=[second], **settings)
    resumed.train(resume_from_checkpoint=True)
    assert [*first.seen, *second.seen] == pytest.approx([rate * left for left in (1, 0.75, 0.5, 0.25)])
    text = (tmp_path / "checkpoint-4" / "README.md").read_text()
    assert f"| learning rate | {rate:g}, linear |" in text


def test_the_rule_is_the_one_on_the_page() -> None:
    assert [learning_rate(s, t) for s, t in ((2, 40), (0.5, 160), (8, 640))] == [0.01, 0.01, 0.0013]


def test_a_new_head_beside_lora_has_its_rate(tmp_path: Path) -> None:
    model = M.with_lora(partial(M.bert, pad_token_id=0), task_type="SEQ_CLS")
    trainer = runs.trainer(tmp_path, model, PRIVATE, train_dataset=runs.class_rows(), **SETTINGS)
    assert trainer.args.learning_rate == OF_LORA(1)


def frozen_but_for_the_head() -> nn.Module:
    model = M.llama()
    for name, p in model.named_parameters():
        p.requires_grad_("lm_head" in name)
    return model


@pytest.mark.parametrize(
    "build", [M.llama, frozen_but_for_the_head, lambda: get_peft_model(M.llama(), IA3Config(task_type="CAUSAL_LM"))]
)
def test_what_the_rule_was_not_fitted_to_keeps_trainers_rate(build: Any, tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path, build(), PRIVATE, **SETTINGS)
    assert trainer.args.learning_rate == TrainingArguments.learning_rate


@pytest.mark.parametrize(("given", "rate"), [((), OF_LORA(2)), (("training.learning_rate=5e-5",), 5e-5)])
def test_a_recipe_without_a_rate_has_the_rules_and_a_given_one_stays(given: Any, rate: float, tmp_path: Path) -> None:
    recipe = read(R.write(tmp_path, lora__lora_alpha=4), given)
    trainer = task.build(recipe)
    assert (trainer.args.learning_rate, trainer.mechanism.clip_norm) == (rate, BY_RULE)
