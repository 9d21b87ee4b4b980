"""Records of several owners: which are kept, that nothing but the graph of owners decides it, and what is refused."""

import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Json, Value
from scipy import stats

from hf_dp.errors import ConfigError
from hf_dp.sampling import PoissonSampler, groups_by
from hf_dp.sampling.owners import owners_of

FALSE_ALARM = 1e-6
Lists = Sequence[Sequence[Any]]


def kept_of(lists: Lists, bound: int) -> list[int]:
    kept: list[int] = owners_of(list(map(list, lists)), "users").kept(bound).tolist()
    return kept


def greedy(lists: Lists, bound: int) -> list[int]:
    """In the order of the data."""
    of: dict[Any, int] = {}
    kept = []
    for record, names in enumerate(lists):
        if all(of.get(name, 0) < bound for name in names):
            of |= {name: of.get(name, 0) + 1 for name in names}
            kept.append(record)
    return kept


def most_of_one(lists: Lists, kept: Sequence[int]) -> int:
    names = [name for record in kept for name in set(lists[record])]
    return max(map(names.count, names), default=0)


def graphs() -> Iterator[tuple[Lists, int]]:
    generator = np.random.default_rng(0)
    for _ in range(40):
        people, records, bound = generator.integers(2, 7), generator.integers(1, 9), int(generator.integers(1, 4))
        sizes = generator.integers(1, min(4, people + 1), size=records)
        yield [generator.choice(people, size, replace=False).tolist() for size in sizes], bound


def test_nobody_has_more_than_g_and_nothing_that_has_room_is_left_out() -> None:
    """Against all choices there are: in a greedy one, a record keeps out as many others as it has owners, at most."""
    for lists, bound in graphs():
        kept = kept_of(lists, bound)
        assert most_of_one(lists, kept) <= bound
        for record in set(range(len(lists))) - {*kept}:
            assert most_of_one(lists, [*kept, record]) > bound
        choices = itertools.product([False, True], repeat=len(lists))
        allowed = ([record for record, taken in enumerate(choice) if taken] for choice in choices)
        best = max(len(some) for some in allowed if most_of_one(lists, some) <= bound)
        assert len(kept) <= best <= len(kept) * max(map(len, lists))


def test_who_owns_what_decides_and_nothing_else() -> None:
    for lists, bound in graphs():
        here = Dataset.from_dict({"users": lists, "text": ["so many words"] * len(lists)})
        there = Dataset.from_dict({"users": lists, "text": [""] * len(lists)})
        first, second = (groups_by(rows, "users", bound=bound) for rows in (here, there))
        assert first is not None
        assert second is not None
        assert first.records.tolist() == second.records.tolist() == kept_of(lists, bound)
        assert first.shared
        assert not first.differ(second)
        renamed = [[f"person {owner}" for owner in reversed(names)] for names in lists]
        twice = [[*names, names[0]] for names in renamed]
        assert kept_of(renamed, bound) == kept_of(twice, bound) == kept_of(lists, bound)


def test_lists_of_one_are_as_one_name() -> None:
    names = ["b", "a", "b", "c", "b", "a", "b"]
    alone, in_lists = (
        groups_by(Dataset.from_dict({"users": users}), "users", bound=2) for users in (names, [[n] for n in names])
    )
    assert alone is not None
    assert in_lists is not None
    assert sorted(alone.records.tolist()) == in_lists.records.tolist() == [0, 1, 2, 3, 5]
    assert in_lists.shared
    assert not alone.shared


CHAIN = [[owner, owner + 1] for owner in range(20)]  # 0 - 1 - 2 - ... - 20


@pytest.mark.parametrize(
    ("lists", "without"),
    [(CHAIN, CHAIN[1:]), ([[0], *CHAIN], [[1], *CHAIN[1:]])],
    ids=["without the one record of owner 0", "without the name of owner 0"],
)
def test_without_an_owners_edges_all_of_a_chain_may_change(lists: Lists, without: Lists) -> None:
    """Why neighbours have the same graph: at G = 1 an owner of one or two records decides over half of all records."""
    before, after = ({frozenset(some[record]) for record in kept_of(some, 1)} for some in (lists, without))
    assert len(before ^ after) >= 18
    plain = [{frozenset(some[record]) for record in greedy(some, 1)} for some in (CHAIN, CHAIN[1:])]
    assert not plain[0] & plain[1]  # in the order of the data each record that is kept is another


def made_up(kind: str) -> Lists:
    """20,000 chats of 3,000 people, two a chat on average and up to 8: of all alike; of some who are in far more than
    others; or, three to four a chat, each in one of 3,000 rooms, of which some have far more chats than others.
    """
    generator, shares = np.random.default_rng(0), np.arange(1, 3001) ** -0.8
    shares /= shares.sum()
    if kind == "rooms":
        rooms = [generator.choice(3000, generator.integers(2, 13), replace=False, p=shares) for _ in range(3000)]
        chosen = [rooms[room] for room in generator.choice(3000, 20_000, p=shares)]
        return [generator.permutation(room)[: 1 + generator.geometric(0.35)].tolist() for room in chosen]
    sizes = np.minimum(8, generator.geometric(0.5, 20_000))
    people = generator.choice(3000, (20_000, 8), p=None if kind == "even" else shares)
    return [sorted({*row[:size].tolist()}) for row, size in zip(people, sizes, strict=True)]


