"""The columns of one record -> made-up records of chosen lengths, on which checks run: so nothing depends on private
ones.

Only the record's *schema* is used: names and types of columns, and which of them are sequences. Values and lengths come
from a fixed generator and the model's public sizes.
"""

import datetime
import decimal
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from hf_dp.errors import ConfigError
from hf_dp.per_example.batches import Leaf, Record

WORDS = ("alpha", "beta", "gamma", "delta", "omega")
LENGTHS = (5, 9, 7)
MANY = 512  # tokens, where a model's config does not say how many it takes


def longest_taken(model: Leaf) -> int | None:
    """How many tokens a model's config has positions for, or None. (XLNet's config says -1: any number.)"""
    config = getattr(model, "config", None)
    found = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


PARTS = 2  # messages of a chat, choices, pictures of a record
ROLES = ("user", "assistant")
RATE = 16_000  # samples a second, as most models of speech have it
FIXED: dict[type, Leaf] = {  # of types beside what is trained on
    datetime.datetime: datetime.datetime(2000, 1, 1),
    datetime.date: datetime.date(2000, 1, 1),
    datetime.time: datetime.time(0),
    datetime.timedelta: datetime.timedelta(0),
    decimal.Decimal: decimal.Decimal("0.5"),
}
SAMPLES = 400  # of sound, where a text would have a token: what reads waveforms takes windows of hundreds


def synthetic_records(
    record: dict[str, Leaf],
    *,
    vocab_size: int,
    label_values: int,
    lengths: Sequence[int] = LENGTHS,
    end: int | None = None,
) -> list[dict[str, Leaf]]:
    """One made-up record for each length, with the columns and types of `record`.

    Args:
        record: one record as the data set returns it; only its schema is used.
        vocab_size: token ids are drawn below it (public).
        label_values: labels are drawn below it: the number of classes, or the vocabulary's size for a language model.
        lengths: number of tokens in each record's sequences.
        end: the token that ends a text, or None. If given, `input_ids` have it once, at the end; some models pool
            there.

    Raises:
        ConfigError: a column of a type that cannot be made up; names all of them.
    """
    generator = np.random.default_rng(0)
    unknown = [f"{name} ({type(value).__name__})" for name, value in record.items() if not _known(value)]
    if unknown:
        raise ConfigError(
            f"cannot make up values for the columns {', '.join(unknown)}: let the dataset return tensors, numbers, "
            "strings, pictures or lists of them, or pass check_records=[...], a few public records for the self-check"
        )
    made = [_Maker(generator, length, vocab_size, label_values).of_record(record) for length in lengths]
    return made if end is None else [_ended(one, end) for one in made]


def _ended(record: dict[str, Leaf], end: int) -> dict[str, Leaf]:
    """The record, with `end` once in its `input_ids`, at the end, if these are a row of tokens."""
    ids = record.get("input_ids")
    if not isinstance(ids, (list, torch.Tensor, np.ndarray)) or np.ndim(ids) != 1:
        return record
    others = [int(token) + (int(token) == end) for token in ids[:-1]]
    ended = [*others, end]
    return {**record, "input_ids": ended if isinstance(ids, list) else _like_values(ids, ended)}


def _like_values(like: Leaf, values: list[int]) -> Leaf:
    return torch.tensor(values, dtype=like.dtype) if isinstance(like, torch.Tensor) else np.asarray(values, like.dtype)


def records_of_the_same_shape(record: Record, count: int = 3) -> list[Record]:
    """Made-up records with the tensors, arrays and numbers of `record`, each in its own shape and type.

    Real numbers are normal; whole numbers are 0 or 1, which every table of classes or tokens has. Only shapes and types
    of the record are used.

    Raises:
        ConfigError: a member of a type that cannot be made up.
    """
    generator = np.random.default_rng(0)
    return [_like(record, generator) for _ in range(count)]


def _like(value: Leaf, generator: np.random.Generator) -> Leaf:
    if isinstance(value, dict):
        return {name: _like(member, generator) for name, member in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_like(member, generator) for member in value)
    if isinstance(value, torch.Tensor):
        shape, real = tuple(value.shape), value.is_floating_point()
    elif isinstance(value, (np.ndarray, np.generic, bool, int, float)):
        shape, real = np.shape(value), np.asarray(value).dtype.kind == "f"
    else:
        raise ConfigError(
            f"cannot make up a {type(value).__name__} for the self-check: let the data set return tensors and numbers, "
            "or pass check_records=[...], a few public records"
        )
    made = np.asarray(generator.standard_normal(shape) if real else generator.integers(2, size=shape))
    if isinstance(value, torch.Tensor):
        return torch.from_numpy(made).to(value.dtype)
    return made.astype(value.dtype) if isinstance(value, np.ndarray) else np.asarray(value).dtype.type(made).item()


