"""The best of a random number of runs -> epsilon of the run that is kept, including the selection itself.

The base mechanism Q picks a combination of settings at random from a fixed list and trains with it; the score is
computed from its model. The whole mechanism picks a random number K, runs Q that many times with fresh randomness, and
outputs only the run with the best score. If Q has Rényi divergence R(a) at order a, the whole has at order a at most
(Papernot and Steinke 2022)

    R(a) + (1 + shape) ((1 - 1/b) R(b) + log(1/gamma) / b) + log(E K) / (a - 1)      for any order b

        by theorem 2, for K of the truncated negative binomial distribution with this shape and gamma, and

    R(a) + mean x d + log(mean) / (a - 1)

        by theorem 6, for K of a Poisson distribution, where Q is (log(1 + 1 / (a - 1)), d)-DP.

Which combination is picked depends on no record. So R(a) is at most the largest divergence at a among all in the list,
whatever the distribution of the pick. dp-accounting's `RepeatAndSelectDpEvent` evaluates the formulas on that curve.
Ties of the score are decided by the order of running: the runs are exchangeable, so the tie-break depends on no record
either.
"""

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypedDict, cast

import numpy as np

from hf_dp.accounting.epsilon import DISCRETE_MOST, Floats, delta_problems, divergences, target_problems
from hf_dp.accounting.epsilon import spent as spent_in_steps
from hf_dp.config import is_number
from hf_dp.errors import AccountingError
from hf_dp.mechanism import DISCRETE, Segment

SHAPES = {"geometric": 1.0, "logarithmic": 0.0, "poisson": math.inf}
INFINITE = "infinite"
MOST = 1000.0  # mean number of runs; beyond it nobody has trained
METHOD = "RDP of repeat and select: Papernot and Steinke 2022, theorems 2 and 6"
UNUSED = 1e-2  # this part of the total may stay unused
LEAST = 1e-3  # of the total; a run with less learns nothing

Segments = tuple[Segment, ...]


class _Stated(TypedDict):
    """What `Selection.of` reads of a file."""

    distribution: str
    mean: float
    target_epsilon: float
    mechanisms: list[list[dict[str, object]]]


@dataclass(frozen=True)
class Selection:
    """How the kept run was chosen. All of it is public, and fixed before the first run.

    Attributes:
        distribution: of the number of runs K; a key of SHAPES.
        mean: mean of K, at least 1.
        mechanisms: the planned steps of a run, for each combination; equal ones once.
        target_epsilon: the total that the selection was planned to stay within.

    Raises:
        AccountingError: a value out of range. Names everything wrong at once.
    """

    distribution: str
    mean: float
    mechanisms: tuple[Segments, ...]
    target_epsilon: float

    def __post_init__(self) -> None:
        wrong = [*distribution_problems(self.distribution, self.mean), *target_problems(self.target_epsilon)]
        if not self.mechanisms or not all(self.mechanisms):
            wrong.append(f"every run must have steps (got {self.mechanisms!r})")
        if wrong:
            raise AccountingError("Cannot account for this selection: " + "; ".join(wrong) + ".")

    @property
    def is_discrete(self) -> bool:
        """Whether a run may have discrete noise, which is accounted at whole orders."""
        return any(s.noise == DISCRETE for run in self.mechanisms for s in run)

    def stated(self, delta: float) -> dict[str, object]:
        """The selection as privacy.json has it."""
        shape = SHAPES[self.distribution]
        return {
            "distribution": self.distribution,
            "mean": self.mean,
            "shape": shape if math.isfinite(shape) else INFINITE,
            "method": METHOD,
            "target_epsilon": self.target_epsilon,
            "epsilon_of_one_run": epsilon_of_one_run(self, delta),
            "mechanisms": [[s.stated() for s in run] for run in self.mechanisms],
        }

    @classmethod
    def of(cls, stated: Mapping[str, object]) -> "Selection":
        """Reads what `stated` wrote.

        Raises:
            AccountingError: a value out of range.
        """
        said = cast(_Stated, stated)
        runs = tuple(tuple(Segment.of(s) for s in run) for run in said["mechanisms"])
        return cls(said["distribution"], said["mean"], runs, said["target_epsilon"])


def distribution_problems(distribution: str, mean: float) -> list[str]:
    """What is wrong with a distribution of the number of runs, a clause each."""
    wrong = []
    if distribution not in SHAPES:
        wrong.append(f"distribution must be one of {', '.join(SHAPES)} (got {distribution!r})")
    if not (is_number(mean) and 1 <= mean <= MOST):
        wrong.append(f"the mean number of trials must be a number from 1 to {MOST:,.0f} (got {mean!r})")
    return wrong


def spent(selection: Selection, delta: float) -> float:
    """An upper bound on epsilon of the run that is kept, by Rényi accounting alone.

    Raises:
        AccountingError: invalid steps or delta, no finite answer, or an answer below the cost of a single run.
    """
    from dp_accounting import rdp

    wrong = list(delta_problems(delta))
    if wrong:
        raise AccountingError(f"Cannot account for this selection: {'; '.join(wrong)}.")
    orders, curve = _curve(selection)
    # the last bit is for the sampler of discrete noise: of up to 2**10 runs on average it is still far above their
    # distance
    found = float(rdp.compute_epsilon(orders, curve, math.nextafter(delta, 0))[0])
    if selection.is_discrete and found > DISCRETE_MOST:
        found = math.inf
    least = epsilon_of_one_run(selection, delta)
    if not (math.isfinite(found) and found >= least * (1 - 1e-6)):  # written so that NaN fails too
        raise AccountingError(
            f"No epsilon was found for the best of {selection.distribution} {selection.mean:g} runs: the accountant "
            f"answered {found}, one run costs {least:.6g}. Use more noise"
        )
    return found


