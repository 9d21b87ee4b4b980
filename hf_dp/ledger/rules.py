"""Fields of a ledger's records -> nothing, or a ValueError that names every field that is wrong."""

from collections.abc import Callable
from typing import cast

from hf_dp.config import MIN_DELTA, MOST_CONTRIBUTED, NOISES

Rule = tuple[str, Callable[[object], bool]]


def _whole(low: int) -> Rule:
    return f"a whole number from {low} to 2**53", lambda v: type(v) is int and low <= v <= 1 << 53


def _number(low: float, high: float) -> Rule:
    return f"a number from {low} to {high}", lambda v: type(v) in (int, float) and low <= cast(float, v) <= high


def _is_bound(v: object) -> bool:
    return type(v) is int and 1 <= v <= MOST_CONTRIBUTED


_TEXT: Rule = "a text", lambda v: type(v) is str and v != ""
HEADER: dict[str, Rule] = {
    "num_examples": _whole(1),
    "unit": _TEXT,
    "relation": _TEXT,
    "delta": (f"at least {MIN_DELTA} and below 1", lambda v: type(v) is float and MIN_DELTA <= v < 1),
    "data_fingerprint": ("a text or null", lambda v: v is None or (type(v) is str and v != "")),
    "debug": ("true or false", lambda v: type(v) is bool),
}
SEGMENT: dict[str, Rule] = {
    "sample_rate": ("above 0 and at most 1", lambda v: type(v) in (int, float) and 0 < cast(float, v) <= 1),
    "noise_multiplier": _number(0, 1e9),
    "clip_norm": _number(1e-30, 1e30),
    "expected_batch_size": _whole(1),
}
OPTIONAL: dict[str, Rule] = {
    "loss_bound": _number(1e-30, 1e30),
    "records_per_unit": _whole(2),
    "contribution_bound": (f"a whole number from 1 to {MOST_CONTRIBUTED}", _is_bound),
    "noise": ("one of " + ", ".join(NOISES), lambda v: v in NOISES),
}
PLAN: dict[str, Rule] = {
    "segments": ("a list of objects", lambda v: type(v) is list and all(type(s) is dict for s in v))
}
PLANNED: dict[str, Rule] = {name: SEGMENT[name] for name in ("sample_rate", "noise_multiplier")} | {
    "num_steps": _whole(1),
    "noise": OPTIONAL["noise"],
}
STEP: dict[str, Rule] = {"n": _whole(1), "step": _whole(0)}


def check_settings(values: dict[str, object]) -> None:
    """Checks the settings of a segment, some of which may be left out."""
    check(values, SEGMENT | {k: rule for k, rule in OPTIONAL.items() if k in values})


def check_planned(values: dict[str, object]) -> None:
    """Checks a segment of a plan, which has a contribution bound only where it is above 1."""
    name = "contribution_bound"
    check(values, PLANNED | ({name: OPTIONAL[name]} if name in values else {}))


def check(values: dict[str, object], rules: dict[str, Rule]) -> None:
    """Checks that exactly the fields of `rules` are there, and each value against its rule."""
    if values.keys() != rules.keys():
        raise ValueError(f"expected the fields {', '.join(rules)}, found {', '.join(values)}")
    wrong = [f"{k}: expected {rule}, found {values[k]!r}" for k, (rule, right) in rules.items() if not right(values[k])]
    if wrong:
        raise ValueError("; ".join(wrong))
