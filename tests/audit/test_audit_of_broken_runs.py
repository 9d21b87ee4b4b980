"""Audits of runs that are broken on purpose: which bugs canaries see, at claim 1, and which they cannot.

Seen here: noise too small (gradient canaries), noise from a known seed (gradient canaries, by an attacker who subtracts
it), a clipped batch and no clipping (new-token canaries). Not seen by 300 canaries: losses coupled over a batch's
tokens, which the neighbour replay finds, and shuffling in place of Poisson sampling, which the sampler's own tests find
(`test_mutants.py` for both).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_dp import DPTrainer
from hf_dp.audit.report import POWER
from hf_dp.mechanism import Mechanism
from hf_dp.randomness.noise import NoiseSource
from hf_dp.training.canaries import Canaries
from tests.audit.test_canaries import audited, small_claim
from tests.support import broken, runs
from tests.support import models as M

NEW = 300  # token ids behind those of the tokenizer, frozen and told apart by their random embeddings


class Known:
    """Stands in for a tokenizer: as many tokens as it gives."""

    def __len__(self) -> int:
        return M.VOCAB

    def save_pretrained(self, *args: Any, **k: Any) -> None:
        """Nothing to save."""


def new_tokens(folder: Path, seed: int, *, claim: bool = True) -> dict[str, Any]:
    """U3: 20 records, 300 new-token canaries, claim 1, 100 steps, gradients far above C; or the positive control."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": M.VOCAB + NEW}
    model = M.with_lora(partial(M.llama, **sizes), r=16)
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight *= 50
    privacy = {"noise_multiplier": None, "target_epsilon": 1.0, "expected_batch_size": 96, "clip_norm": 1e-3}
    privacy |= {} if claim else {"noise_multiplier": 0.0, "target_epsilon": None}
    trainer = audited(
        folder,
        model,
        privacy=privacy,
        audit={"kind": "new-token", "num_canaries": NEW, "control": not claim},
        rows=runs.text_rows(20),
        processing_class=Known(),
        max_steps=100,
        learning_rate=0.01,
        optim="adamw_torch",
        per_device_train_batch_size=512,  # one micro-batch a step: what is clipped is the whole batch
    )
    trainer.train()
    return trainer.audit_result()


@pytest.mark.slow
def test_noise_from_a_known_seed_is_taken_off_and_the_claim_refuted(tmp_path: Path) -> None:
    attacker, original = NoiseSource(key=42), Canaries.observe

    def observe(self: Canaries, noisy_sum: torch.Tensor, mechanism: Mechanism) -> None:
        noise = attacker.gaussian(len(noisy_sum) + 3, std=mechanism.noise_std)  # the release carries three numbers more
        original(self, noisy_sum - noise[: len(noisy_sum)], mechanism)

    refuted = []
    for plant in (broken.noise_from_seed_42, lambda patch: None):
        with pytest.MonkeyPatch.context() as patch:
            plant(patch)
            patch.setattr(Canaries, "observe", observe)
            trainer = small_claim(tmp_path / str(len(refuted)))
            trainer.train()
        refuted.append(trainer.audit_result()["refuted"])
    assert refuted == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize(
    "bug", [broken.noise_divided_by_the_batch, broken.noise_divided_by_the_processes], ids=lambda f: f.__name__
)
def test_gradient_canaries_see_noise_that_is_too_small(bug: Callable[[Any], None], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        bug(patch)
        trainer = small_claim(tmp_path)
        trainer.train()
    assert trainer.audit_result()["refuted"]


@pytest.mark.slow
@pytest.mark.parametrize("bug", [broken.clipped_after_averaging, broken.no_clipping], ids=lambda f: f.__name__)
def test_new_token_canaries_see_that_examples_are_not_clipped(bug: Callable[[Any], None], tmp_path: Path) -> None:
    """U2 and U3: at least 4 of 5, in an audit with power."""
    assert new_tokens(tmp_path / "control", 0, claim=False)["area_under_curve"] > POWER
    refuted = []
    for seed in range(5):
        with pytest.MonkeyPatch.context() as patch:
            bug(patch)
            patch.setattr(DPTrainer, "self_check", lambda self: None)  # it refuses to begin where nothing is clipped
            refuted.append(new_tokens(tmp_path / str(seed), seed)["refuted"])
    assert sum(refuted) >= 4


@pytest.mark.slow
def test_new_token_canaries_do_not_refute_correct_runs(tmp_path: Path) -> None:
    assert sum(new_tokens(tmp_path / str(seed), seed)["refuted"] for seed in range(5)) <= 1
