"""Factored per-example gradients against the gradients themselves, over random shapes, empty batches included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_dp.per_example import factors as fx
from hf_dp.per_example import norms
from hf_dp.per_example.factors import Dense, Factor, Outer, Rows

# float64 throughout: what is left is the order of summation
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
quick = settings(max_examples=40, deadline=None)


@st.composite
def uses(draw) -> tuple[list[Factor], int]:
    """Some uses of one parameter [r, d] by B examples, of any mixture of kinds."""
    batch, r, d = draw(st.integers(0, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    kinds = draw(st.lists(st.sampled_from(["dense", "outer", "rows"]), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def one(kind: str) -> Factor:
        positions = draw(st.integers(1, 6))
        if kind == "dense":
            return Dense(normal(batch, r, d))
        if kind == "outer":
            return Outer(normal(batch, positions, d), normal(batch, positions, r))
        return Rows(torch.randint(0, r, (batch, positions), generator=generator), normal(batch, positions, d), r)

    return [one(kind) for kind in kinds], batch


def slow(factors: list[Factor]) -> Tensor:
    """[B, r, d] by loops over examples and positions."""
    total = None
    for f in factors:
        if isinstance(f, Dense):
            g = f.gradient.clone()
        elif isinstance(f, Outer):
            g = f.grads.new_zeros(len(f.grads), f.grads.shape[-1], f.inputs.shape[-1])
            for b in range(len(g)):
                for t in range(f.grads.shape[1]):
                    g[b] += torch.outer(f.grads[b, t], f.inputs[b, t])
        else:
            g = f.grads.new_zeros(len(f.grads), f.num_rows, f.grads.shape[-1])
            for b in range(len(g)):
                for t in range(f.grads.shape[1]):
                    g[b, f.rows[b, t]] += f.grads[b, t]
        total = g if total is None else total + g
    return total


def square(factors: list[Factor]) -> Tensor:
    return norms.squared_norms({"weight": factors}).squares


@given(uses())
@quick
def test_norms_of_any_mixture_are_those_of_the_gradients(case) -> None:
    factors, batch = case
    expected = slow(factors).flatten(1).square().sum(1)
    torch.testing.assert_close(square(fx.merge(factors)), expected, **CLOSE)
    assert len(square(fx.merge(factors))) == batch


@given(uses(), st.sampled_from([1, 7, 1 << 25]))
@quick
def test_weighted_sums_of_any_mixture_in_chunks_of_any_size(case, chunk: int) -> None:
    factors, batch = case
    weights = torch.rand(batch, dtype=torch.float64)
    gradients = slow(factors)
    into = torch.ones(gradients.shape[1:], dtype=torch.float64)
    before, fx.CHUNK_ELEMENTS = fx.CHUNK_ELEMENTS, chunk
    try:
        fx.add_weighted_sum(fx.merge(factors), weights, into)
    finally:
        fx.CHUNK_ELEMENTS = before
    torch.testing.assert_close(into, 1 + torch.einsum("b,bij->ij", weights, gradients), **CLOSE)


@given(uses(), st.sampled_from([1, 7, 1 << 25]))
@quick
def test_gram_and_product_forms_agree(case, chunk: int) -> None:
    factors, _ = case
    before, fx.CHUNK_ELEMENTS = fx.CHUNK_ELEMENTS, chunk
    try:
        for factor in factors:
            if isinstance(factor, Outer):
                torch.testing.assert_close(norms.by_gram(factor).square, norms.by_product(factor).square, **CLOSE)
    finally:
        fx.CHUNK_ELEMENTS = before


@given(uses())
@quick
def test_materialised_is_the_gradient(case) -> None:
    for factor in case[0]:
        torch.testing.assert_close(fx.materialise(factor), slow([factor]), **CLOSE)


@given(uses(), st.sampled_from([float("nan"), float("inf")]))
@quick
def test_examples_left_out_add_exactly_nothing(case, bad: float) -> None:
    factors, batch = case
    if batch < 2:
        return
    keep = torch.ones(batch, dtype=torch.bool)
    keep[0] = False
    for factor in factors:
        (factor.gradient if isinstance(factor, Dense) else factor.grads)[0] = bad
    left = fx.without_examples(fx.merge(factors), keep)
    into = torch.zeros(slow([factors[0]]).shape[1:], dtype=torch.float64)
    fx.add_weighted_sum(left, keep.double(), into)
    torch.testing.assert_close(into, slow(factors)[1:].sum(0), **CLOSE)


def test_rows_that_occur_twice_add_up_before_they_are_squared() -> None:
    twice = Rows(torch.tensor([[3, 3]]), torch.ones(1, 2, 1), 5)
    apart = Rows(torch.tensor([[3, 4]]), torch.ones(1, 2, 1), 5)
    assert square([twice]).item() == pytest.approx(4.0)
    assert square([apart]).item() == pytest.approx(2.0)


def test_a_tied_tables_cross_term_counts() -> None:
    """The same weight as lookup and as head: |a + b|^2 is not |a|^2 + |b|^2."""
    rows = Rows(torch.tensor([[2]]), torch.tensor([[[1.0, 0.0]]]), 4)
    head = Outer(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 0.0, 1.0, 0.0]]]))
    assert square([head, rows]).item() == pytest.approx(4.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    """4,096 positions of 1/64 each: bfloat16 itself stops counting long before 1."""
    ones = torch.full((1, 4096, 1), 1 / 64, dtype=dtype)
    product = fx.per_example_product(ones, ones)
    assert product.dtype == torch.float32
    assert product.item() == 1.0
    into = torch.zeros(1, 1)
    fx.add_weighted_sum([Outer(ones, ones)], torch.ones(1), into)
    assert into.item() == 1.0
