"""The best of a random number of runs: epsilon against figures, the theorems evaluated apart, brute force."""

import functools
import itertools
import json
import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant
from scipy import integrate, special, stats

from hf_dp import accounting
from hf_dp.accounting import selection
from hf_dp.accounting.epsilon import divergences
from hf_dp.accounting.selection import SHAPES, Selection, best_of, halting, random_number
from hf_dp.accounting.tradeoffs import RATES
from hf_dp.card.record import Record
from hf_dp.card.schema import PRIVACY_JSON
from hf_dp.card.verification import _is_begun
from hf_dp.card.writing import with_selection
from hf_dp.errors import AccountingError
from hf_dp.mechanism import Segment
from tests.support.folders import DELTA, STEPS, failures, model_folder

E2E = Segment(0.0243, 0.8, 410)
OTHER = Segment(0.1, 2.0, 400)  # cheaper than E2E at high orders, dearer at low ones
ORDERS = RdpAccountant().orders


# ---- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("distribution", "epsilon"), [("geometric", 10.0), ("logarithmic", 9.0), ("poisson", 11.2)])
def test_the_best_of_ten_runs_on_average(distribution, epsilon):
    """Known figures, to their digits: one run is 5.20 by PLD and 5.96 by Rényi accounting; ten composed are 17.2."""
    found = selection.spent(Selection(distribution, 10.0, ((E2E,),), 12.0), 1e-5)
    assert found == pytest.approx(epsilon, abs=0.05)
    one, ten = (accounting.spent([E2E._replace(num_steps=410 * k)], 1e-5) for k in (1, 10))
    assert (one.epsilon, one.rdp, ten.epsilon) == (
        pytest.approx(5.2, abs=0.01),
        pytest.approx(5.96, abs=0.01),
        pytest.approx(17.2, abs=0.05),
    )
    assert one.rdp < found < ten.epsilon


@pytest.mark.parametrize("distribution", SHAPES)
def test_the_card_has_the_accountants_epsilon(distribution, tmp_path):
    """Ten candidates: what the card says is dp-accounting's own answer, and not that of the run that was kept."""
    kept = Segment(0.05, 1.0, STEPS)
    folder = model_folder(tmp_path, selection=Selection(distribution, 10.0, ((kept,),), 30.0))
    assert failures(folder) == ""
    record = json.loads((folder / PRIVACY_JSON).read_text())
    run = SelfComposedDpEvent(PoissonSampledDpEvent(0.05, GaussianDpEvent(1.0)), STEPS)
    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(RepeatAndSelectDpEvent(run, 10.0, SHAPES[distribution]))
    assert record["epsilon"] == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-9)
    assert (
        record["epsilon"]
        > 1.5 * accounting.spent([kept], DELTA).epsilon
        == 1.5 * record["selection"]["epsilon_of_one_run"]
    )
    assert record["epsilon_pld"] == "infinite"
    text = (folder / "README.md").read_text()
    assert f"best of a random number of runs, {distribution} with mean 10" in text
    assert "**Selected from a random number of runs.**" in text
    assert "The other runs that this model was selected from" in text


def test_the_card_claims_nothing_that_one_run_alone_would(tmp_path):
    """Attackers' rates and epsilon at other deltas are of the whole, so none is below that of a run."""
    kept = Segment(0.05, 1.0, STEPS)
    alone = json.loads((model_folder(tmp_path / "a") / PRIVACY_JSON).read_text())
    selected = with_selection(Record.of(alone), Selection("geometric", 10.0, ((kept,),), 30.0))
    best = selected.stated()
    rates = zip(alone["tradeoff"]["true_positive_rates"], best["tradeoff"]["true_positive_rates"], strict=True)
    assert all(b >= a for a, b in rates)
    assert best["tradeoff"]["true_positive_rates"] == sorted(best["tradeoff"]["true_positive_rates"])
    assert best["tradeoff"]["advantage"] > alone["tradeoff"]["advantage"]
    assert all(b["epsilon"] > a["epsilon"] for a, b in zip(alone["epsilon_at"], best["epsilon_at"], strict=True))
    assert len(best["tradeoff"]["false_positive_rates"]) == len(RATES)


# ---- the theorems, evaluated apart -----------------------------------------------------------------------------------


