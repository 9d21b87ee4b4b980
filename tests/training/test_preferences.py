"""Preferences with trl: the pair is clipped as one, its loss is trl's, and what compares pairs is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import hf_dp
from hf_dp import ConfigError, DPTrainerMixin, PrivacyConfig, UnsupportedOptionError
from hf_dp.card import verify
from hf_dp.errors import CaptureError
from hf_dp.per_example import Batch, MicroBatch
from hf_dp.per_example.clipping import ROUNDING_MARGIN
from hf_dp.per_example.preferences import PAIR_LOSSES
from hf_dp.training import objective
from tests.support import models as M
from tests.support import on_trl, reference, runs
from tests.support.on_trl import adapters, base, pairs

trl = pytest.importorskip("trl", reason="trl is not installed")

PAIRS, CLIP, BETA = 5, 0.1, 1.0  # at this beta, all pairs are clipped


def private(**k: Any) -> PrivacyConfig:
    return PrivacyConfig(**{**runs.NOISELESS, **k}, expected_batch_size=PAIRS, clip_norm=CLIP)


def dpo(folder: Path, model: nn.Module, privacy: PrivacyConfig | None = None, **k: Any) -> Any:
    return on_trl.dpo(folder, model, pairs(PAIRS), privacy or private(), **{"beta": BETA, **k})


def batches(trainer: Any) -> list[MicroBatch]:
    """All pairs in micro-batches of 3 and 2."""
    records = list(trainer._columns_for_model()[0])
    return [batch for some in (records[:3], records[3:]) for batch in trainer._collation()(some)]


def of_one_pair_at_a_time(trainer: Any, loss: Callable[[Batch], Tensor]) -> Tensor:
    """The clipped sum, each pair collated by trl and brought to its loss by itself."""
    total = None
    for record in trainer._columns_for_model()[0]:
        batch = trainer.data_collator([record])
        parameters = reference.trainable(trainer.model)
        found = torch.autograd.grad(loss(batch), list(parameters.values()), allow_unused=True)
        flat = torch.cat(
            [
                (p.new_zeros(p.shape) if g is None else g).flatten()
                for g, p in zip(found, parameters.values(), strict=True)
            ]
        )
        clipped = flat.double() * min(1.0, CLIP * (1 - ROUNDING_MARGIN) / float(flat.double().norm()))
        total = clipped if total is None else total + clipped
    assert total is not None
    return total


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    trainer = dpo(tmp_path_factory.mktemp("dpo"), base().double(), peft_config=adapters(), label_smoothing=0.1)
    M.stirred(trainer.model)
    return trainer


def test_the_pairs_share_passes_and_the_plan_says_whose_loss_it_is(adapted: Any) -> None:
    assert adapted.alone_because == ""
    assert adapted.objective.kind == objective.SPELT_OUT
    assert adapted.mechanism.num_examples == PAIRS
    (three, two) = batches(adapted)
    assert (three.size, two.size) == (3, 2)
    assert three["input_ids"].shape[:2] == (3, 2)


def log_probability(model: nn.Module, batch: Batch, row: int) -> Tensor:
    """Of the answer in a row, by PyTorch's own operations."""
    ids, answer = batch["input_ids"][row : row + 1], batch["completion_mask"][row, 1:].bool()
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"][row : row + 1]).logits[0, :-1]
    return F.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[answer].sum()


def dpo_loss(model: nn.Module, batch: Batch) -> Tensor:
    ratios = []
    for row in (0, 1):
        with torch.no_grad(), model.disable_adapter():
            reference_of = log_probability(model, batch, row)
        ratios.append(log_probability(model, batch, row) - reference_of)
    return -F.logsigmoid(BETA * (ratios[0] - ratios[1]))


