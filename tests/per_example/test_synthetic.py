"""Made-up records have the types of a record's columns, and nothing of its values."""

import datetime
import decimal
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_dp.errors import ConfigError
from hf_dp.per_example import synthetic_records


def made(record: dict[str, Any], **k: Any) -> list[dict[str, Any]]:
    return synthetic_records(record, **{"vocab_size": 97, "label_values": 5, **k})


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("system", "user", "tool"), texts, strict=False)]


# two records of each schema
SCHEMAS: dict[str, tuple[Any, Any]] = {
    "tokens": ([5, 6], [9]),
    "text": ("a secret", "b"),
    "bytes": (b"a secret", b"b"),
    "messages": (chat("a", "b"), chat("a secret", "another", "third")),
    "nested": ({"text": "a", "more": {"n": 3}}, {"text": "b c", "more": {"n": 4}}),
    "audio": ({"array": np.ones(9), "sampling_rate": 8000}, {"array": np.zeros(70), "sampling_rate": 16000}),
    "choices": ([[5, 6], [7]], [[9], [10, 11, 12], [13]]),
    "when": (datetime.datetime(2026, 1, 2), datetime.datetime(1999, 1, 2)),
    "day": (datetime.date(2026, 1, 2), datetime.date(1999, 1, 2)),
    "took": (datetime.timedelta(3), datetime.timedelta(4)),
    "price": (decimal.Decimal("3.50"), decimal.Decimal("8")),
    "picture": (Image.new("L", (4, 6), 7), Image.new("L", (4, 6), 9)),
    "pictures": ([Image.new("RGB", (4, 6), 7)] * 2, [Image.new("RGB", (4, 6), 9)] * 3),
    "tensor": (torch.ones(3), torch.zeros(8)),
    "nothing": (None, None),
}


def plain(value: Any) -> Any:
    """A value that can be compared."""
    if isinstance(value, dict):
        return {name: plain(member) for name, member in value.items()}
    if isinstance(value, list):
        return [plain(member) for member in value]
    return np.asarray(value).tolist() if isinstance(value, (torch.Tensor, np.ndarray, Image.Image)) else value


@pytest.mark.parametrize("name", SCHEMAS)
def test_values_and_lengths_are_not_those_of_the_record(name: str) -> None:
    one, other = (made({name: value}) for value in SCHEMAS[name])
    assert plain(one) == plain(other)
    assert {type(record[name]) for record in one} == {type(SCHEMAS[name][0])}


def test_what_is_made_up_fits_its_purpose() -> None:
    record = {name: value for name, (value, _) in SCHEMAS.items()}
    for one, length in zip(made(record), (5, 9, 7), strict=True):
        assert len(one["tokens"]) == len(one["text"].split()) == len(one["messages"][0]["content"].split()) == length
        assert [message["role"] for message in one["messages"]] == ["user", "assistant"]
        assert one["audio"]["sampling_rate"] == 16_000
        assert len(one["audio"]["array"]) == 400 * length
        assert [len(choice) for choice in one["choices"]] == [length, length]
        assert (one["picture"].size, one["picture"].mode) == ((4, 6), "L")


def test_labels_are_below_the_number_of_classes_and_others_0_or_1() -> None:
    records = made({"labels": [7] * 3, "next_sentence_label": 9, "start_positions": 3}, lengths=range(1, 60))
    assert {label for one in records for label in one["labels"]} == set(range(5))
    assert {one["next_sentence_label"] for one in records} == {0, 1}
    assert all(one["start_positions"] < length for one, length in zip(records, range(1, 60), strict=True))


def test_what_cannot_be_made_up_is_named() -> None:
    with pytest.raises(ConfigError, match=r"columns a \(object\), c \(dict\), d \(list\): .*check_records="):
        made({"a": object(), "b": 1, "c": {"x": object()}, "d": [object()]})