@functools.lru_cache
def rdp_by_quadrature(s: Segment, order: float) -> float:
    """Of the Poisson-subsampled Gaussian: log E[(1 - q + q e^((2x - 1) / 2 sigma²))^a] / (a - 1), x of N(0, sigma²)."""
    q, sigma = s.sample_rate, s.joint_noise_multiplier

    def log_of(x: float) -> float:
        ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * sigma**2))
        return order * ratio - x**2 / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))

    grid = np.linspace(-12 * sigma, order + 12 * sigma, 401)
    top = max(log_of(x) for x in grid)
    parts = integrate.quad(lambda x: math.exp(log_of(x) - top), grid[0], grid[-1], limit=2000, points=[0.0, order])
    return s.num_steps * (math.log(parts[0]) + top) / (order - 1)


def epsilon_of(orders, curve, delta: float) -> float:
    """Canonne, Kamath, Steinke 2020, proposition 12."""
    return min(r + math.log1p(-1 / a) - math.log(delta * a) / (a - 1) for a, r in zip(orders, curve, strict=True))


def by_theorem(orders, curve, distribution: str, mean: float) -> list[float]:
    """Papernot and Steinke 2022, theorems 2 (geometric, logarithmic) and 6 (Poisson), made monotone in the order."""
    if distribution == "poisson":
        bounds = []
        for a, r in zip(orders, curve, strict=True):
            e = math.log1p(1 / (a - 1))
            exponents = [
                (b - 1) * (s - e + math.log1p(-1 / b)) - math.log(b) for b, s in zip(orders, curve, strict=True)
            ]
            exponents += [
                0.5 * math.log(-math.expm1(-s)) for s in curve
            ]  # from the KL divergence: Bretagnolle and Huber
            bounds.append(r + mean * math.exp(min(exponents)) + math.log(mean) / (a - 1))
        return bounds
    shape = SHAPES[distribution]
    if distribution == "geometric":
        gamma = 1 / mean
    else:
        low, high = 1e-9, 1.0
        for _ in range(200):
            gamma = math.sqrt(low * high)
            low, high = (gamma, high) if (1 / gamma - 1) / math.log(1 / gamma) > mean else (low, gamma)
    price = min((1 + shape) * ((1 - 1 / b) * s - math.log(gamma) / b) for b, s in zip(orders, curve, strict=True))
    bounds = [r + price + math.log(mean) / (a - 1) for a, r in zip(orders, curve, strict=True)]
    return list(np.minimum.accumulate(bounds[::-1])[::-1])


@pytest.mark.parametrize("distribution", SHAPES)
@pytest.mark.parametrize("runs", [(E2E,), (E2E, OTHER)], ids=["one kind", "two kinds"])
def test_epsilon_is_that_of_the_theorems(distribution, runs):
    curves = [divergences([s])[1] for s in runs]
    expected = epsilon_of(ORDERS, by_theorem(ORDERS, np.max(curves, axis=0), distribution, 7.0), 1e-5)
    found = selection.spent(Selection(distribution, 7.0, tuple((s,) for s in runs), 12.0), 1e-5)
    assert found == pytest.approx(expected, rel=1e-6)  # gamma is found to 1e-9
    whole = [(i, a) for i, a in enumerate(ORDERS) if a == round(a) and a < 60]
    for s, curve in zip(runs, curves, strict=True):  # between whole orders dp-accounting interpolates, which is looser
        assert [curve[i] for i, _ in whole] == pytest.approx([rdp_by_quadrature(s, a) for _, a in whole], rel=1e-6)
        assert all(curve[i] >= rdp_by_quadrature(s, ORDERS[i]) * (1 - 1e-6) for i in (5, 15, 25, 35, 75))
    alone = [selection.spent(Selection(distribution, 7.0, ((s,),), 12.0), 1e-5) for s in runs]
    assert found >= max(alone) - 1e-12
    if len(runs) > 1:  # neither kind is the dearer at all orders, so the list costs more than either
        assert found > max(alone) * 1.001


def test_with_discrete_noise_in_one_run_all_are_accounted_at_whole_orders():
    discrete = E2E._replace(noise="discrete")
    both = selection.spent(Selection("geometric", 5.0, ((discrete,), (OTHER,)), 12.0), 1e-5)
    whole = ORDERS.round() == ORDERS
    worst = np.max([divergences([s])[1][whole] for s in (E2E, OTHER)], axis=0)
    expected = epsilon_of(ORDERS[whole], by_theorem(ORDERS[whole], worst, "geometric", 5.0), 1e-5)
    assert both == pytest.approx(expected, rel=1e-6)
    assert both > selection.spent(Selection("geometric", 5.0, ((E2E,), (OTHER,)), 12.0), 1e-5)
    with pytest.raises(AccountingError, match="No epsilon was found"):  # above 100 nothing is claimed of it
        selection.spent(Selection("geometric", 5.0, ((discrete._replace(joint_noise_multiplier=0.3),),), 12.0), 1e-5)


