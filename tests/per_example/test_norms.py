"""Norms that clip are upper bounds: thousands of hard gradients of every form against sums in extended precision."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from hf_dp.per_example import factors as fx
from hf_dp.per_example import norms
from hf_dp.per_example.clipping import LARGEST_NORM, clip_factors
from hf_dp.per_example.factors import Dense, Factor, Outer, Rows
from tests.support import engine

BATCH = 240  # gradients of a kind and a seed
SEEDS = range(4)


def normal(g: Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=g) * scale


def scales(g: Generator, low: float, high: float) -> Tensor:
    """Powers of ten, one an example, [B, 1, 1]."""
    return 10 ** (low + (high - low) * torch.rand(BATCH, 1, 1, generator=g))


def ordinary(g: Generator) -> list[Factor]:
    return [Outer(normal(g, BATCH, 5, 24), normal(g, BATCH, 5, 20))]


def ordinary_products(g: Generator) -> list[Factor]:
    return [Outer(normal(g, BATCH, 40, 8), normal(g, BATCH, 40, 6))]


def ordinary_bfloat16(g: Generator) -> list[Factor]:
    return [Outer(normal(g, BATCH, 5, 24).bfloat16(), normal(g, BATCH, 5, 20).bfloat16())]


def ordinary_dense(g: Generator) -> list[Factor]:
    return [Dense(normal(g, BATCH, 7, 41) * scales(g, -8, 8))]


def ordinary_tied_table(g: Generator) -> list[Factor]:
    index = torch.randint(0, 20, (BATCH, 6), generator=g)
    return [Outer(normal(g, BATCH, 5, 24), normal(g, BATCH, 5, 20)), Rows(index, normal(g, BATCH, 6, 24), 20)]


def pairs_that_cancel(g: Generator) -> list[Factor]:
    """The same inputs twice with opposite gradients, but for a part of 1e-7 to 0.1."""
    x, y = normal(g, BATCH, 2, 24) * scales(g, 0, 4), normal(g, BATCH, 2, 20)
    return [Outer(torch.cat([x, x], 1), torch.cat([y, -y * (1 - scales(g, -7, -1))], 1))]


def triples_that_cancel(g: Generator) -> list[Factor]:
    """a, b and -(a + b), at positions that share their input."""
    x, y = normal(g, BATCH, 1, 24) * scales(g, -3, 6), normal(g, BATCH, 2, 20)
    return [Outer(x.expand(-1, 3, -1), torch.cat([y, -y.sum(1, keepdim=True)], 1))]


def nothing_left(g: Generator) -> list[Factor]:
    x, y = normal(g, BATCH, 3, 24) * scales(g, -6, 6), normal(g, BATCH, 3, 20)
    return [Outer(torch.cat([x, x], 1), torch.cat([y, -y], 1))]


def huge(g: Generator) -> list[Factor]:
    return [Outer(normal(g, BATCH, 4, 24) * scales(g, 8, 30), normal(g, BATCH, 4, 20) * scales(g, -4, 30))]


def tiny(g: Generator) -> list[Factor]:
    """Down to float32's subnormal numbers."""
    return [Outer(normal(g, BATCH, 4, 24) * scales(g, -42, -8), normal(g, BATCH, 4, 20) * scales(g, -8, 0))]


def tiny_dense(g: Generator) -> list[Factor]:
    return [Dense(normal(g, BATCH, 130, 1) * scales(g, -44, -15))]


def rows_that_cancel(g: Generator) -> list[Factor]:
    """A word that occurs twice, with opposite gradients, beside one that occurs once, with next to none."""
    index, y = torch.tensor([[3, 3, 7]]).expand(BATCH, 3), normal(g, BATCH, 1, 24) * scales(g, 0, 6)
    return [Rows(index, torch.cat([y, -y * (1 - scales(g, -7, -1)), normal(g, BATCH, 1, 24, scale=1e-4)], 1), 20)]


