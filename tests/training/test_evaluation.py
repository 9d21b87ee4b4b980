"""Exact numbers beside a private training are marked wherever they are written; nothing is decided by private ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_dp.errors import UnsupportedOptionError
from hf_dp.training.deciders import deciders
from hf_dp.training.evaluation import EVAL_MARK, mark
from tests.support import models as M
from tests.support import runs
from tests.support.marks import quick

PRIVATE = {"noise_multiplier": 1.0, "target_delta": 1e-3, "expected_batch_size": 12}
EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1}
TRAIN, TEST = runs.class_rows(), runs.class_rows(6)


def trainer(folder: Path, privacy: dict[str, Any] | None = None, **k: Any) -> Any:
    torch.manual_seed(0)
    model = M.bert(pad_token_id=0, num_hidden_layers=1)
    settings = {"train_dataset": TRAIN, "compute_metrics": accuracy, **k}
    return runs.trainer(folder, model, {**PRIVATE, **(privacy or {})}, **settings)


def accuracy(p: Any) -> dict[str, float]:
    return {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}


class Within(TrainerCallback):
    """Looks at private numbers in the middle of a training, under names of its own."""

    trainer: Any

    def on_step_end(self, args: Any, state: Any, control: Any, **k: Any) -> None:
        self.trainer.evaluate(TRAIN, metric_key_prefix="train")
        self.trainer.evaluate({"a": TRAIN, "b": TEST}, metric_key_prefix="seen")
        self.trainer.log({"my_accuracy": 0.5})
        metrics = self.trainer.predict(TRAIN, metric_key_prefix="x").metrics
        self.trainer.save_metrics("x", metrics)
        self.trainer.save_metrics("own", {"top5": 0.25})
        control.should_save = True


def test_numbers_on_private_records_are_marked_under_any_name_in_every_file(tmp_path: Path) -> None:
    looks = Within()
    looks.trainer = own = trainer(tmp_path, max_steps=2, callbacks=[looks])
    own.train()
    states = [json.loads(path.read_text()) for path in tmp_path.glob("checkpoint-*/trainer_state.json")]
    files = [json.loads(path.read_text()) for path in tmp_path.glob("*_results.json")]
    assert (len(states), len(files)) == (2, 3)
    entries = [entry for state in [*states, vars(own.state)] for entry in state["log_history"]] + files
    telling = [e for e in entries if any("accuracy" in name or "top5" in name for name in e)]
    assert {name for e in telling for name in e if "accuracy" in name} >= {
        "train_accuracy", "seen_a_accuracy", "seen_b_accuracy", "my_accuracy", "x_accuracy"
    }  # fmt: skip
    assert all(e[EVAL_MARK] == 1.0 for e in telling)
    others = [e for e in entries if e not in telling]
    assert others
    assert not any(EVAL_MARK in e for e in others)


@pytest.mark.parametrize(("public", "unmarked"), [(True, {"own", "by name", "the same"}), (False, set())])
def test_only_the_declared_data_go_without_a_mark(public: bool, unmarked: set[str], tmp_path: Path) -> None:
    sets = {"dev": TEST, "late": runs.class_rows(5)}
    own = trainer(tmp_path, {"public_eval": public}, eval_dataset=sets)
    found = {
        "own": own.evaluate(),
        "by name": own.evaluate("dev"),
        "the same": own.predict(TEST).metrics,
        "training": own.evaluate(TRAIN),
        "training, renamed": own.evaluate(TRAIN, metric_key_prefix="eval_dev"),
        "another": own.predict(runs.class_rows(4)).metrics,
        "a mixture": own.evaluate({"dev": TEST, "train": TRAIN}),
        "by hand": own.evaluation_loop(own.get_eval_dataloader("dev"), "by hand").metrics,
    }
    assert {name for name, metrics in found.items() if EVAL_MARK not in metrics} == unmarked
    logged = [e for e in own.state.log_history if any("loss" in name for name in e)]
    assert len(logged) == 7
    assert sum(EVAL_MARK not in e for e in logged) == (4 if public else 0)  # of the mixture, the part that is declared


@pytest.mark.parametrize(
    ("metrics", "public", "marked"),
    [
        ({"learning_rate": 1.0, "epsilon": 2.0, "epoch": 1.0, "grad_norm": 3.0}, False, False),
        ({"train_runtime": 1.0, "train_samples_per_second": 2.0, "train_samples": 24}, False, False),
        ({"eval_loss": 1.0}, False, True),
        ({"eval_loss": 1.0, "epoch": 1.0}, True, False),
        ({"test_loss": 1.0}, True, True),
        ({"eval_loss": 1.0, "train_f1": 1.0}, True, True),
        ({"num_correct": 7}, False, True),
    ],
)
def test_what_is_not_known_to_be_harmless_is_marked(metrics: dict[str, Any], public: bool, marked: bool) -> None:
    mark(metrics, public_eval=public)
    assert (EVAL_MARK in metrics) == marked


class Patience(EarlyStoppingCallback):
    pass


class Stops(TrainerCallback):
    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **k: Any) -> None:
        if metrics["eval_loss"] > 0:
            control.should_training_stop = True


class ReadsHistory(TrainerCallback):
    def on_epoch_end(self, args: Any, state: Any, control: Any, **k: Any) -> None:
        losses = [entry for entry in state.log_history if "eval_loss" in entry]
        control.should_training_stop = len(losses) > 1


class LooksForItself(TrainerCallback):
    trainer: Any = None

    def judged(self) -> bool:
        return all(self.trainer.evaluate()["eval_accuracy"] > bound for bound in (0.1, 0.2))

    def on_step_end(self, args: Any, state: Any, control: Any, **k: Any) -> None:
        control.should_epoch_stop = self.judged()


class NotesTheLog(TrainerCallback):
    """Notes a score where it is logged, and stops later."""

    score = 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **k: Any) -> None:
        self.score = logs.get("eval_loss", self.score)

    def on_step_end(self, args: Any, state: Any, control: Any, **k: Any) -> None:
        control.should_training_stop = self.score > 0


class Clock(TrainerCallback):
    """Stops, but not by any metric."""

    def on_step_end(self, args: Any, state: Any, control: Any, **k: Any) -> None:
        control.should_training_stop = state.global_step >= 2


class Prints(TrainerCallback):
    """Reads metrics, but decides nothing."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **k: Any) -> None:
        print(sorted(metrics))


