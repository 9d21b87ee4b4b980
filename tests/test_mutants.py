"""Bugs planted on purpose, each of a kind that was found in the wild: a named check of this suite has to fail for every one.

A mutant is a patch of a line or two. The checks are the suite's own test functions, called as they are; that they pass without a
mutant is what the rest of the suite shows, and the last test here once more.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_accounting
import test_faults
import test_release
import test_sampling
import test_trainer
import torch

from hf_dp import epsilon, losses, microbatch, run, trainer
from hf_dp.errors import HfDpError
from hf_dp.ledger import LEDGER_NAME, Ledger
from hf_dp.noise import NoiseSource
from hf_dp.per_example import capture
from hf_dp.release import Releaser
from hf_dp.sampling import Draw, PoissonSampler

Patch = pytest.MonkeyPatch
FAILS = (AssertionError, HfDpError, pytest.fail.Exception)


# ---- the bugs ------------------------------------------------------------------------------------------------------------


def no_clipping(patch: Patch) -> None:
    patch.setattr(capture, "clip_factors", lambda norms, clip_norm: torch.ones_like(norms))


def clipped_after_averaging(patch: Patch) -> None:
    """The whole micro-batch's gradient is clipped to B C, as `max_grad_norm` would."""
    original = trainer.clipped_gradient_sum

    def clipped(model: Any, example_losses: Any, batch_size: int, clip_norm: float, into: Any) -> None:
        own = {name: torch.zeros_like(total) for name, total in into.items()}
        original(model, example_losses, batch_size, 1e9, own)
        norm = float(torch.stack([g.norm() for g in own.values()]).norm())
        for name, g in own.items():
            into[name] += g * min(1.0, batch_size * clip_norm / max(norm, 1e-30))

    patch.setattr(trainer, "clipped_gradient_sum", clipped)


def clipped_by_parameter(patch: Patch) -> None:
    """Each parameter's gradient is held to C by itself, so that an example moves the sum by more than C."""
    original = capture.squared_norms
    patch.setattr(capture, "squared_norms", lambda factors, b, like: original(dict(list(factors.items())[:1]), b, like))


def noise_divided_by_the_batch(patch: Patch) -> None:
    original = NoiseSource.gaussian
    patch.setattr(NoiseSource, "gaussian", lambda self, n, *, std, device=None: original(self, n, std=std / 8))


