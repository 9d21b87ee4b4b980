"""A record's row is what the collator makes of it alone; where rows do not stack, each record has a pass of its own."""

import copy
import random

import pytest
import torch
from torch.utils.data import default_collate
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from hf_dp.errors import CaptureError, ConfigError
from hf_dp.per_example.batches import MicroBatch, Untied, leaves, same, stacked
from hf_dp.sampling.collation import Collation
from hf_dp.sampling.compact import packed
from tests.support import runs


def tokens(*lengths):
    return [
        {"input_ids": list(range(7 * i + 3, 7 * i + 3 + n)), "attention_mask": [1] * n, "labels": [5 + i] * n}
        for i, n in enumerate(lengths)
    ]


MADE_UP = tokens(5, 9, 7, 1, 30)


def of(batches):
    """How many examples each has, and which: their first token."""
    return [(b.size, b["input_ids"][:, 0].tolist()) for b in batches]


def left(records):
    width = max(len(r["input_ids"]) for r in records)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {k: torch.tensor([[v] * (width - len(r[k])) + list(r[k]) for r in records]) for k, v in fill.items()}


def nested(records):
    batch = runs.collate(records)
    texts = [str(r["input_ids"][0]) for r in records]
    return {**batch, "more": {"sides": [batch["labels"], batch["input_ids"] * 2], "texts": texts}, "return_loss": True}


@pytest.mark.parametrize("collate", [runs.collate, left, nested], ids=["right", "left", "nested"])
def test_records_are_stacked_as_the_collator_stacks_them(collate):
    collation = Collation(collate, MADE_UP)
    assert collation.apart is None
    records = tokens(4, 11, 2, 11)
    (made,) = collation([packed(r) for r in records])
    assert made.size == 4
    assert same(made, collate(records))
    for part in (made.rows(slice(1, 3)), made.first(3), made.first(5)):
        assert all(len(leaf) == part.size for path, leaf in leaves(part).items() if path != ("return_loss",))


def test_rows_of_nested_members_belong_to_their_records():
    (made,) = Collation(nested, MADE_UP)(tokens(4, 11, 2))
    part = made.rows(slice(1, 3))
    assert part.size == 2
    assert part["more"]["texts"] == ["10", "17"]
    assert part["more"]["sides"][1][:, 0].tolist() == [20, 34]


def mixed(records):
    """MixUp."""
    batch = runs.collate(records)
    return {**batch, "input_ids": (batch["input_ids"] + batch["input_ids"].flip(0)) // 2}


def normalised(records):
    """Over the padding, as an audio processor may."""
    width = max(len(r["input_ids"]) for r in records)
    x = torch.tensor([r["input_ids"] + [0] * (width - len(r["input_ids"])) for r in records], dtype=torch.float32)
    return {"input_ids": (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True, correction=0) + 1)}


def negatives(records):
    """The next record as a negative."""
    batch = runs.collate(records)
    return {**batch, "negative_ids": batch["input_ids"].roll(1, 0)}


def counted(records):
    return {**runs.collate(records), "num_items": sum(len(r["labels"]) for r in records)}


def flat(records):
    """All tokens in one row."""
    return {"input_ids": torch.tensor([[t for r in records for t in r["input_ids"]]])}


def dropped(records):
    """Of several, the shortest is left out."""
    longest = sorted(records, key=lambda r: -len(r["input_ids"]))
    return runs.collate(longest[: max(1, len(records) - 1)])


COUPLED = [mixed, normalised, negatives, counted, flat, dropped]


@pytest.mark.parametrize("collate", COUPLED)
def test_what_makes_something_else_of_several_records_gets_one_at_a_time(collate):
    collation = Collation(collate, MADE_UP)
    assert collation.apart is not None
    records = tokens(4, 11, 2)
    made = collation(records)
    assert [b.size for b in made] == [1, 1, 1]
    for batch, record in zip(made, records, strict=True):
        assert same(batch, collate([record]))
    whole, *alone = collation.together_and_alone(MADE_UP)
    assert same(whole, alone[0])
    assert len(alone) == len(MADE_UP)


