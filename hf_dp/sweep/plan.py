"""Combinations, N and a distribution of the number of trials -> the noise of each combination, so that the target is
met.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from hf_dp import accounting
from hf_dp.accounting import Derived, Selection, round_up, selection
from hf_dp.config import PrivacyConfig
from hf_dp.errors import AccountingError, ConfigError, RecipeError
from hf_dp.mechanism import Mechanism, Segment
from hf_dp.recipe import training_arguments
from hf_dp.sweep.grid import Combination


class Plan(NamedTuple):
    """What will be run, all of it public; `target_of_one` is the epsilon to which each trial is calibrated."""

    selection: Selection
    delta: float
    target_of_one: float


def plan_sweep(combinations: Sequence[Combination], num_units: int, distribution: str, mean: float) -> Plan:
    """Gives every trial the same epsilon: the largest that keeps the selected model within the recipe's target.

    Raises:
        RecipeError: combinations that cannot be planned, or an invalid distribution. Names everything wrong at once.
        AccountingError: the target is out of reach.
    """
    mechanism_of = _planner(combinations, num_units)
    total = combinations[0].recipe.privacy.target_epsilon
    assert total is not None  # grid.combinations refuses a recipe without
    wrong = selection.distribution_problems(distribution, mean)
    found: list[Mechanism] = []
    for index in range(len(combinations)):
        try:
            found.append(mechanism_of(index, total))
        except (ConfigError, AccountingError) as error:
            wrong += [] if str(error) in wrong else [str(error)]
    if wrong:
        raise RecipeError("\n".join(f"  - {problem}" for problem in wrong))
    delta = found[0].delta

    def selection_at(epsilon: float) -> Selection:
        kinds = dict.fromkeys(segments_of(mechanism_of(i, epsilon)) for i in range(len(combinations)))
        return Selection(distribution, mean, tuple(kinds), total)

    one = selection.target_of_one_run(total, delta, selection_at)
    return Plan(selection_at(one), delta, one)


def segments_of(mechanism: Mechanism) -> tuple[Segment, ...]:
    """The steps of a whole run."""
    return mechanism.segments()


def derivation(p: Plan, num_combinations: int) -> list[Derived]:
    """Every number of the plan with the rule that it came from."""
    s = p.selection
    kinds = [
        Derived(
            f"kind of trial {number}",
            "; ".join(f"sigma {g.joint_noise_multiplier:.6g}" for g in run),
            "; ".join(f"{g.num_steps:,} steps at q = {g.sample_rate:.6g}" for g in run),
        )
        for number, run in enumerate(s.mechanisms, start=1)
    ]
    whole = max(1, round(s.mean))
    together = max(
        accounting.spent([g._replace(num_steps=g.num_steps * whole) for g in run], p.delta).epsilon
        for run in s.mechanisms
    )
    selected = selection.spent(s, p.delta)
    less = "; less than the selection: so many trainings within a budget file (hf-dp budget) cost less than a sweep"
    return [
        Derived("combinations", f"{num_combinations:,}", "product of the grid; each trial draws one, with replacement"),
        Derived(
            "trials", f"{s.mean:g} on average", f"the number is drawn: {s.distribution}; nobody sees it before the end"
        ),
        Derived("target epsilon", f"{s.target_epsilon:g}", "given: of the selected model, the selection included"),
        Derived("delta", f"{p.delta:g}", "of the selected model"),
        Derived(
            "epsilon of one trial",
            f"{p.target_of_one:.5g}",
            "the most that keeps the selected model within the target; all alike",
        ),
        *kinds,
        Derived("epsilon, selected", f"{round_up(selected):.5g}", selection.METHOD),
        Derived(
            "epsilon, all published",
            f"{round_up(together):.5g}",
            f"{whole} trials composed: what publishing every one would cost{less if together < selected else ''}",
        ),
    ]


def _planner(combinations: Sequence[Combination], num_units: int) -> Callable[[int, float], Mechanism]:
    """(index of a combination, epsilon of one trial) -> its mechanism. Combinations that differ only in C are
    calibrated once.
    """
    steps = [
        (float(a.num_train_epochs), int(a.max_steps)) for a in (training_arguments(c.recipe) for c in combinations)
    ]

    @cache
    def calibrated(privacy: PrivacyConfig, epochs: float, max_steps: int) -> Mechanism:
        return accounting.plan_mechanism(privacy, num_units, num_train_epochs=epochs, max_steps=max_steps)

    def mechanism_of(index: int, epsilon: float) -> Mechanism:
        privacy = combinations[index].recipe.privacy
        if any(privacy.schedules):
            return calibrated(replace(privacy, target_epsilon=epsilon), *steps[index])
        like = calibrated(replace(privacy, target_epsilon=epsilon, clip_norm=1.0), *steps[index])
        return replace(like, clip_norm=float(privacy.clip_norm))

    return mechanism_of