def a_tied_table_that_cancels(g: Generator) -> list[Factor]:
    """What the head adds to a row, the lookup takes away."""
    x, size = normal(g, BATCH, 1, 24), scales(g, -2, 5)
    one = torch.zeros(BATCH, 1, 20)
    one[:, 0, 4] = 1
    return [Outer(x, one * size), Rows(torch.full((BATCH, 1), 4), -x * size * (1 + scales(g, -7, -1)), 20)]


def dense_and_factored_that_cancel(g: Generator) -> list[Factor]:
    x, y = normal(g, BATCH, 2, 24) * scales(g, -2, 5), normal(g, BATCH, 2, 20)
    return [Dense(-fx.per_example_product(y, x)), Outer(x, y)]


def long_sums(g: Generator) -> list[Factor]:
    """Gradients that share a direction, so that rounding adds up: a float32 sum is short by 1e-4."""
    return [Dense(1 + normal(g, BATCH, 20_000, 1, scale=1e-3))]


ORDINARY = [ordinary, ordinary_products, ordinary_bfloat16, ordinary_dense, ordinary_tied_table, long_sums]
HARD = [
    *(pairs_that_cancel, triples_that_cancel, nothing_left, huge, tiny, tiny_dense),
    *(rows_that_cancel, a_tied_table_that_cancels, dense_and_factored_that_cancel),
]


def true_norms(factors: list[Factor]) -> np.ndarray:
    """[B], in extended precision, of the gradients themselves."""
    return np.sqrt((true_gradients(factors) ** 2).sum((1, 2)))


def true_gradients(factors: list[Factor]) -> np.ndarray:
    """[B, r, d]: what float32 numbers stand for, product by product."""
    total = np.zeros((), np.longdouble)
    for factor in factors:
        if isinstance(factor, Dense):
            g = wide(factor.gradient)
        elif isinstance(factor, Outer):
            x, y = wide(factor.inputs), wide(factor.grads)
            g = sum(y[:, t, :, None] * x[:, t, None, :] for t in range(x.shape[1]))
        else:
            g = np.zeros((BATCH, factor.num_rows, factor.grads.shape[-1]), np.longdouble)
            for t in range(factor.grads.shape[1]):
                g[np.arange(BATCH), factor.rows[:, t].numpy()] += wide(factor.grads[:, t])
        total = total + g
    return total


def wide(x: Tensor) -> np.ndarray:
    return x.double().numpy().astype(np.longdouble)


def measured(factors: list[Factor]) -> np.ndarray:
    return norms.squared_norms({"weight": factors}).squares.sqrt().numpy()


def drawn(kind: Callable[[Generator], list[Factor]], seed: int) -> list[Factor]:
    return kind(torch.Generator().manual_seed(seed))


def test_there_are_ten_thousand_cases() -> None:
    assert (len(ORDINARY) + len(HARD)) * len(SEEDS) * BATCH > 10_000


@pytest.mark.parametrize("kind", [*ORDINARY, *HARD], ids=lambda kind: kind.__name__)
def test_no_norm_is_below_the_true_one(kind: Callable[[Generator], list[Factor]]) -> None:
    for seed in SEEDS:
        factors = drawn(kind, seed)
        assert (measured(factors) >= true_norms(factors)).all()


@pytest.mark.parametrize("kind", ORDINARY, ids=lambda kind: kind.__name__)
def test_ordinary_norms_are_the_true_ones(kind: Callable[[Generator], list[Factor]]) -> None:
    for seed in SEEDS:
        factors = drawn(kind, seed)
        assert (measured(factors) <= true_norms(factors) * (1 + 1e-5)).all()


CANCELLING = [pairs_that_cancel, rows_that_cancel, a_tied_table_that_cancels]


@pytest.mark.parametrize("kind", [*CANCELLING, huge], ids=lambda kind: kind.__name__)
def test_what_cancels_is_measured_closely_too(kind: Callable[[Generator], list[Factor]]) -> None:
    """Down to 1e-7 of its terms: nobody is clipped for a bound that says little."""
    for seed in SEEDS:
        factors = drawn(kind, seed)
        assert (measured(factors) <= true_norms(factors) * (1 + 1e-5)).all()