def test_the_sum_is_that_of_one_pair_at_a_time_in_float64(adapted: Any) -> None:
    expected = of_one_pair_at_a_time(adapted, lambda batch: dpo_loss(adapted.model, batch))
    assert apart(runs.clipped_sum(adapted, batches(adapted)), expected) < 1e-6  # the sum is in float32


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_each_loss_is_trls_own(adapted: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapted, "loss_types", [name])
    expected = of_one_pair_at_a_time(adapted, lambda b: trl.DPOTrainer.compute_loss(adapted, adapted.model, b))
    assert apart(runs.clipped_sum(adapted, batches(adapted)), expected) < 3e-5  # trl's is in float32


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_each_divergence_is_trls_own(
    tmp_path: Path, adapted: Any, divergence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And several losses with weights."""
    monkeypatch.setattr(adapted, "f_divergence_type", divergence)
    monkeypatch.setattr(adapted, "f_alpha_divergence_coef", 0.5)
    monkeypatch.setattr(adapted, "loss_types", ["sigmoid", "ipo"])
    monkeypatch.setattr(adapted, "loss_weights", [0.7, 0.2])
    with torch.no_grad():
        batch = adapted.data_collator(list(adapted._columns_for_model()[0])[:1])
        one = adapted._collation()(list(adapted._columns_for_model()[0])[:1])[0]
        theirs = trl.DPOTrainer.compute_loss(adapted, adapted.model.float(), batch)
        ours = adapted.example_losses(adapted.model, one)
    adapted.model.double()
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_removing_a_pair_moves_the_sum_by_at_most_the_bound(adapted: Any) -> None:
    whole = runs.clipped_sum(adapted, batches(adapted))
    records = list(adapted._columns_for_model()[0])
    for number in range(PAIRS):
        rest = adapted._collation()(records[:number] + records[number + 1 :])
        move = float((whole - runs.clipped_sum(adapted, rest)).norm())
        assert 0.9 * CLIP < move <= CLIP * (1 + 1e-6)


def test_discrete_sums_take_a_pair_a_pass(tmp_path: Path, adapted: Any) -> None:
    pytest.importorskip("cryptography")
    privacy = private(noise="discrete", noise_multiplier=1.0, debug_seed=None)
    trainer = dpo(tmp_path, base().double(), peft_config=adapters(), privacy=privacy)
    assert trainer.alone_because == "noise='discrete'"
    trainer.model.load_state_dict(adapted.model.state_dict())
    alone = [one for record in trainer._columns_for_model()[0] for one in trainer._collation()([record])]
    grid = runs.clipped_sum(trainer, alone).double()
    expected = of_one_pair_at_a_time(adapted, lambda batch: dpo_loss(adapted.model, batch))
    assert apart(grid / grid.norm() * expected.norm(), expected) < 0.05  # whole numbers


@pytest.mark.parametrize("given", ["ref_model", "precomputed", "adapter", "all"])
def test_whichever_way_the_reference_is_given_the_sum_is_trls(tmp_path: Path, given: str) -> None:
    """A model of its own, log-probabilities computed beforehand, trl's frozen copy of an adapter that was trained."""
    model, more = base(), {}
    if given == "ref_model":
        more = {"ref_model": M.stirred(base())}
    elif given == "precomputed":
        more = {"peft_config": adapters(), "precompute_ref_log_probs": True}
    elif given == "adapter":
        model = M.stirred(get_peft_model(model, adapters()))
    else:
        more = {"precompute_ref_log_probs": True}
    trainer = dpo(tmp_path, model, **more)
    assert trainer.alone_because == ""
    assert all(".ref." not in name for name in reference.trainable(trainer.model))
    M.stirred(trainer.model)
    expected = of_one_pair_at_a_time(trainer, lambda b: trl.DPOTrainer.compute_loss(trainer, trainer.model, b))
    assert apart(runs.clipped_sum(trainer, batches(trainer)), expected) < 3e-5


def test_what_is_not_spelt_out_is_trls_own_with_one_pair_a_pass(tmp_path: Path) -> None:
    trainer = dpo(tmp_path, base(), peft_config=adapters(), ld_alpha=0.5)
    M.stirred(trainer.model)
    assert "not spelt out" in trainer.objective.rule
    assert trainer.alone_because
    alone = [one for record in trainer._columns_for_model()[0] for one in trainer._collation()([record])]
    expected = of_one_pair_at_a_time(trainer, lambda b: trl.DPOTrainer.compute_loss(trainer, trainer.model, b))
    assert apart(runs.clipped_sum(trainer, alone), expected) < 3e-5


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "sft"])
def test_losses_of_a_batch_are_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=f"loss_type='{name}'"):
        dpo(tmp_path, base(), peft_config=adapters(), loss_type=["sigmoid", name])


