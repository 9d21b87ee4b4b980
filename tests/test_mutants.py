"""Bugs planted on purpose, each of a kind found in the wild: a named check of this suite has to fail for every one.

A mutant is a patch of a line or two. The checks are the suite's own test functions, called as they are; that they pass
without a mutant is what the rest of the suite shows, and the last test here once more.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from hf_dp.accounting import epsilon
from hf_dp.errors import HfDpError
from hf_dp.ledger.ledger import LEDGER_NAME, Ledger
from hf_dp.randomness.noise import NoiseSource
from hf_dp.sampling.poisson import PoissonSampler
from hf_dp.step.release import Releaser
from tests.accounting import test_accounting
from tests.ledger import test_faults
from tests.per_example import test_fast_paths
from tests.sampling import test_sampling
from tests.step import test_release
from tests.support import runs
from tests.support.broken import (
    Patch,
    a_pair_that_forgets_its_switch,
    a_pair_without_its_scale,
    a_stack_in_another_order,
    batches_evened_out,
    charged_after_the_release,
    clipped_after_averaging,
    clipped_by_parameter,
    divided_by_the_tokens_of_the_batch,
    empty_draws_skipped,
    epsilon_three_percent_too_small,
    every_other_step_charged,
    full_blocks_alone_measured,
    last_micro_batch_dropped,
    no_clipping,
    noise_divided_by_the_batch,
    noise_for_every_micro_batch,
    noise_from_the_trainers_seed,
    noise_of_the_session_before,
    noise_on_every_process,
    noise_on_one_parameter,
    norms_of_one_stack_alone,
    not_a_number_let_through,
    places_that_always_hold,
    shuffled_epochs,
)
from tests.training import test_trainer

FAILS = (AssertionError, HfDpError, pytest.fail.Exception)


# ---- the checks ------------------------------------------------------------------------------------------------------


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


def general_way(folder: Path) -> None:
    test_fast_paths.test_pairs_by_one_tap_have_the_gradients_of_the_general_way("llama")
    with pytest.MonkeyPatch.context() as patch:
        test_fast_paths.test_stacks_and_single_gradients_give_one_clipped_sum(patch)


def general_way_switched_off(folder: Path) -> None:
    test_fast_paths.test_an_adapter_that_the_loss_switches_off_is_off()


def places_of_a_frozen_parameter(folder: Path) -> None:
    test_fast_paths.test_places_that_do_not_hold_are_not_taken()


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
    norms_of_one_stack_alone: neighbour_replay,
    full_blocks_alone_measured: neighbour_replay,
    a_stack_in_another_order: general_way,
    a_pair_without_its_scale: general_way,
    a_pair_that_forgets_its_switch: general_way_switched_off,
    places_that_always_hold: places_of_a_frozen_parameter,
}


@pytest.mark.parametrize("mutant", CAUGHT, ids=lambda f: f.__name__)
def test_a_planted_bug_is_caught(mutant: Callable[[Patch], None], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch)
        with pytest.raises(FAILS):
            CAUGHT[mutant](tmp_path)


def test_coupled_losses_get_passes_of_one_example_and_are_exact(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        divided_by_the_tokens_of_the_batch(patch)
        assert "not proved that its examples are independent" in runs.trainer(tmp_path / "plan").alone_because
        test_trainer.test_one_step_at_q_1_without_noise_is_the_clipped_mean("llama", 3, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("check", dict.fromkeys(CAUGHT.values()), ids=lambda f: f.__name__)
def test_the_checks_pass_without_a_bug(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)