def _known(value: Leaf) -> bool:
    if isinstance(value, (dict, list, tuple)):
        return all(map(_known, value.values() if isinstance(value, dict) else value))
    plain = (torch.Tensor, np.ndarray, np.generic, str, bytes, bool, int, float)
    return value is None or isinstance(value, plain) or type(value) in FIXED or _is_picture(value)


def _is_picture(value: Leaf) -> bool:
    return type(value).__module__.partition(".")[0] == "PIL"


class _Maker(NamedTuple):
    """Makes up values of one record.

    Attributes:
        generator: all values come from it.
        length: number of tokens.
        vocab_size: token ids are below it.
        label_values: the labels are below it; other columns named so, such as `next_sentence_label`, are 0 or 1.
    """

    generator: np.random.Generator
    length: int
    vocab_size: int
    label_values: int

    def of_record(self, record: dict[str, Leaf]) -> dict[str, Leaf]:
        """A made-up record, or a mapping in one, with the names and types of `record`."""
        return {name: self.value(name, like) for name, like in record.items()}

    def value(self, name: str, like: Leaf) -> Leaf:
        """A value of the type of `like`, for a column `name`."""
        if isinstance(like, torch.Tensor):
            return torch.as_tensor(self.value(name, like.numpy())).to(like.dtype)
        if like is None or type(like) in FIXED:
            return None if like is None else FIXED[type(like)]
        if isinstance(like, (str, bytes)):
            text = " ".join(self.generator.choice(WORDS, self.length))
            return text.encode() if isinstance(like, bytes) else text
        if isinstance(like, dict):
            return self.of_record(like)
        if _is_picture(like):
            return self._picture(like)
        if isinstance(like, (list, tuple)) and _is_of_parts(like):
            return self._parts(name, like[:PARTS])
        return self._array(name, like)

    def _parts(self, name: str, like: Sequence[Leaf]) -> list[Leaf]:
        """Messages of a chat, choices, pictures: a few of them; the messages of a chat take turns."""
        made = [self.value(name, part) for part in like]
        for part, role in zip(made, ROLES, strict=False):
            if isinstance(part, dict) and "role" in part:
                part["role"] = role
        return made

    def _picture(self, like: Leaf) -> Leaf:
        from PIL import Image

        width, height = like.size
        pixels = self.generator.integers(256, size=(height, width, 3)).astype(np.uint8)
        return Image.fromarray(pixels).convert(like.mode)

    def _array(self, name: str, like: Leaf) -> Leaf:
        array = np.asarray(like)
        if array.ndim == 0:
            return array.dtype.type(RATE if name == "sampling_rate" else self._numbers(name, array, ())).item()
        if array.dtype.kind in "US":
            return [str(w) for w in self.generator.choice(WORDS, self.length)]
        is_real = array.dtype.kind == "f"
        fixed = array.ndim > 1 or (is_real and "label" in name)  # pictures, and a score for each of k labels
        count = self.length * (SAMPLES if name in ("input_values", "array") and is_real else 1)
        made = self._numbers(name, array, array.shape if fixed else (count,))
        return made if isinstance(like, np.ndarray) or array.ndim > 1 else made.tolist()

    def _numbers(self, name: str, like: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        generator = self.generator
        if like.dtype.kind == "f":
            made = generator.integers(2, size=shape) if "label" in name and shape else generator.standard_normal(shape)
            return np.asarray(made, like.dtype)
        if like.dtype.kind == "b" or "mask" in name:
            return np.ones(shape, like.dtype)
        if "type_ids" in name or "task_id" in name:  # there may be one type, or task, alone
            return np.zeros(shape, like.dtype)
        limit = self._limit(name)
        first = 3 if limit > 10 and shape else 0  # below it a vocabulary's special tokens usually lie
        return np.asarray(generator.integers(first, max(limit, first + 1), size=shape), like.dtype)

    def _limit(self, name: str) -> int:
        if "position" in name:
            return self.length
        if name in ("labels", "label", "label_ids"):
            return self.label_values
        return 2 if "label" in name else self.vocab_size


def _is_of_parts(value: Sequence[Leaf]) -> bool:
    """Whether a list holds mappings, pictures, or lists of different lengths, and not numbers or texts alone."""
    try:
        return any(map(_is_picture, value)) or np.asarray(value).dtype.kind == "O"
    except ValueError:  # lists of different lengths
        return True