DECIDERS = [EarlyStoppingCallback, Patience(2), Stops(), ReadsHistory, LooksForItself(), NotesTheLog()]


@pytest.mark.parametrize("callback", DECIDERS, ids=lambda given: getattr(given, "__name__", type(given).__name__))
def test_callbacks_that_decide_by_private_numbers_are_refused_wherever_they_come_in(
    callback: Any, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedOptionError, match="public_eval=True"):
        trainer(tmp_path, callbacks=[Prints(), callback])
    own = trainer(tmp_path, callbacks=[Prints(), Clock()])
    with pytest.raises(UnsupportedOptionError, match="public_eval=True"):
        own.add_callback(callback)
    own.callback_handler.add_callback(callback)
    with pytest.raises(UnsupportedOptionError, match="public_eval=True"):
        own.train()
    assert not list(tmp_path.glob("*.jsonl"))


def test_all_of_them_are_named_together_and_the_others_are_not() -> None:
    found = "\n".join(deciders([*DECIDERS, Clock, Prints()]))
    assert found.count("callback ") == len(DECIDERS)
    assert "Clock" not in found
    assert "Prints" not in found


def stop(control: Any, optimizer: Any) -> None:
    vars(control)["should_training_" + "stop"] = True


def save(control: Any, optimizer: Any) -> None:
    control.should_save = True


def slow_down(control: Any, optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] *= 0.5


class Does(TrainerCallback):
    """What no reading of its code tells."""

    def __init__(self, event: str, act: Any) -> None:
        self.act = act
        setattr(self, event, self.on_event)

    def on_event(self, args: Any, state: Any, control: Any, optimizer: Any = None, **k: Any) -> None:
        if any("eval_loss" in entry for entry in vars(state)["log_" + "history"]):
            self.act(control, optimizer)


@pytest.mark.parametrize("event", quick(("on_evaluate",), ["on_evaluate", "on_log"]))
@pytest.mark.parametrize(
    ("act", "named"), [(stop, "should_training_stop"), (save, "should_save"), (slow_down, "learning rate")]
)
def test_a_decision_in_an_evaluation_ends_the_run(event: str, act: Any, named: str, tmp_path: Path) -> None:
    own = trainer(tmp_path, max_steps=3, callbacks=[Does(event, act)], eval_dataset=TEST, **EACH_STEP)
    with pytest.raises(UnsupportedOptionError, match=f"changed .*{named}.* in an evaluation"):
        own.train()


def test_on_public_data_callbacks_may_decide(tmp_path: Path) -> None:
    own = trainer(tmp_path, {"public_eval": True}, max_steps=3, callbacks=[Stops()], eval_dataset=TEST, **EACH_STEP)
    own.train()
    assert own.state.global_step == 1


def test_the_best_private_number_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match="metric_for_best_model"):
        trainer(tmp_path, metric_for_best_model="accuracy", eval_dataset=TEST, **EACH_STEP)
