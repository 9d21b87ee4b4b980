"""Cutting a logical batch: nothing lost, nothing twice, budgets kept; and the way through accelerate's loader."""

import pickle

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import find_batch_size, send_to_device
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset

from hf_dp.errors import CaptureError, ConfigError
from hf_dp.per_example.batches import MicroBatch
from hf_dp.sampling.compact import Narrow, Packed, narrowed, packed, unpacked
from hf_dp.sampling.microbatch import LogicalBatchCollator, feature_length, micro_batches, split, tokens_of_a_pass
from hf_dp.sampling.poisson import Draw, PoissonSampler
from hf_dp.sampling.reading import READ_AT_ONCE, DrawnRecords


@given(
    st.lists(st.integers(0, 40), max_size=50),
    st.integers(1, 9),
    st.none() | st.integers(1, 100),
    st.integers(0, 600),
)
def test_split_keeps_every_index_once_within_its_budgets(lengths, max_examples, max_tokens, pass_cost):
    groups = split(lengths, max_examples, max_tokens, pass_cost)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert 1 <= len(group) <= max_examples
        padded = len(group) * max(lengths[i] for i in group)
        assert max_tokens is None or padded <= max_tokens or len(group) == 1
    in_order = [lengths[i] for group in groups for i in group]
    assert in_order == sorted(lengths, reverse=True)