@pytest.mark.parametrize(("kind", "share", "of_data"), [("even", 48, 36), ("skewed", 30, 27), ("rooms", 12, 9)])
def test_the_order_keeps_more_than_that_of_the_data(kind: str, share: int, of_data: int) -> None:
    """In per cent, for G = 4: the figures of hf_dp/training/README.md."""
    lists = made_up(kind)
    kept, plain = kept_of(lists, 4), greedy(lists, 4)
    assert np.bincount([name for record in kept for name in lists[record]]).max() == 4
    assert (round(len(kept) / 200), round(len(plain) / 200)) == (share, of_data)


def test_of_an_owners_records_a_binomial_number_is_drawn() -> None:
    lists = [[0, 1], [0], [0, 2], [1, 2], [2], [3], [1], [0, 3]]
    groups = groups_by(Dataset.from_dict({"users": lists}), "users", bound=3)
    assert groups is not None
    draws, q = 4000, 0.3
    sampler = PoissonSampler(groups, q, draws, key=3)
    drawn = [{*draw} for draw in sampler]
    for owner in range(4):
        own = {record for record in groups.records.tolist() if owner in lists[record]}
        counts = np.bincount([len(own & draw) for draw in drawn], minlength=len(own) + 1)
        expected = stats.binom.pmf(np.arange(len(own) + 1), len(own), q) * draws
        low, high = stats.chi2.ppf([FALSE_ALARM, 1 - FALSE_ALARM], len(own))
        assert low < (np.square(counts - expected) / expected).sum() < high


# ---- what a column may hold ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "messages"),
    [
        ([["ann"], None, ["bob", None]], [r"2 records \(rows 1, 2, counted from 0\) have no value there"]),
        ([["ann"], [1.5, float("nan")]], [r"1 record \(row 1, counted from 0\) has no value there"]),
        ([["ann"], [], ["bob"], []], [r"2 records \(rows 1, 3, counted from 0\) have an empty list"]),
        ([["ann"], [["ann", "bob"]]], [r"1 record \(row 1, counted from 0\) has a list within a list"]),
        ([{"ann": 1}, ["ann", {"bob": 2}]], ["2 records .* or a mapping", "1 record .* has one value there"]),
        (
            [["ann"], "bob", "cid"],
            [r"2 records \(rows 1, 2, counted from 0\) have one value there where others have a"],
        ),
        (["['ann', 'bob']", '["ann", null]', "[deleted]", "[]"], [r"3 records \(rows 0, 1, 3, .* written like a list"]),
        ([["ann"], []] * 7, [r"7 records \(rows 1, 3, 5, 7, 9 and 2 more, counted from 0\) have"]),
        ([None, [], ["ann"], "bob", [["x"]]], ["row 0,", "row 1,", "row 3,", "row 4,"]),
        ([], ["no records"]),
    ],
)
def test_lists_that_do_not_say_whose_a_record_is(values: list[Any], messages: list[str]) -> None:
    for message in messages:
        with pytest.raises(ConfigError, match=message) as error:
            owners_of(values, "users")
        assert not any(name in str(error.value) for name in ("ann", "bob", "cid"))


def test_mixed_columns_of_json_are_refused_by_row() -> None:
    rows = Dataset.from_dict({"users": ["ann", ["ann", "bob"]]}, features=Features({"users": Json()}))
    with pytest.raises(ConfigError, match=r"1 record \(row 0, counted from 0\) has one value there"):
        groups_by(rows, "users", bound=1)


@pytest.mark.parametrize("most", [1, 8])
def test_lists_of_owners_need_a_bound_and_the_error_says_so(most: int) -> None:
    rows = Dataset.from_dict({"users": [["ann", "bob"], ["bob"]]})
    with pytest.raises(ConfigError, match="set contribution_bound=G, and leave records_per_unit out"):
        groups_by(rows, "users", most)


def test_two_spellings_of_a_name_are_one_owner() -> None:
    """An accent within a letter and behind it, as texts of different sources have it, in columns and in lists."""
    composed, apart = (unicodedata.normalize(form, "Ann\u00e9 \u00c5berg") for form in ("NFC", "NFD"))
    assert composed != apart
    names = [composed, apart, "Anne Aberg", composed]
    for feature in (Value("string"), Json()):
        rows = Dataset.from_dict({"users": names}, features=Features({"users": feature}))
        drawn, bounded = groups_by(rows, "users"), groups_by(rows, "users", bound=1)
        assert drawn is not None
        assert bounded is not None
        assert (drawn.num_groups, bounded.records.tolist()) == (2, [0, 2])
    assert kept_of([["x", composed], [apart]], 1) == [1]
    assert owners_of([[composed, apart], [apart]], "users").of_pairs.tolist() == [0, 0]
