"""Trackers know the privacy settings of a run and what it logs; a run whose signal drowns says so once."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_dp.training.trackers import TELL, drowned, settings
from tests.step.test_signal import STEPS, mechanism
from tests.support import runs


def test_tensorboard_has_settings_epsilon_and_signal(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    privacy = {"noise_multiplier": 1.0, "expected_batch_size": 6}
    trainer = runs.trainer(tmp_path, privacy=privacy, max_steps=12, report_to=["tensorboard"])
    trainer.train()
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert {"train/epsilon", "train/learning_rate", "train/signal_to_noise"} <= {*events.Tags()["scalars"]}
    assert "train/loss" not in events.Tags()["scalars"]
    (text,) = events.Tensors("privacy/text_summary")
    assert f'"noise_multiplier": {trainer.mechanism.noise_multiplier}'.encode() in text.tensor_proto.string_val[0]
    assert len(events.Scalars("train/signal_to_noise")) == 12


@pytest.mark.parametrize("name", sorted({*TELL} - {"TensorBoardCallback"}))
def test_other_trackers_are_told_by_their_own_names(name, monkeypatch):
    told: dict[str, object] = {}
    module = ModuleType(name)
    module.config = SimpleNamespace(update=lambda given, allow_val_change: told.update(given["privacy"]))
    module.log_params = lambda given: told.update({k.removeprefix("privacy."): v for k, v in given.items()})
    for library in ("wandb", "trackio", "mlflow"):
        monkeypatch.setitem(sys.modules, library, module)
    TELL[name](None, settings(mechanism()))
    assert told["noise_multiplier"] == 0.8
    assert told["num_examples"] == 1000


def test_a_warning_comes_where_all_steps_together_drown_and_not_before():
    m = mechanism()
    assert "The signal drowns: in 20 steps" in drowned(m, 20, 0.05)
    assert "clip_norm" in drowned(m, 20, 0.05)
    assert drowned(m, 5, 0.05) == ""  # too early to tell
    assert drowned(m, STEPS, 0.2) == ""  # 0.2 x sqrt(40) is above a half
    assert drowned(mechanism(debug=True), 20, 0.05) == ""  # nothing is claimed