def deltas(selection: Selection, epsilons: Sequence[float]) -> list[float]:
    """An upper bound on delta at each of `epsilons`, at most 1."""
    from dp_accounting.rdp.rdp_privacy_accountant import compute_delta

    orders, curve = _curve(selection)
    if selection.is_discrete:
        epsilons = [min(e, DISCRETE_MOST) for e in epsilons]
    found = [float(compute_delta(orders, curve, e)[0]) for e in epsilons]
    return [min(1.0, math.nextafter(max(d, 2.0**-100), 1)) for d in found]


def epsilon_of_one_run(selection: Selection, delta: float) -> float:
    """The largest epsilon of a single run, had it been the only one."""
    return max(spent_in_steps(run, delta).epsilon for run in selection.mechanisms)


def target_of_one_run(total: float, delta: float, selection_at: Callable[[float], Selection]) -> float:
    """The largest epsilon for a single run, to five digits, with which the kept run uses `total` up to 1 % and never
    more.

    Args:
        total: the target epsilon of the whole.
        delta: of both.
        selection_at: epsilon of one run -> the selection among runs that are calibrated to it. Only an epsilon that was
            evaluated itself and found within the total is returned.

    Raises:
        AccountingError: the target is out of reach.
    """
    low, high, one = 0.0, total, total / 2
    while high - low > UNUSED / 10 * high:
        one = float(f"{one:.5g}")
        used = spent(selection_at(one), delta) / total
        if 1 - UNUSED <= used <= 1:
            return one
        low, high = (one, high) if used <= 1 else (low, one)
        if high < total * LEAST:
            raise AccountingError(
                f"target_epsilon is out of reach: {total:g} for the best of several runs leaves less than {high:.2g} "
                "for one. What to do: raise the target, or lower the mean number of trials"
            )
        one *= (1 - UNUSED / 2) / used  # the whole grows about as the part
        if not low < one < high:
            one = (low + high) / 2
    return low


def random_number(distribution: str, mean: float) -> int:
    """K, from the operating system's randomness. Nobody may see it before the last run has ended."""
    generator = np.random.Generator(np.random.Philox(key=secrets.randbits(128)))
    if distribution == "poisson":
        return int(generator.poisson(mean))
    gamma = halting(distribution, mean)
    return int(generator.geometric(gamma) if distribution == "geometric" else generator.logseries(1 - gamma))


def halting(distribution: str, mean: float) -> float:
    """Gamma of the geometric or logarithmic distribution with this mean, rounded up, so that the true mean is no
    larger.

    Logarithmic: P(k) = (1 - gamma)^k / (k log(1 / gamma)), with mean (1 / gamma - 1) / log(1 / gamma).
    """
    from scipy.optimize import brentq

    if mean == 1:
        return 1.0
    if distribution == "geometric":
        return math.nextafter(1 / mean, 1)
    x = brentq(lambda x: math.log(math.expm1(x) / x) - math.log(mean), 1e-9, 50.0, xtol=1e-12)  # x = log(1 / gamma)
    return min(1.0, math.exp(-x) * (1 + 1e-9))


@lru_cache(maxsize=64)
def _curve(selection: Selection) -> tuple[Floats, Floats]:
    """Orders, and the divergence of the kept run at each."""
    runs = [divergences(run) for run in selection.mechanisms]
    orders = min((found for found, _ in runs), key=len)  # with discrete noise in one of them the whole ones, of all
    curves = [curve[np.isin(found, orders)] for found, curve in runs]
    return orders, best_of(orders, curves, selection.distribution, selection.mean)


def best_of(orders: Floats, curves: Sequence[Floats], distribution: str, mean: float) -> Floats:
    """Divergences of the kept run, at each of `orders`.

    Args:
        orders: Rényi orders.
        curves: divergences of each base mechanism, at these orders.
        distribution: of K.
        mean: of K.

    Raises:
        AccountingError: the accountant's answer is not a divergence.
    """
    from dp_accounting import NeighboringRelation
    from dp_accounting.dp_event import RepeatAndSelectDpEvent

    accountant = _accountant()(orders, NeighboringRelation.REPLACE_SPECIAL)
    single = _known()(tuple(np.max(curves, axis=0)))
    accountant.compose(RepeatAndSelectDpEvent(single, mean, SHAPES[distribution]))
    if not (accountant.rdp >= 0).all():  # NaN fails too
        raise AccountingError(f"No valid divergence was found for the best of {distribution} {mean:g} runs.")
    return accountant.rdp


@lru_cache(maxsize=1)
def _known() -> type:
    """A class of dp-accounting events whose divergences are given, one at each of the accountant's orders."""
    from dp_accounting import DpEvent

    @dataclass(frozen=True)
    class Known(DpEvent):
        curve: tuple[float, ...]

    return Known


@lru_cache(maxsize=1)
def _accountant() -> type:
    """dp-accounting's Rényi accountant, extended so that it can compose such an event."""
    from dp_accounting.rdp import RdpAccountant

    class Accountant(RdpAccountant):
        def _maybe_compose(self, event: object, count: int, do_compose: bool) -> object:
            if not isinstance(event, _known()):
                return super()._maybe_compose(event, count, do_compose)
            if do_compose:
                self._rdp += count * np.array(event.curve)  # type: ignore[attr-defined]
            return None

    return Accountant