@given(
    st.lists(st.integers(0, 2000), max_size=9),
    st.integers(1, 6),
    st.none() | st.integers(1, 4000),
    st.sampled_from([0, 64, 512]),
)
def test_no_other_cut_of_the_sorted_examples_costs_less(lengths, max_examples, max_tokens, pass_cost):
    def cost(groups):
        return sum(tokens(len(group), max(lengths[i] for i in group)) + pass_cost for group in groups)

    def tokens(size, longest):
        return size * longest + (0 if size in (1, 2, 4, max_examples) else size * longest // 16)

    ordered = sorted(range(len(lengths)), key=lambda i: -lengths[i])

    def cuts(rest):
        if not rest:
            yield []
        for size in range(1, min(max_examples, len(rest)) + 1):
            if size == 1 or max_tokens is None or size * lengths[rest[0]] <= max_tokens:
                yield from ([rest[:size], *others] for others in cuts(rest[size:]))

    found = split(lengths, max_examples, max_tokens, pass_cost)
    assert cost(found) == min(map(cost, cuts(ordered)))


def test_split_in_small():
    assert split([3, 9, 5, 4, 1], 8, 10, 512) == [[1], [2, 3], [0, 4]]  # 9; 5 + 4 padded to 10; 3 + 1 padded to 6
    assert split([3, 9, 5, 4, 1], 2, None, 512) == [
        [1],
        [2, 3],
        [0, 4],
    ]  # three passes it takes; the single one is the longest
    assert split([10, 10, 2000, 10, 1990], 5, None, 512) == [
        [2, 4],
        [0, 1, 3],
    ]  # a pass of its own is less than 3 x 1,990 of padding
    assert split([], 3, 7, 512) == []


def test_more_and_smaller_passes_where_starting_one_is_cheap():
    lengths = [1 + (i * 37) % 100 for i in range(1000)]
    padded = [sum(len(g) * lengths[g[0]] for g in split(lengths, 64, None, cost)) for cost in (0, 64, 512)]
    assert padded[0] == sum(lengths) < padded[1] < padded[2]
    assert tokens_of_a_pass(torch.device("cpu")) < tokens_of_a_pass(torch.device("cuda"))


def test_sorting_by_length_saves_padding():
    lengths = [1 + (i * 37) % 100 for i in range(1000)]
    groups = split(lengths, 16, 800, 512)
    padded = sum(len(g) * lengths[g[0]] for g in groups)
    assert padded < 1.05 * sum(lengths)  # in the order given, groups of 16 pad to about twice the tokens


def test_a_few_long_records_do_not_pad_the_rest():
    lengths = [20] * 500 + [500, 400, 300, 250, 200, 150, 120, 100]
    groups = split(lengths, 64, 8192, 512)
    padded = sum(len(g) * lengths[g[0]] for g in groups)
    assert padded < 1.15 * sum(lengths)  # filled up from the front: 1.48 times
    assert len(groups) <= 10


@pytest.mark.parametrize("bounds", [(0, None), (1, 0), (-1, 5)])
def test_bounds_below_one_are_refused(bounds):
    with pytest.raises(ConfigError, match="micro-batch"):
        LogicalBatchCollator(list, *bounds)


def records(lengths):
    return [{"id": i, "input_ids": list(range(n)), "labels": [7] * n} for i, n in enumerate(lengths)]


def pad(features):
    features = [unpacked(f) for f in features]
    width = max(len(f["input_ids"]) for f in features)
    batch = {
        "id": torch.tensor([f["id"] for f in features]),
        "input_ids": torch.tensor([f["input_ids"] + [0] * (width - len(f["input_ids"])) for f in features]),
        "labels": torch.tensor([f["labels"] + [-100] * (width - len(f["labels"])) for f in features]),
    }
    return [MicroBatch(batch, len(features))]


def test_the_container_has_whole_micro_batches_and_no_top_level_labels():
    features = records([3, 9, 5, 4, 1])
    before = pickle.dumps(features)
    container = LogicalBatchCollator(pad, 8, 10)(Draw(features, 6))
    assert set(container) == {"micro_batches", "sizes", "draw_number"}
    assert container["sizes"] == [m.size for m in micro_batches(container)] == [1, 2, 2]
    assert container["draw_number"] == 6
    assert [m["id"].tolist() for m in micro_batches(container)] == [[1], [2, 3], [0, 4]]
    for micro_batch in micro_batches(container):
        for row, i in enumerate(micro_batch["id"].tolist()):
            assert micro_batch["input_ids"][row, : len(features[i]["input_ids"])].tolist() == features[i]["input_ids"]
    assert pickle.dumps(features) == before


def test_an_empty_draw_gives_an_empty_container():
    assert LogicalBatchCollator(pad, 8)([]) == {"micro_batches": [], "sizes": []}
    assert LogicalBatchCollator(pad, 8)(Draw([], 3)) == {"micro_batches": [], "sizes": [], "draw_number": 3}


@pytest.mark.parametrize("feature", [{"pixel_values": [1, 2, 3]}, ([1, 2], 3), 5])
def test_what_has_no_input_ids_counts_one(feature):
    assert feature_length(feature) == 1


def test_the_container_moves_to_a_device_as_any_batch():
    container = LogicalBatchCollator(pad, 2)(Draw(records([2, 3, 4]), 0))
    moved = send_to_device(container, "meta")
    assert type(moved) is dict
    assert [m["labels"].device.type for m in micro_batches(moved)] == ["meta", "meta"]
    assert moved["draw_number"] == 0


class RandomRecords:
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.rand(()).item()


def test_reading_and_collating_draw_from_secret_randomness_and_leave_the_public_generator_alone():
    def read(size):
        torch.manual_seed(42)
        batch = LogicalBatchCollator(lambda f: [MicroBatch({"x": f, "y": torch.rand(()).item()}, len(f))], 99)(
            DrawnRecords(RandomRecords()).__getitems__(range(size))
        )
        return [(b["x"], b["y"]) for b in batch["micro_batches"]], torch.rand(()).item()

    (three, after_three), (again, _), (five, after_five) = read(3), read(3), read(5)
    assert after_three == after_five  # the position would tell the size of the batch
    values = [v for ((read_values, collated),) in (three, again, five) for v in (*read_values, collated)]
    assert len(set(values)) == len(values)


class Numbers:
    """A data set of records of many lengths that knows its indices."""

    def __len__(self):
        return 50

    def __getitem__(self, index):
        return {"id": index, "input_ids": [1] * (1 + index % 7), "labels": [1] * (1 + index % 7)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("wrapped", [True, False])
def test_through_accelerates_loader_every_drawn_record_is_processed_once(workers, wrapped):
    """World 1, 2, 3; full, odd and (half of the time) empty batches; two iterations."""
    for world, rate in ((1, 1.0), (2, 0.3), (3, 0.014)):
        processed, drawn = [], []
        for rank in range(world):
            sampler = PoissonSampler(50, rate, 6, key=4, process_index=rank, num_processes=world)
            dataset = DrawnRecords(Numbers()) if wrapped else Numbers()
            collate = LogicalBatchCollator(pad, 4, 12)
            loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers)
            loader = prepare_data_loader(
                loader, "cpu", num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
            )
            batches = [*loader, *loader]
            assert len(loader) == 6
            assert [b.get("draw_number") for b in batches] == (list(range(12)) if wrapped else [None] * 12)
            processed.append([[i for m in micro_batches(b) for i in m["id"].tolist()] for b in batches])
            drawn = [sampler.draw(t).tolist() for t in range(12)]
        for t, kept in enumerate(drawn):
            assert sorted(i for rank in processed for i in rank[t]) == kept
        if rate < 0.1:
            assert [] in drawn


def test_accelerates_own_sharding_is_why_num_processes_is_one():
    sampler = PoissonSampler(50, 0.3, 6, key=4)
    loader = DataLoader(DrawnRecords(Numbers()), batch_sampler=sampler, collate_fn=LogicalBatchCollator(pad, 4))
    sharded = prepare_data_loader(
        loader, "cpu", num_processes=2, process_index=0, put_on_device=True, dispatch_batches=False
    )
    assert [batch["draw_number"] for batch in sharded] == [0, 2, 4]  # every other draw: each step would be half of two


def test_accelerate_cannot_dispatch_an_empty_container_which_is_why_dispatch_is_off():
    with pytest.raises(ValueError, match="empty"):
        find_batch_size(LogicalBatchCollator(pad, 4)([]))


@pytest.mark.parametrize(
    "record",
    [
        {"input_ids": [3, 70_000, 0, -100], "labels": [1, 2], "name": "a", "weight": 0.5},
        {"input_ids": [1 << 40, 2], "labels": 3},  # more than 32 bits
        {"input_ids": [], "mask": [True, False], "x": [0.5, 1], "boxes": [[1, 2], [3, 4]]},
        (1, 2),
        "text",
    ],
)
def test_what_was_packed_comes_out_again(record):
    out = unpacked(packed(record))
    assert out == record
    assert repr(out) == repr(record)  # types too
    assert feature_length(packed(record)) == feature_length(record)


@given(
    st.lists(
        st.sampled_from([0, 1, -100, 255, 256, 32767, 32768, -32768, -32769, 2**31 - 1, 2**31, -(2**31), -(2**63)]),
        max_size=4,
    )
)
def test_what_was_narrowed_comes_out_again(values):
    """Every width's ends, and what lies one beyond them."""
    batch = {
        "input_ids": torch.tensor(values, dtype=torch.int64),
        "mask": torch.tensor([True]),
        "x": torch.tensor([0.5]),
        "name": "a",
    }
    (out,) = micro_batches({"micro_batches": [narrowed(batch)], "sizes": [1]})
    assert list(out) == list(batch)
    assert out["input_ids"].dtype == torch.int64
    assert out["input_ids"].tolist() == values
    assert all(out[name] is batch[name] for name in ("mask", "x", "name"))


def test_what_waits_for_its_turn_takes_the_least_bytes_that_hold_it():
    batch = {
        "input_ids": torch.tensor([[3, 40_000]]),
        "labels": torch.tensor([[-100, 5]]),
        "mask": torch.tensor([[1, 0]]),
    }
    kept = {name: v.values.dtype for name, v in narrowed(batch).items() if isinstance(v, Narrow)}
    assert kept == {"input_ids": torch.int32, "labels": torch.int16, "mask": torch.uint8}


def test_a_draw_is_read_piece_by_piece_packed_and_collated_as_it_was(monkeypatch):
    rows = [{"input_ids": [i] * (1 + i % 7)} for i in range(3 * READ_AT_ONCE)]
    pieces, fetch = [], Dataset.__getitems__
    monkeypatch.setattr(Dataset, "__getitems__", lambda own, piece: pieces.append(len(piece)) or fetch(own, piece))
    drawn = Draw(range(2 * READ_AT_ONCE + 5), 4)
    read = DrawnRecords(Subset(Dataset.from_list(rows), range(len(rows)))).__getitems__(drawn)
    assert pieces == [READ_AT_ONCE, READ_AT_ONCE, 5]
    assert all(isinstance(r["input_ids"], Packed) for r in read)
    container = LogicalBatchCollator(lambda f: [MicroBatch({"rows": list(map(unpacked, f))}, len(f))], 64)(read)
    assert container["draw_number"] == 4
    collated = [r for batch in micro_batches(container) for r in batch["rows"]]
    assert sorted(map(str, collated)) == sorted(str(rows[i]) for i in drawn)


@pytest.mark.parametrize("kind", ["list", "transform", "subset", "own"])
def test_a_data_set_that_gives_several_records_or_none_for_an_index_fails_the_step_that_drew_it(kind):
    table = Dataset.from_dict({"tokens": [[1, 2], [3, 4, 5, 6, 7], [8], []]})

    def chunk(columns):
        return {"input_ids": [ids[i : i + 2] for ids in columns["tokens"] for i in range(0, len(ids), 2)]}

    class Own:
        def __getitems__(self, indices):
            return [{"input_ids": [1]} for i in indices for _ in range((1, 3, 1, 0)[i])]

    view = {"list": table, "transform": table.with_transform(chunk), "own": Own()}.get(kind)
    view = Subset(table.with_transform(chunk), range(4)) if view is None else view
    drawn = {
        indices: LogicalBatchCollator(lambda f: [MicroBatch({"n": f}, len(f))], 8, length_of=lambda f: 1)(
            DrawnRecords(view, 4).__getitems__(Draw(indices, 3))
        )
        for indices in ((0, 2), (0, 1), (0, 1, 3), (3,))
    }
    assert [b.size for b in micro_batches(drawn[0, 2])] == [2]
    for indices in ((0, 1), (0, 1, 3), (3,)):
        if kind == "list":
            assert [b.size for b in micro_batches(drawn[indices])] == [len(indices)]
        else:  # three rows of one record and none of another are as many as were asked for
            with pytest.raises(CaptureError, match=r"one for one index.*The step is charged, nothing was released"):
                list(micro_batches(drawn[indices]))


@pytest.mark.parametrize("where", ["reading", "collating"])
def test_a_record_that_fails_fails_its_step_and_is_not_quoted(where):
    class Records:
        def __getitem__(self, index):
            if where == "reading" and index == 1:
                raise KeyError("the patient's name")
            return {"input_ids": [index]}

    def collate(features):
        if any(f["input_ids"][0] == 1 for f in features):
            raise ValueError(f"cannot take {unpacked(features[0])}: the patient's name")
        return [MicroBatch({"x": torch.zeros(len(features), 1)}, len(features))]

    cut, records = LogicalBatchCollator(collate, 2), DrawnRecords(Records(), 9)
    assert sum(b.size for b in micro_batches(cut(records.__getitems__(Draw([0, 2, 3], 5))))) == 3
    container = cut(records.__getitems__(Draw([0, 1, 2], 6)))
    assert container["draw_number"] == 6
    with pytest.raises(CaptureError, match=r"(KeyError|ValueError) in test_microbatch\.py, line \d+.*charged") as error:
        list(micro_batches(container))
    assert "patient" not in str(error.value)


def test_a_record_without_tokens_counts_as_drawn_and_is_in_no_micro_batch():
    container = LogicalBatchCollator(pad, 2)(Draw(records([0, 3, 0, 2, 4]), 1))
    assert [m["id"].tolist() for m in micro_batches(container)] == [[4], [1, 3]]
    assert container["sizes"] == [1, 2]
    assert LogicalBatchCollator(pad, 2)(Draw(records([0, 0]), 2)) == {
        "micro_batches": [],
        "sizes": [],
        "draw_number": 2,
    }
