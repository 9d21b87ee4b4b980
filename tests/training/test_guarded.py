"""Callbacks that reach for gradients, weights, hooks or the end of a private training: an error, or no effect."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_dp.errors import ConfigError, HfDpError, ReleaseError, UnsupportedOptionError, UnsupportedParameterError
from hf_dp.ledger.ledger import LEDGER_NAME
from tests.support import models as M
from tests.support import runs
from tests.support.marks import quick

PRIVATE = {"noise_multiplier": 1.0, "target_delta": 1e-3, "expected_batch_size": 12}
ROWS = runs.text_rows()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def tiny() -> nn.Module:
    return M.with_lora(M.llama, target_modules=["q_proj"])


class At(TrainerCallback):
    """Calls `act(model)` at one event, from the second on."""

    def __init__(self, event: str, act: Any, first: int = 2) -> None:
        self.calls, self.act, self.first = 0, act, first
        setattr(self, event, self.on_event)

    def on_event(self, args: Any, state: Any, control: Any, model: nn.Module, **k: Any) -> None:
        self.calls += 1
        if self.calls >= self.first:
            self.act(model)


def own_loss(model: nn.Module) -> None:
    model(**runs.collate(ROWS.select(range(3)).to_list())).loss.backward()


def decay(model: nn.Module) -> None:
    for p in trainable(model):
        p.grad.add_(p.detach(), alpha=0.1)


def drop(model: nn.Module) -> None:
    trainable(model)[0].grad = None


def shrink(model: nn.Module) -> None:
    for p in trainable(model):
        p.data.mul_(0.5)


def step_beside(model: nn.Module) -> None:
    frozen = [p.requires_grad_(True) for p in model.parameters() if not p.requires_grad][:1]
    own_loss(model)
    torch.optim.SGD(frozen, lr=1.0).step()
    frozen[0].requires_grad_(False)
    model.zero_grad()


def wiped(model: nn.Module) -> None:
    next(p for p in model.parameters() if not p.requires_grad).data.zero_()


def hooked(model: nn.Module) -> None:
    trainable(model)[0].register_hook(lambda g: 2 * g)


BESIDE = [
    ("on_pre_optimizer_step", own_loss, "not those that were released"),
    ("on_step_end", step_beside, "changed otherwise"),
    ("on_step_begin", hooked, "hooks on gradients"),
]
LIKE_THESE = [
    ("on_pre_optimizer_step", decay, "not those that were released"),
    ("on_pre_optimizer_step", drop, "not those that were released"),
    ("on_pre_optimizer_step", wiped, "changed otherwise"),
    ("on_optimizer_step", shrink, "changed otherwise"),
    ("on_step_begin", wiped, "changed otherwise"),
]


@pytest.mark.parametrize(
    ("event", "act", "said"), [*BESIDE, *(pytest.param(*case, marks=pytest.mark.slow) for case in LIKE_THESE)]
)
def test_a_callback_that_trains_beside_is_an_error_at_once(event: str, act: Any, said: str, tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path, tiny(), PRIVATE, max_steps=4, callbacks=[At(event, act)])
    with pytest.raises((ReleaseError, UnsupportedParameterError), match=said):
        trainer.train()
    assert trainer.privacy_spent().num_steps in (1, 2)


@pytest.mark.parametrize("act", [shrink, wiped])
@pytest.mark.parametrize("event", ["on_step_end", "on_train_end"])
def test_weights_that_were_changed_last_are_not_saved(event: str, act: Any, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer = runs.trainer(tmp_path, tiny(), PRIVATE, callbacks=[At(event, act, first=1)], **saving)
    with pytest.raises(ReleaseError, match="changed otherwise"):
        trainer.train()
    assert bool(list(tmp_path.glob("checkpoint-*/privacy_complete.json"))) == (event == "on_train_end")


def test_callbacks_that_only_look_train_as_before(tmp_path: Path) -> None:
    looks = [At(e, lambda m: sum(float(p.sum()) for p in m.parameters())) for e in ("on_step_end", "on_optimizer_step")]
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = runs.trainer(
        tmp_path,
        tiny(),
        PRIVATE,
        max_steps=3,
        callbacks=looks,
        eval_dataset=ROWS,
        lr_scheduler_type="cosine",
        **settings,
    )
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.privacy_spent().num_steps == 4
    trainable(trainer.model)[0].data.zero_()  # after training they are the user's
    trainer.save_model()


def test_the_best_model_may_be_loaded_at_the_end(tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = runs.trainer(
        tmp_path,
        tiny(),
        {**PRIVATE, "public_eval": True},
        max_steps=3,
        eval_dataset=runs.text_rows(5),
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        callbacks=[EarlyStoppingCallback(1)],
        **settings,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None  # which one it is depends on the noise


@pytest.mark.parametrize("more", [[nn.Linear(2, 2)], [nn.Embedding(3, 2), nn.LayerNorm(2)], [nn.Bilinear(1, 1, 1)]])
def test_an_optimizer_with_parameters_of_its_own_is_refused_at_construction(
    more: list[nn.Module], tmp_path: Path
) -> None:
    model = tiny()
    optimizer = torch.optim.AdamW([*trainable(model), *(p for m in more for p in m.parameters())])
    with pytest.raises(ConfigError, match="parameters that are not the model's"):
        runs.trainer(tmp_path, model, PRIVATE, optimizers=(optimizer, None))


def test_an_optimizer_made_by_a_subclass_is_refused_before_anything_is_charged(tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path, tiny(), PRIVATE)
    trainer.create_optimizer = lambda *a: torch.optim.SGD([*trainable(trainer.model), nn.Parameter(torch.ones(2))])
    with pytest.raises(ConfigError, match="parameters that are not the model's"):
        trainer.train()
    assert not (tmp_path / LEDGER_NAME).exists()


class GoOn(TrainerCallback):
    """Takes back that training stops, at one event."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self.on_event)

    def on_event(self, args: Any, state: Any, control: Any, **k: Any) -> Any:
        control.should_training_stop = False
        return control