def noise_on_one_parameter(patch: Patch) -> None:
    original = NoiseSource.gaussian

    def half(self: NoiseSource, n: int, *, std: float, device: Any = None) -> torch.Tensor:
        noise = original(self, n, std=std, device=device)
        noise[n // 2 :] = 0
        return noise

    patch.setattr(NoiseSource, "gaussian", half)


def noise_for_every_micro_batch(patch: Patch) -> None:
    original = trainer.DPTrainerMixin._add_clipped_gradients

    def noisy(self: Any, batch: Any) -> None:
        original(self, batch)
        self._flat += NoiseSource().gaussian(len(self._flat), std=self.mechanism.noise_std)

    patch.setattr(trainer.DPTrainerMixin, "_add_clipped_gradients", noisy)


def noise_from_the_trainers_seed(patch: Patch) -> None:
    patch.setattr(run, "NoiseSource", lambda key=None: NoiseSource(key=torch.initial_seed()))


def noise_of_the_session_before(patch: Patch) -> None:
    """A key that is kept with the checkpoint, and a count that begins again."""
    patch.setattr(run, "NoiseSource", lambda key=None: NoiseSource(key=20_240_501))


def noise_on_every_process(patch: Patch) -> None:
    original = Releaser._fill

    def fill(self: Releaser, buffer: torch.Tensor, clipped_sum: torch.Tensor, c: float, sigma: float) -> None:
        original(self, buffer, clipped_sum, c, sigma)
        if self._process_index > 0:
            buffer += NoiseSource().gaussian(len(buffer), std=c * sigma)

    patch.setattr(Releaser, "_fill", fill)


def shuffled_epochs(patch: Patch) -> None:
    def draw(self: PoissonSampler, number: int) -> np.ndarray:
        per_epoch = round(1 / self.sample_rate)
        order = np.random.default_rng(number // per_epoch).permutation(self.num_examples)
        return np.sort(np.array_split(order, per_epoch)[number % per_epoch])

    patch.setattr(PoissonSampler, "draw", draw)


def batches_evened_out(patch: Patch) -> None:
    """Slices padded to one length with the draw's first records, as accelerate's even_batches does."""

    def evened(self: PoissonSampler) -> Any:
        for _ in range(self.num_batches):
            number, self._next = self._next, self._next + 1
            drawn = self.draw(number).tolist()
            missing = -len(drawn) % self.num_processes
            yield Draw((drawn + drawn[:missing])[self.process_index :: self.num_processes], number)

    patch.setattr(PoissonSampler, "__iter__", evened)


def last_micro_batch_dropped(patch: Patch) -> None:
    original = microbatch.split

    def split(lengths: Any, max_examples: int, max_tokens: int | None) -> list[list[int]]:
        return [g for g in original(lengths, max_examples, max_tokens) if len(g) == max_examples]

    patch.setattr(microbatch, "split", split)


def divided_by_the_tokens_of_the_batch(patch: Patch) -> None:
    """Trainer's `num_items_in_batch`: an example's weight depends on the lengths of the others."""

    def token_mean(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        each = losses.TokenCrossEntropy.apply(logits.flatten(0, 1), labels.flatten(), smoothing)
        return each.view(labels.shape).sum(1) / (labels != losses.IGNORED).sum().clamp_min(1)

    patch.setattr(losses, "token_mean", token_mean)


def not_a_number_let_through(patch: Patch) -> None:
    patch.setattr(capture.fx, "without_examples", lambda uses, keep: uses)


def empty_draws_skipped(patch: Patch) -> None:
    original = trainer.DPTrainerMixin.training_step

    def step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        if not inputs[microbatch.MICRO_BATCHES]:
            return torch.zeros(())
        return original(self, model, inputs, num_items_in_batch)

    patch.setattr(trainer.DPTrainerMixin, "training_step", step)


def charged_after_the_release(patch: Patch) -> None:
    original, late = Releaser.__call__, Ledger.charge
    patch.setattr(Ledger, "charge", lambda self, step_number=None: self.num_steps)

    def call(self: Releaser, *args: Any, **kwargs: Any) -> torch.Tensor:
        noisy = original(self, *args, **kwargs)
        late(self._ledger)
        return noisy

    patch.setattr(Releaser, "__call__", call)


def every_other_step_charged(patch: Patch) -> None:
    original, count = Ledger.charge, iter(range(10**6))
    patch.setattr(Ledger, "charge", lambda self, n=None: original(self, n) if next(count) % 2 else self.num_steps)


def epsilon_three_percent_too_small(patch: Patch) -> None:
    original = epsilon._pld_epsilon
    epsilon._spent.cache_clear()
    patch.setattr(epsilon, "_pld_epsilon", lambda *a, **k: 0.97 * original(*a, **k))


# ---- the checks ----------------------------------------------------------------------------------------------------------


def neighbour_replay(folder: Path) -> None:
    test_trainer.test_removing_any_one_record_moves_the_sum_by_at_most_c(folder)


def brute_force(folder: Path) -> None:
    test_trainer.test_one_step_at_q_1_without_noise_is_the_clipped_mean("llama", 7, folder)


def noise_of_a_run(folder: Path) -> None:
    test_trainer.test_noise_has_the_stated_standard_deviation(folder)


def noise_of_a_release(folder: Path) -> None:
    with _ledger(folder) as ledger:
        test_release.test_what_is_released_is_the_sum_and_gaussian_noise_of_sigma_times_c(
            Releaser(ledger, NoiseSource())
        )


def noise_of_other_processes(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        test_release.test_the_other_processes_neither_charge_nor_add_noise([], patch)


def noise_under_one_seed(folder: Path) -> None:
    test_trainer.test_two_runs_with_the_same_seed_have_different_noise(folder)


def noise_after_resuming(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        test_faults.test_a_resumed_run_has_fresh_noise_and_fresh_draws(folder, patch)


def poisson_gates(folder: Path) -> None:
    sampler = PoissonSampler(test_sampling.N, test_sampling.Q, test_sampling.T)
    table = test_sampling.inclusion(sampler.draw(t) for t in range(test_sampling.T))
    for gate in test_sampling.GATES:
        test_sampling.test_poisson(table, gate)


def slices_of_a_draw(folder: Path) -> None:
    test_sampling.test_the_slices_of_all_processes_are_the_draw_each_record_once(3, 0.3)


def an_example_that_is_nan(folder: Path) -> None:
    test_faults.test_an_example_that_is_no_number_counts_as_zero("lm_head", float("nan"), folder)


def empty_draws(folder: Path) -> None:
    test_trainer.test_empty_batches_are_noise_only_steps_and_are_charged(folder)


def on_disk_first(folder: Path) -> None:
    with _ledger(folder) as ledger, pytest.MonkeyPatch.context() as patch:
        test_release.test_the_step_is_on_disk_before_the_noise_is_drawn(ledger, folder, patch)


def golden_epsilons(folder: Path) -> None:
    epsilon._spent.cache_clear()
    try:
        test_accounting.test_golden_values_are_met_from_above_and_within_half_a_percent("e2e, 10 epochs")
    finally:
        epsilon._spent.cache_clear()


def _ledger(folder: Path) -> Ledger:
    ledger = Ledger.open(folder / LEDGER_NAME, test_release.HEADER)
    ledger.begin(0.05, test_release.SIGMA, test_release.C, 50)
    return ledger


CAUGHT: dict[Callable[[Patch], None], Callable[[Path], None]] = {
    no_clipping: neighbour_replay,
    clipped_after_averaging: neighbour_replay,
    clipped_by_parameter: neighbour_replay,
    noise_divided_by_the_batch: noise_of_a_release,
    noise_on_one_parameter: noise_of_a_release,
    noise_for_every_micro_batch: noise_of_a_run,
    noise_from_the_trainers_seed: noise_under_one_seed,
    noise_of_the_session_before: noise_after_resuming,
    noise_on_every_process: noise_of_other_processes,
    shuffled_epochs: poisson_gates,
    batches_evened_out: slices_of_a_draw,
    last_micro_batch_dropped: brute_force,
    divided_by_the_tokens_of_the_batch: neighbour_replay,
    not_a_number_let_through: an_example_that_is_nan,
    empty_draws_skipped: empty_draws,
    charged_after_the_release: on_disk_first,
    every_other_step_charged: on_disk_first,
    epsilon_three_percent_too_small: golden_epsilons,
}


@pytest.mark.parametrize("mutant", CAUGHT, ids=lambda f: f.__name__)
def test_a_planted_bug_is_caught(mutant: Callable[[Patch], None], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch)
        with pytest.raises(FAILS):
            CAUGHT[mutant](tmp_path)


def test_coupled_losses_are_refused_before_the_first_step_too(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        divided_by_the_tokens_of_the_batch(patch)
        with pytest.raises(HfDpError):
            test_trainer.test_one_step_at_q_1_without_noise_is_the_clipped_mean("llama", 3, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("check", dict.fromkeys(CAUGHT.values()), ids=lambda f: f.__name__)
def test_the_checks_pass_without_a_bug(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)