@pytest.mark.parametrize("collate", COUPLED)
def test_a_row_does_not_change_with_the_other_records(collate):
    """For any micro-batch: with made-up records that are alike, the check would miss half of the coupling."""
    collation = Collation(collate, tokens(1, 1, 1))
    one, *others = records = tokens(4, 11, 2, 4)
    for group in (records, [one], [one, others[1]]):
        made = collation(copy.deepcopy(group))
        first = next(batch for batch in made if batch["input_ids"].flatten()[0] == made[0]["input_ids"].flatten()[0])
        alone = leaves(collate([one]))
        for path, leaf in leaves(first.rows(slice(0, 1))).items():
            if isinstance(leaf, torch.Tensor):
                n = alone[path].shape[1]
                assert same(leaf[:, :n], alone[path])


def test_masks_that_a_collator_draws_are_drawn_for_each_record_and_compared_by_what_fills_them_up():
    def masking(records):
        batch = runs.collate(records)
        hit = (torch.rand(batch["input_ids"].shape) < 0.5) & (batch["attention_mask"] == 1)
        labels = torch.where(hit, batch["input_ids"], -100)
        return {**batch, "input_ids": batch["input_ids"].masked_fill(hit, 1), "labels": labels}

    collation = Collation(masking, MADE_UP)
    assert collation.apart is None
    (made,) = collation(tokens(4, 11, 2))
    assert made.size == 3
    assert made["labels"][0, 4:].unique().tolist() == [-100]
    assert made["attention_mask"].sum(1).tolist() == [4, 11, 2]
    whole, *alone = collation.together_and_alone(MADE_UP)
    for row, one in enumerate(alone):
        assert torch.equal(whole["input_ids"][row, : one["input_ids"].shape[1]], one["input_ids"][0])  # drawn once


def windows(records):
    return runs.collate(
        [{k: v[i : i + 12] for k, v in r.items()} for r in records for i in range(0, len(r["labels"]), 12)]
    )


def views(records):
    return runs.collate([r for record in records for r in (record, record)])


def none_of_long(records):
    kept = [r for r in records if len(r["labels"]) < 20]
    return runs.collate(kept) if kept else {"labels": torch.zeros(0, 1)}


@pytest.mark.parametrize("collate", [windows, views, none_of_long])
def test_several_rows_of_a_record_or_none_are_refused_before_the_first_step_and_fail_a_later_one(collate):
    with pytest.raises(ConfigError, match=r"(several rows|no row) of one record: .*unit_column"):
        Collation(collate, MADE_UP)
    if collate is not views:  # seen in no made-up record
        collation = Collation(collate, tokens(5, 9, 7))
        assert of(collation(tokens(4, 10))) == [(2, [3, 10])]
        with pytest.raises(CaptureError, match=r"(several rows|no row) of one record") as error:
            collation(tokens(4, 29))
        assert "29" not in str(error.value)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"[PAD]": 0, "a": 1}, unk_token="[PAD]")), pad_token="[PAD]"
    )


@pytest.mark.parametrize("kind", ["pad", "lm", "s2s", "tags", "default", "torch"])
def test_known_collators_get_several_records_at_once_and_no_coupled_one(kind, tokenizer):
    collate, made_up = {
        "pad": (DataCollatorWithPadding(tokenizer), [{**r, "labels": 1} for r in MADE_UP]),
        "lm": (DataCollatorForLanguageModeling(tokenizer, mlm=False), [{"input_ids": r["input_ids"]} for r in MADE_UP]),
        "s2s": (DataCollatorForSeq2Seq(tokenizer), MADE_UP),
        "tags": (DataCollatorForTokenClassification(tokenizer), MADE_UP),
        "default": (default_data_collator, [{"x": [1.0, i], "label": i} for i in range(3)]),
        "torch": (default_collate, [(torch.ones(3) * i, i) for i in range(3)]),
    }[kind]
    collation, asked = Collation(collate, made_up), []
    assert collation.apart is None
    collation._collate = lambda records: asked.append(len(records)) or collate(records)
    (made,) = collation([packed(r) for r in copy.deepcopy(made_up)])
    assert asked == [len(made_up)]
    assert made.size == len(made_up)
    assert sum(b.size for b in collation(copy.deepcopy(made_up[:1]))) == 1


