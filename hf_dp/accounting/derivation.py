"""A planned `Mechanism` and its config -> every number of the plan, each with the rule that it came from."""

import math
from itertools import groupby
from typing import NamedTuple

from hf_dp.accounting.calibration import round_up
from hf_dp.accounting.epsilon import spent
from hf_dp.accounting.plan import epoch_length
from hf_dp.config import BY_RULE, LEFT_ALONE, PrivacyConfig
from hf_dp.mechanism import METRIC_NOISE, Mechanism, is_owned, taken_of_a_group
from hf_dp.randomness import STD, integer_sensitivity


class Derived(NamedTuple):
    """One number of the plan, as text, and the rule that it came from."""

    name: str
    value: str
    rule: str


def derivation(
    privacy: PrivacyConfig, mechanism: Mechanism, *, num_train_epochs: float, max_steps: int = -1
) -> list[Derived]:
    """Every number of the plan with its rule, in the order in which they follow from one another.

    Epsilon is rounded up to five digits. The call evaluates each accountant once.
    """
    m = mechanism
    per_epoch = epoch_length(privacy, m.num_examples)
    mean = ", B's mean over its levels" if privacy.batch_schedule else ""
    by_epochs = f"ceil({num_train_epochs:g} x {per_epoch}): {num_train_epochs:g} epochs of round(N / B) steps{mean}"
    of_sigma = "given" if m.target_epsilon is None else f"least that keeps epsilon within {m.target_epsilon:g}"
    epsilon = spent(m.segments(), m.delta)
    e, pld, rdp = (f"{round_up(x):g}" if math.isinf(x) else f"{round_up(x):.5g}" for x in epsilon)
    rows = [
        ("examples N", f"{m.num_examples:,}", f"given; public; unit: one {m.unit}; neighbours: {m.relation}"),
        ("expected batch B", f"{m.expected_batch_size:,}", "given; mean logical batch, over all processes"),
        ("sample rate q", f"{m.sample_rate:.6g}", "B / N; every record joins a step with probability q"),
        ("steps T", f"{m.num_steps:,}", "given" if max_steps > 0 else by_epochs),
        ("delta", f"{m.delta:g}", "1 / N**1.1, rounded down" if privacy.target_delta is None else "given"),
        ("clip norm C", f"{m.clip_norm:g}", f"{_of_clip_norm(privacy)}; no record moves the sum by more"),
        ("noise multiplier sigma", f"{m.noise_multiplier:.10g}", of_sigma),
        ("noise on the sum", f"{m.noise_std:.5g}", "sigma x C, standard deviation of each coordinate"),
        ("noise on the mean", f"{m.noise_std / m.expected_batch_size:.5g}", "sigma x C / B"),
        ("epsilon by PLD", pld, "privacy loss distributions, dp-accounting"),
        ("epsilon by RDP", rdp, "Rényi DP, dp-accounting; a looser cross-check"),
        (
            "epsilon",
            e,
            f"{'that' if m.is_discrete else 'the smaller of the two'}, after all {m.num_steps:,} steps, at delta",
        ),
    ]
    rows[9:9] = _level_rows(privacy, m)
    if privacy.unit_column is not None:
        rows[3:3] = [_unit_row(m)]
    if (m.contribution_bound or 1) > 1:
        rows[-3:] = [
            ("epsilon", e, f"of a mixture of Gaussians by PLD, dp-accounting, after all {m.num_steps:,} steps")
        ]
    if m.is_discrete:
        rows[9:11] = _grid_rows(m, rdp)
    if m.loss_bound is not None:
        rows[9:9] = _metric_rows(m, m.loss_bound)
    return [Derived(*row) for row in rows]


def _unit_row(m: Mechanism) -> tuple[str, str, str]:
    if m.contribution_bound is not None:
        rule = "given; records are drawn, of each group its first G; N counts these; epsilon is a group's"
        if is_owned(m.unit):
            rule = (
                "given; records are drawn, of each owner G at most, chosen by who owns which alone; N counts these; "
                "epsilon is an owner's"
            )
        return "records a unit, G", f"{m.contribution_bound:,}", rule
    return (
        "records a unit, k",
        f"{m.records_per_unit:,}",
        f"given; a step takes {taken_of_a_group(m.records_per_unit)}",
    )


def _of_clip_norm(privacy: PrivacyConfig) -> str:
    if privacy.clip_norm is BY_RULE:
        return "hf_dp's rule for Adam: hf_dp/training/README.md"
    return "the default" if privacy.clip_norm is LEFT_ALONE else "given"


def _level_rows(privacy: PrivacyConfig, m: Mechanism) -> list[tuple[str, str, str]]:
    """A row for each of sigma, C and B that a schedule changes."""
    found, names = [], ("noise_multiplier", "clip_norm", "expected_batch_size")
    for symbol, name, text in zip(("sigma", "C", "B"), names, privacy.schedules, strict=True):
        values = [f"{getattr(x, name):.5g}" for x in m.levels]
        if text and values:
            runs = [value for value, _ in groupby(values)]
            rule = f"{text}, in levels of T / {len(runs)} steps each; a level's steps are charged with its values"
            found.append((f"{symbol}, level by level", ", ".join(runs), rule))
    return found


def _grid_rows(m: Mechanism, rdp: str) -> list[tuple[str, str, str]]:
    """Rows for discrete noise."""
    most = integer_sensitivity(m.noise_multiplier)
    return [
        (
            "step of the grid",
            f"{m.noise_std / STD:.5g}",
            f"sigma x C / S; noise N_Z(0, S²), S = {STD:,}; one example a pass",
        ),
        ("integer sensitivity D", f"{most:,}", "floor(S / sigma): the most, in steps, by which a record moves the sum"),
        ("epsilon by RDP", rdp, "Rényi DP at whole orders, dp-accounting; PLD is not claimed of discrete noise"),
    ]


def _metric_rows(m: Mechanism, loss_bound: float) -> list[tuple[str, str, str]]:
    """Rows for loss and batch size that are released with the gradient."""
    std, mean = METRIC_NOISE * m.noise_multiplier, "standard deviation of one step's; of a mean over k steps, / sqrt(k)"
    return [
        (
            "joint noise multiplier",
            f"{m.joint_noise_multiplier:.10g}",
            f"sigma / sqrt(1 + 2 / {METRIC_NOISE:g}²): gradient, loss and batch size are one release; epsilon is of "
            "this",
        ),
        (
            "noise on a logged loss",
            f"{std * loss_bound / m.expected_batch_size:.5g}",
            f"{METRIC_NOISE:g} x sigma x L / B: {mean}",
        ),
        ("noise on a logged batch size", f"{std:.5g}", f"{METRIC_NOISE:g} x sigma: {mean}"),
    ]