@pytest.mark.parametrize("kind", [ordinary_dense, *HARD], ids=lambda kind: kind.__name__)
def test_what_an_example_adds_is_at_most_c(kind: Callable[[Generator], list[Factor]]) -> None:
    """As computed, in float32: also where the terms that it is the sum of are a million times as large."""
    clip_norm, factors = 0.1, drawn(kind, 0)
    found = norms.squared_norms({"weight": factors})
    weights = clip_factors(found.squares.sqrt(), clip_norm)
    shape = tuple(true_gradients(factors).shape[1:])
    for example in range(0, BATCH, 8):
        if weights[example] == 0:
            continue
        own = torch.where(torch.arange(BATCH) == example, weights, 0.0)
        into = torch.zeros(shape)
        apart = [b for b in found.cancelling.get("weight", []) if b == example]
        fx.add_weighted_sum(factors, own, into, apart)
        assert float(into.double().norm()) <= clip_norm


@pytest.mark.parametrize("numbers", [10_000_000, 100_000_000])
@pytest.mark.parametrize("value", [1.0, 0.1, 3e-5])
def test_as_many_numbers_as_a_model_has(numbers: int, value: float) -> None:
    """Repeated without memory. Added up in float32 one by one, 1e8 of them are 1 % short."""
    gradient = torch.full((1, 1), value).expand(1, numbers)
    true = float(gradient[0, 0].double()) * math.sqrt(numbers)
    assert true <= measured([Dense(gradient)])[0] <= true * (1 + 1e-5)


@pytest.mark.parametrize("chunk", [1, 50, 4000])
@pytest.mark.parametrize("kind", [ordinary, ordinary_tied_table, *CANCELLING], ids=lambda kind: kind.__name__)
def test_any_chunk_gives_the_same_norms(kind: Callable, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = [fx.without_examples([f], torch.arange(BATCH) >= 0)[0] for f in drawn(kind, 5)]
    few = [type(f)(*(x[:6] if isinstance(x, Tensor) else x for x in f)) for f in factors]
    whole = measured(few)
    monkeypatch.setattr(fx, "CHUNK_ELEMENTS", chunk)
    np.testing.assert_allclose(measured(few), whole, rtol=1e-7)


@pytest.mark.parametrize("norm", [-1e-30, -1.0, math.nan, math.inf, 2 * LARGEST_NORM])
def test_a_norm_that_bounds_nothing_drops_the_example(norm: float) -> None:
    factors = clip_factors(torch.tensor([norm, 0.0, 2.0], dtype=torch.float64), 1.0)
    assert factors[0] == 0
    assert factors[1] == 1
    assert 0.499 < factors[2] <= 0.5


@pytest.mark.parametrize("weight", [1 / 3, 2 / 3, 1e-38 / 3, 1e-42 / 7, 1e-50])
def test_weights_are_rounded_toward_zero(weight: float) -> None:
    rounded = fx.toward_zero(torch.tensor([weight], dtype=torch.float64), torch.float32)
    assert rounded.dtype == torch.float32
    assert max(0.0, weight * (1 - 2e-7) - 2e-45) <= float(rounded) <= weight


@pytest.mark.parametrize(("size", "gap"), [(80.0, 1e-3), (1e3, 1e-4), (1e4, 2e-5), (1e5, 1e-6)])
def test_a_model_whose_positions_cancel_is_clipped(size: float, gap: float) -> None:
    """Through the whole pass, among others that do not cancel."""
    torch.manual_seed(3)
    model = torch.nn.Linear(64, 48, bias=False)
    x = torch.randn(3, 1, 64).expand(3, 2, 64) * torch.tensor([size, 1.0, 1.0]).view(3, 1, 1)
    signs = torch.tensor([[1.0, gap - 1.0], [1.0, 0.5], [1.0, 1.0]])
    sums = []
    for rows in ([0, 1, 2], [1, 2]):
        losses = lambda m, b: (b["signs"] * m(b["x"]).sum(2)).sum(1)  # noqa: E731
        into, _ = engine.clipped_sum(model, {"x": x[rows], "signs": signs[rows]}, losses, 0.1)
        sums.append(into["weight"].double())
    assert 0.0999 < float((sums[0] - sums[1]).norm()) <= 0.1 * (1 + 1e-6)  # the others round to float32