@pytest.mark.parametrize("event", quick(("on_step_end",), ["on_step_end", "on_log", "on_epoch_end"]))
def test_no_callback_takes_training_beyond_the_target(event: str, tmp_path: Path) -> None:
    target = {"target_epsilon": 2.0, "target_delta": 1e-3, "expected_batch_size": 6}
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    trainer = runs.trainer(tmp_path, tiny(), target, callbacks=[GoOn(event)], **saving)
    trainer.args.max_steps = 9
    trainer.train()
    assert trainer.privacy_spent().epsilon <= 2.0
    assert trainer.privacy_spent().num_steps == 3


@pytest.mark.parametrize("way", ["release", "told_to_all"])
def test_a_step_beyond_the_last_is_refused_and_not_charged(way: str, tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path, tiny(), PRIVATE, max_steps=2)
    outcome: list[str] = []

    def beyond(model: nn.Module) -> None:
        run, flat = trainer._run, trainer.private_step.sum.flat
        assert run is not None
        assert run.exhausted
        try:
            if way == "release":
                run.release(flat, 2)
            else:
                with run.told_to_all(flat, 2):
                    outcome.append("within")
        except HfDpError as error:
            outcome.append(str(error))

    trainer.add_callback(At("on_step_end", beyond))
    trainer.train()
    assert len(outcome) == 1
    assert outcome[0].startswith("all 2 steps of this training are taken")
    assert trainer.privacy_spent().num_steps == 2


def test_what_a_step_hook_writes_to_the_weights_is_found(tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path, tiny(), PRIVATE, max_steps=2)
    trainer.create_optimizer()
    trainer.optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.param_groups[0]["params"][0].data.add_(1))
    with pytest.raises(ReleaseError, match="changed otherwise than by the optimizer's step"):
        trainer.train()


def test_a_schedule_that_follows_private_numbers_is_refused(tmp_path: Path) -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UnsupportedOptionError, match="ReduceLROnPlateau it follows private numbers"):
        runs.trainer(tmp_path, model, PRIVATE, optimizers=(optimizer, ReduceLROnPlateau(optimizer)))