# ---- the guarantee, by brute force -----------------------------------------------------------------------------------


def law_of_best(q, distribution: str, mean: float):
    """Exact probabilities of the best outcome of K draws from q (best last), the outcome "no draw" first."""
    at = np.concatenate([[0.0], np.cumsum(q)]).clip(max=1)
    if distribution == "poisson":
        below = np.exp(mean * (at - 1))
    else:
        gamma = halting(distribution, mean)
        below = (
            gamma * at / (1 - (1 - gamma) * at)
            if distribution == "geometric"
            else np.log1p(-(1 - gamma) * at) / math.log(gamma)
        )
    return np.concatenate([below[:1], np.diff(below)])


def hockey_stick(p, q, epsilon: float) -> float:
    return float(np.maximum(p - math.exp(epsilon) * q, 0).sum())


def divergence(p, q, order):
    order, p, q = np.asarray(order)[:, None], np.log(p), np.log(q)
    both = [special.logsumexp(order * a + (1 - order) * b, axis=1) for a, b in ((p, q), (q, p))]
    return np.max(both, axis=0) / (order[:, 0] - 1)


def mechanisms(generator, outcomes: int, strength: float):
    """The law of a small mechanism on two neighbouring data sets."""
    p = generator.dirichlet(np.full(outcomes, 0.7)).clip(1e-6)
    q = p * np.exp(generator.uniform(-strength, strength, outcomes))
    return p / p.sum(), q / q.sum()


@pytest.mark.parametrize("distribution", SHAPES)
@pytest.mark.parametrize("mean", [1.5, 6.0, 40.0])
def test_no_small_mechanism_breaks_the_bound(distribution, mean):
    """20 pairs of mechanisms: one is drawn for each of K runs. The best run's exact law, and delta at epsilon."""
    generator, broken_without, orders = np.random.default_rng(5), 0, ORDERS[::4]
    for _, delta in itertools.product(range(20), (1e-2, 1e-5)):
        pairs = [mechanisms(generator, 4, strength) for strength in (0.3, 0.8)]
        curves = [divergence(*pair, orders) for pair in pairs]
        ranks = generator.permutation(8)  # outcomes of both mechanisms, in one order of scores
        p, q = (np.concatenate([pair[side] for pair in pairs])[ranks] / 2 for side in (0, 1))
        laws = [law_of_best(law, distribution, mean) for law in (p, q)]
        assert [law.sum() for law in laws] == pytest.approx([1, 1])
        claimed = epsilon_of(orders, best_of(orders, curves, distribution, mean), delta)
        of_one = epsilon_of(orders, np.max(curves, axis=0), delta)
        exact = max(hockey_stick(*laws, claimed), hockey_stick(*laws[::-1], claimed))
        assert exact <= delta * (1 + 1e-9)
        broken_without += max(hockey_stick(*laws, of_one), hockey_stick(*laws[::-1], of_one)) > delta
    if mean > 5:  # the epsilon of one run would be a lie of some of them: choosing costs
        assert broken_without > 0


# ---- the number of runs ----------------------------------------------------------------------------------------------


def probability(distribution: str, mean: float, k):
    if distribution == "poisson":
        return stats.poisson(mean).pmf(k)
    gamma = halting(distribution, mean)
    return stats.geom(gamma).pmf(k) if distribution == "geometric" else stats.logser(1 - gamma).pmf(k)


@pytest.mark.parametrize("distribution", SHAPES)
def test_the_number_is_drawn_from_the_law_that_is_accounted(distribution):
    """Chi-square against the law of the right mean, of 3/4 and of 4/3 of it; fails by chance once in 10^6."""
    draws = np.array([random_number(distribution, 5.0) for _ in range(20_000)])
    ks = np.arange(0, 15)

    def p_value(mean: float) -> float:
        expected = probability(distribution, mean, ks)
        expected = np.append(expected, 1 - expected.sum()) * len(draws)
        counts = np.append([(draws == k).sum() for k in ks], (draws >= 15).sum())
        seen = expected > 1e-9
        return stats.chisquare(counts[seen], expected[seen] * counts[seen].sum() / expected[seen].sum()).pvalue

    assert p_value(5.0) > 1e-6
    assert p_value(3.75) < 1e-9
    assert p_value(6.75) < 1e-9
    assert len({random_number(distribution, 1000.0) for _ in range(5)}) > 1