def test_records_of_other_columns_or_types_are_not_collated_together():
    """The first record's columns and types are those of the batch in transformers' own collator."""
    collation = Collation(default_data_collator, [{"x": [1.0, 2.0], "label": i} for i in range(3)])
    one = {"x": [1.0, 2.0], "label": 2}
    for other in (
        {"x": [1.0, 2.0], "label": 0.5},
        {"x": [1.0, 2.0]},
        {"x": [1, 2], "label": 1},
        {"x": [1.0, 2.0], "label": None},
    ):
        for group in ([one, other], [other, one]):
            made = collation(copy.deepcopy(group))
            assert [b.size for b in made] == [1, 1]
            mine = made[group.index(one)]
            assert same(mine, default_data_collator([one]))
    assert [b.size for b in collation([one, {"x": [3.0, 4.0], "label": 1}])] == [2]


def test_random_trees_stack_to_what_each_record_has_and_nothing_else():
    """Every value of a record stands in its row, among fillers; what can't be tied to records is no row of a batch."""
    generator = random.Random(1)
    for _ in range(60):
        names, number = generator.sample("abcdef", 3), generator.randint(2, 5)
        dims = {name: generator.randint(0, 2) for name in names}
        alone = [
            {n: {"x": [torch.full((1, *(generator.randint(1, 4) for _ in range(dims[n]))), i + 1.0)]} for n in names}
            for i in range(number)
        ]
        side = generator.choice(["right", "left"])
        made = stacked(alone, paddings(names, side))
        for i in range(number):
            one = made.rows(slice(i, i + 1))
            for n in names:
                values = one[n]["x"][0]
                assert set(values.unique().tolist()) <= {i + 1.0, -7.0}
                assert int((values == i + 1.0).sum()) == alone[i][n]["x"][0].numel()
        alone[0][names[0]]["x"][0] = torch.ones(generator.choice([0, 2, 3]), *alone[0][names[0]]["x"][0].shape[1:])
        with pytest.raises(Untied):
            stacked(alone, paddings(names, side))


def paddings(names, side):
    from hf_dp.per_example.batches import Padding

    return {(n, "x", 0): Padding(-7.0, side) for n in names}


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.ones(1, 2, dtype=torch.float64)},
        {"x": torch.ones(1, 3)},
        {"x": torch.ones(2)},
        {"x": torch.ones(1, 2), "y": 1},
        {"x": [torch.ones(1, 2)]},
        {"x": 3},
        {"x": ["a", "b"]},
    ],
)
def test_what_differs_in_kind_type_or_size_is_not_stacked(other):
    with pytest.raises(Untied):
        stacked([{"x": torch.ones(1, 2)}, other], {})
    assert stacked([other], {}).size == 1


def test_records_that_a_collator_cannot_take_are_one_error_with_the_remedy():
    for collate in (lambda r: r[0]["messages"], lambda r: 1 / 0, lambda r: {"input_ids": torch.zeros(1, 0)}):
        with pytest.raises(ConfigError, match="check_records"):
            Collation(collate, MADE_UP)


def test_check_records_of_one_length_are_cut_so_that_padding_is_seen():
    collation = Collation(left, tokens(8, 8))
    assert collation.apart is None
    assert len(collation.tried) == 4
    (made,) = collation(tokens(3, 5))
    assert same(made, left(tokens(3, 5)))
    fixed = Collation(default_collate, [(torch.ones(4), 1)] * 3)  # which takes no shorter ones: they are let be
    assert fixed.apart is None
    assert len(fixed.tried) == 3


def test_records_without_tokens_are_in_no_micro_batch():
    def of_texts(records):
        width = max(len(r["text"]) for r in records)
        return {"input_ids": torch.tensor([[ord(c) for c in r["text"].ljust(width)] for r in records])}

    collation = Collation(of_texts, [{"text": t} for t in ("ab", "abcd", "a")])
    assert of(collation([{"text": "x"}, {"text": ""}, {"text": "yz"}])) == [(2, [120, 121])]
    assert collation([{"text": ""}]) == []


def test_a_micro_batch_keeps_its_size_through_changes():
    batch = MicroBatch({"x": torch.ones(3, 2), "n": 4}, 3).mapped(lambda b: {**b, "x": b["x"] * 2})
    assert (batch.size, batch["n"], float(batch["x"].sum())) == (3, 4, 12.0)
    assert batch.rows(slice(0, 3)) is batch
    assert batch.rows(slice(2, 9)).size == 1
