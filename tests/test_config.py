"""PrivacyConfig refuses all that is no privacy at once, and stands beside TrainingArguments on a command line."""

import dataclasses
import math
from pathlib import Path

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_dp import AuditConfig, PrivacyConfig
from hf_dp.config import MIN_DELTA, is_number
from hf_dp.errors import ConfigError

NO_NUMBERS = [math.nan, math.inf, "8", True, [8.0]]


def test_exactly_one_of_epsilon_and_sigma_is_given() -> None:
    with pytest.raises(ConfigError, match=r"exactly one of target_epsilon and noise_multiplier \(got neither\)"):
        PrivacyConfig()
    with pytest.raises(ConfigError, match=r"got both"):
        PrivacyConfig(target_epsilon=8.0, noise_multiplier=1.0)
    assert PrivacyConfig(target_epsilon=8.0).noise_multiplier is None
    assert PrivacyConfig(noise_multiplier=0.0).noise_multiplier == 0.0


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *(("target_epsilon", x) for x in [*NO_NUMBERS, 0, -1.0]),
        *(("noise_multiplier", x) for x in [*NO_NUMBERS, -0.1]),
        *(("target_delta", x) for x in [*NO_NUMBERS, 0.0, 1.0, 2.0, MIN_DELTA / 2]),
        *(("expected_batch_size", x) for x in [*NO_NUMBERS, None, 0, -4, 2.5]),
        *(("clip_norm", x) for x in [*NO_NUMBERS, None, 0.0, -1.0]),
        *(("log_loss_up_to", x) for x in [*NO_NUMBERS, 0.0, -1.0]),
        *(("public_eval", x) for x in ["yes", 1, None]),
        *(("budget_file", x) for x in ["", 3, True, Path("all.json")]),
        *(("debug_seed", x) for x in [-1, 1.5, "1", True]),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(name: str, bad: object) -> None:
    settings = {"target_epsilon": 8.0, name: bad}
    if name == "noise_multiplier":
        del settings["target_epsilon"]
    with pytest.raises(ConfigError, match=name) as refusal:
        PrivacyConfig(**settings)
    assert "got" in str(refusal.value)


@pytest.mark.parametrize("name", ["inf", ".inf", "Infinity", math.inf])
def test_an_infinite_epsilon_is_told_how_to_train_without_privacy(name: object) -> None:
    with pytest.raises(ConfigError, match=r"without privacy use transformers\.Trainer, or noise_multiplier=0"):
        PrivacyConfig(target_epsilon=name)
    with pytest.raises(ConfigError, match=r"got '-inf'\)\.$"):
        PrivacyConfig(target_epsilon="-inf")


@pytest.mark.parametrize(
    ("kind", "given", "meant"),
    [
        (PrivacyConfig, "epsilon", "; did you mean 'target_epsilon'?"),
        (PrivacyConfig, "delta", "; did you mean 'target_delta'?"),
        (PrivacyConfig, "batch_size", "; did you mean 'expected_batch_size'?"),
        (PrivacyConfig, "noise_mulitplier", "; did you mean 'noise_multiplier'?"),
        (PrivacyConfig, "max_grad_norm", "; did you mean 'clip_norm'?"),
        (PrivacyConfig, "qqq", ""),
        (AuditConfig, "canaries", "; did you mean 'num_canaries'?"),
    ],
)
def test_a_setting_that_does_not_exist_is_told_the_nearest(kind: type, given: str, meant: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        kind(**{given: 1.0})
    assert str(refusal.value) == f"{kind.__name__}: there is no setting {given}{meant}"


def test_everything_wrong_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as refusal:
        PrivacyConfig(
            target_delta=2.0,
            expected_batch_size=0,
            clip_norm=-1,
            log_loss_up_to=0,
            public_eval="no",
            unit_column="",
            records_per_unit=0,
            contribution_bound=0,
            debug_seed=-1,
            budget_file="",
            if_unset="none",
            **{f"{name}_schedule": "none" for name in ("noise", "clip", "batch")},
        )
    for field in dataclasses.fields(PrivacyConfig):
        assert field.name in str(refusal.value)


def test_a_config_does_not_change() -> None:
    config = PrivacyConfig(target_epsilon=8.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.clip_norm = 5.0
    with pytest.raises(ConfigError):
        dataclasses.replace(config, clip_norm=math.nan)


def test_it_parses_beside_training_arguments() -> None:
    parser = HfArgumentParser((TrainingArguments, PrivacyConfig))
    argv = "--output_dir out --report_to none --target_epsilon 3 --target_delta 1e-6 --expected_batch_size 128"
    argv += " --clip_norm 0.5"
    training, privacy = parser.parse_args_into_dataclasses(argv.split())
    assert privacy == PrivacyConfig(target_epsilon=3.0, target_delta=1e-6, expected_batch_size=128, clip_norm=0.5)
    assert training.output_dir == "out"
    assert all(field.metadata["help"] for field in dataclasses.fields(PrivacyConfig))


@pytest.mark.parametrize(("x", "yes"), [(1, True), (1.5, True), (False, False), ("1e-5", False), (math.nan, False)])
def test_what_is_a_number(x: object, yes: bool) -> None:
    assert is_number(x) is yes