@pytest.mark.parametrize("mean", [1.0, 1.0001, 3.0, 10.0, 1000.0])
def test_the_mean_is_never_above_the_one_accounted(mean):
    for distribution, law in (("geometric", stats.geom), ("logarithmic", stats.logser)):
        gamma = halting(distribution, mean)
        found = 1.0 if gamma == 1 else law(gamma if distribution == "geometric" else 1 - gamma).mean()
        assert mean * (1 - 1e-6) <= found <= mean * (1 + 1e-12)
    assert random_number("logarithmic", 1.0) == random_number("geometric", 1.0) == 1


# ---- the part of one run, and mistakes -------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_run_gets_what_leaves_the_best_within_the_total():
    asked = []

    def selection_at(epsilon: float) -> Selection:
        asked.append(epsilon)
        return Selection("geometric", 5.0, ((Segment(0.05, 1.6 / epsilon, 30),),), 6.0)

    one = selection.target_of_one_run(6.0, 1e-5, selection_at)
    assert one in asked
    assert 6.0 * 0.985 < selection.spent(selection_at(one), 1e-5) <= 6.0
    assert float(f"{one:.5g}") == one
    with pytest.raises(AccountingError, match=r"out of reach: 0[.]005 for the best of"):
        selection.target_of_one_run(0.005, 1e-5, selection_at)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distribution": "uniform"}, "distribution must be one of geometric, logarithmic, poisson"),
        ({"mean": 0.5}, "the mean number of trials must be a number from 1 to 1,000"),
        ({"mean": math.nan}, "the mean number of trials"),
        ({"mechanisms": ()}, "every run must have steps"),
        ({"mechanisms": ((),)}, "every run must have steps"),
        ({"target_epsilon": -1.0}, "target_epsilon must be a finite number above 0"),
    ],
)
def test_an_impossible_selection_is_refused(settings, message):
    sound = {"distribution": "geometric", "mean": 5.0, "mechanisms": ((E2E,),), "target_epsilon": 8.0}
    with pytest.raises(AccountingError, match=message):
        Selection(**(sound | settings))


@pytest.mark.parametrize(
    ("run", "delta", "message"),
    [
        (E2E._replace(joint_noise_multiplier=0.0), 1e-5, "steps with noise"),
        (E2E._replace(sample_rate=1.5), 1e-5, "sample_rate must be above 0"),
        (E2E, 0.0, "delta must be at least"),
        (E2E, math.nan, "delta must be at least"),
    ],
)
def test_what_cannot_be_accounted_is_refused(run, delta, message):
    with pytest.raises(AccountingError, match=message):
        selection.spent(Selection("geometric", 5.0, ((run,),), 8.0), delta)


def test_what_is_stated_can_be_read_back():
    for distribution in SHAPES:
        whole = Selection(distribution, 5.0, ((E2E,), (OTHER, E2E._replace(noise="discrete"))), 8.0)
        assert Selection.of(json.loads(json.dumps(whole.stated(1e-5)))) == whole


def test_the_kept_run_is_one_of_those_planned_or_its_beginning():
    """The ledger tells clip norms apart, the plan of a selection does not."""
    planned = (Segment(0.05, 1.0, 10), Segment(0.1, 0.5, 20))
    sound = [
        planned,
        (Segment(0.05, 1.0, 4), Segment(0.05, 1.0, 6), *planned[1:]),
        planned[:1],
        (Segment(0.05, 1.0, 3),),
    ]
    wrong = [
        (Segment(0.05, 1.0, 11),),
        (Segment(0.05, 1.0, 9), planned[1]),
        (*planned, planned[0]),
        (Segment(0.05, 1.1, 10), planned[1]),
        (planned[0], Segment(0.1, 0.5, 20, "discrete")),
        planned[1:],
    ]
    assert all(_is_begun(run, planned) for run in sound)
    assert not any(_is_begun(run, planned) for run in wrong)
