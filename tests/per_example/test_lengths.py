"""Which records may share a pass, by their lengths: each length relies on comparisons on both of its sides."""

import pickle
from collections.abc import Sequence

import pytest
import torch

from hf_dp.per_example import ComparedLengths, MicroBatch
from hf_dp.per_example.lengths import steps_up_to
from hf_dp.per_example.trace import Trace


def batch(*lengths: int, other: int = 3) -> MicroBatch:
    width = max(lengths)
    return MicroBatch(
        {"input_ids": torch.zeros(len(lengths), width), "picture": torch.zeros(len(lengths), other)}, len(lengths)
    )


def made(lengths: tuple[int, int]) -> Sequence[MicroBatch]:
    return [batch(*lengths), *(batch(n) for n in lengths)]


class Asked:
    """Finds passes of `wrong` tokens wrong, and notes what was compared."""

    def __init__(self, wrong: range = range(0)) -> None:
        self.wrong = wrong
        self.widths: list[int] = []

    def __call__(self, batches: Sequence[MicroBatch]) -> bool:
        self.widths.append(batches[0]["input_ids"].shape[1])
        return self.widths[-1] not in self.wrong


def test_steps_double() -> None:
    assert steps_up_to(40) == [1, 2, 3, 4, 5, 9, 16, 32, 40]
    assert steps_up_to(16) == [1, 2, 3, 4, 5, 9, 16]
    assert steps_up_to(8) == [1, 2, 3, 4, 5, 8]
    assert steps_up_to(1) == [1]


@pytest.mark.parametrize(("width", "steps"), [(1, [1]), (16, [16]), (12, [9, 16]), (17, [16, 32]), (40, [32, 64])])
def test_a_length_relies_on_the_steps_on_both_of_its_sides_compared_once(width: int, steps: list[int]) -> None:
    asked = Asked()
    compared = ComparedLengths(made, asked, batch(9, 5, other=8), longest=1_000)
    for _ in range(2):
        assert compared(batch(width, 1))
    assert sorted(asked.widths) == steps


def test_between_a_step_that_is_wrong_and_one_that_is_right_nothing_is_shared() -> None:
    compared = ComparedLengths(made, Asked(range(20, 1_000)), batch(9, 5), longest=1_000)
    assert [n for n in range(1, 50) if compared(batch(n, 1))] == list(range(1, 17))


def test_sizes_that_were_compared_need_nothing_and_others_of_a_fixed_size_neither() -> None:
    asked = Asked()
    compared = ComparedLengths(made, asked, batch(12, 5), longest=1_000)
    assert compared(batch(12, 12))
    assert asked.widths == []
    assert compared(batch(12, 3, other=7))
    assert sorted(asked.widths) == [9, 16]


def nothing_done(batch: MicroBatch) -> Trace:
    return Trace()


def test_other_sizes_than_a_length_explains_are_compared_themselves_once() -> None:
    asked = Asked()
    compared = ComparedLengths(made, asked, batch(9, 5), trace=nothing_done)
    for _ in range(2):
        assert compared(batch(12, 5, other=7))
    assert sorted(asked.widths) == [12, 16]
    assert not ComparedLengths(made, Asked(range(12, 13)), batch(9, 5), trace=nothing_done)(batch(12, 5, other=7))


@pytest.mark.parametrize("more", [{"mode": "x"}, {"weight": torch.ones(2)}, {"picture": torch.zeros(2, 3).double()}])
def test_other_members_types_or_settings_than_made_up_records_have_share_nothing(more: dict[str, object]) -> None:
    compared = ComparedLengths(made, Asked(), batch(9, 5))
    assert compared(batch(9, 5))
    assert not compared(MicroBatch({**batch(9, 5), **more}, 2))


def test_longer_ones_than_a_model_takes_rely_on_the_longest_that_it_takes() -> None:
    asked = Asked()
    assert ComparedLengths(made, asked, batch(9, 5), longest=20)(batch(25, 3))
    assert asked.widths == [20]


def test_a_length_on_which_the_model_fails_is_not_shared() -> None:
    def fails(batches: Sequence[MicroBatch]) -> bool:
        raise RuntimeError("too short for a convolution")

    assert not ComparedLengths(made, fails, batch(9, 5))(batch(12, 3))


def test_records_that_cannot_be_made_up_share_nothing_and_what_is_cut_to_a_length_comes_to_an_end() -> None:
    def short_ones(lengths: tuple[int, int]) -> Sequence[MicroBatch]:
        if max(lengths) > 10:
            raise ValueError("too long")
        return made(lengths)

    compared = ComparedLengths(short_ones, Asked(), batch(9, 5), longest=1_000)
    assert [n for n in (7, 9, 12, 40) if compared(batch(n, 1))] == [7, 9]

    asked = Asked()
    cut = lambda lengths: made(tuple(min(n, 600) for n in lengths))  # noqa: E731
    assert ComparedLengths(cut, asked, batch(9, 5))(batch(700, 1))
    assert asked.widths == [600]


def test_records_that_only_go_together_at_one_length_are_compared_at_one() -> None:
    def of_one_length(lengths: tuple[int, int]) -> Sequence[MicroBatch]:
        alone = [batch(n) for n in lengths]
        return [batch(*lengths) if len(set(lengths)) == 1 else alone[0], *alone]

    asked = Asked()
    assert ComparedLengths(of_one_length, asked, batch(9, 9))(batch(16, 16))
    assert asked.widths == [16]


def test_up_to_a_size_every_step_below_counts() -> None:
    asked = Asked(range(16, 17))
    assert not ComparedLengths(made, asked, batch(9, 5))(batch(16, 4))
    assert ComparedLengths(made, Asked(), batch(9, 5)).up_to(batch(33, 2))
    assert not ComparedLengths(made, asked, batch(9, 5)).up_to(batch(33, 2))

    def fails_on_16(batches: Sequence[MicroBatch]) -> bool:
        return bool(1 / (batches[0]["input_ids"].shape[1] - 16))

    assert ComparedLengths(made, fails_on_16, batch(9, 5)).up_to(batch(33, 2))
    assert not ComparedLengths(made, fails_on_16, batch(9, 5))(batch(16, 1))


def test_a_micro_batch_keeps_its_records_in_parts_and_on_the_way_from_a_worker() -> None:
    whole = MicroBatch({"x": torch.zeros(3, 2)}, 3, ["a", "b", "c"])
    part = whole.rows(slice(1, 3)).mapped(lambda b: b)
    assert part.records == ["b", "c"]
    assert pickle.loads(pickle.dumps(part)).records == ["b", "c"]