def test_a_training_logs_and_leaves_nothing_that_was_not_released(tmp_path: Path) -> None:
    """trl notes rewards, margins and log-probabilities of each batch that it meets, and logs their means."""
    noisy = private(noise_multiplier=1.0, debug_seed=None)
    trainer = dpo(tmp_path, base(), peft_config=adapters(), privacy=noisy, max_steps=2, logging_steps=1)
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert not {name for name in logged if "reward" in name or "logp" in name or "loss" in name or "token" in name}
    assert "epsilon" in logged
    assert trainer.privacy_spent().num_steps == 2
    trainer.save_model()
    assert "| unit of privacy | one pair of answers |" in (tmp_path / "README.md").read_text()
    assert "One person, one pair: whoever is in several pairs" in (tmp_path / "privacy.json").read_text()
    assert all(check.holds for check in verify(tmp_path))


@pytest.mark.parametrize("margin", [False, True])
def test_rewards_are_those_of_one_pair_at_a_time(tmp_path: Path, margin: bool) -> None:
    data = pairs(PAIRS)
    data = data.add_column("margin", [0.1 * i for i in range(PAIRS)]) if margin else data
    trainer = on_trl.reward(tmp_path, data, private(), center_rewards_coefficient=0.01)
    M.stirred(trainer.model)
    assert (trainer.alone_because, trainer.objective.kind) == ("", objective.SPELT_OUT)

    def loss(batch: Batch) -> Tensor:
        names = ("input_ids", "attention_mask")
        scores = [trainer.model(**{n: batch[n][row : row + 1] for n in names}).logits[0, 0] for row in (0, 1)]
        lead = scores[0] - scores[1] - (batch["margin"][0] if margin else 0.0)
        return -F.logsigmoid(lead) + 0.01 * (scores[0] + scores[1]).square()

    assert apart(runs.clipped_sum(trainer, batches(trainer)), of_one_pair_at_a_time(trainer, loss)) < 1e-6


def test_the_rows_that_trl_makes_are_two_a_pair_or_refused(adapted: Any) -> None:
    def three_rows(records: list[Any]) -> dict[str, Tensor]:
        return {"input_ids": torch.ones(3 * len(records), 4, dtype=torch.long)}

    collate = hf_dp.sampling.OfUnits(three_rows, 2)
    with pytest.raises(CaptureError, match="2 rows of each record"):
        collate([{}])


def test_a_pair_longer_than_the_models_positions_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """Its prompt and one of its answers: the remedy of the message trains."""
    data = pairs(PAIRS).add_item({"prompt": "w3 " * 40, "chosen": " w4" * 40, "rejected": " w5"})
    lora = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    k = {"peft_config": lora, "max_steps": 1}
    with pytest.raises(ConfigError, match=r"chosen_ids longer than the model's positions.*max_length=64"):
        on_trl.dpo(tmp_path / "refused", M.gpt2(n_layer=1), data, private(), **k).train()
    trained = on_trl.dpo(tmp_path / "cut", M.gpt2(n_layer=1), data, private(), max_length=64, **k)
    trained.train()
    assert trained.privacy_spent().num_steps == 1


@pytest.mark.parametrize(
    ("host", "instead"),
    [("DPOTrainer", "DPDPOTrainer"), ("RewardTrainer", "DPRewardTrainer"), ("KTOTrainer", "DPDPOTrainer")],
)
def test_the_mixin_on_a_trainer_of_pairs_names_the_one_that_is_private(tmp_path: Path, host: str, instead: str) -> None:
    mine, privacy = type("Mine", (DPTrainerMixin, getattr(trl, host)), {}), PrivacyConfig(noise_multiplier=1.0)
    with pytest.raises(UnsupportedOptionError, match=f"trl's {host}: .* hf_dp.{instead}"):
        mine(base(), args=runs.arguments(tmp_path), privacy=privacy)


def test_adapters_that_trl_puts_on_are_looked_at(tmp_path: Path) -> None:
    config = adapters()
    config.init_lora_weights = "eva"
    with pytest.raises(UnsupportedOptionError, match="init_lora_weights='eva': it reads the private data"):
        dpo(tmp_path, base(), peft_config=config)


def test_a_trainer_that_drops_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="training records out of the"):
        dpo(tmp_path, base(), peft_config=adapters(), max_length=4)
