"""The columns of one record -> made-up records of chosen lengths, on which checks run: so nothing depends on private
ones.

Only the record's *schema* is used: names and types of columns, and which of them are sequences. Values and lengths come
from a fixed generator and the model's public sizes.
"""

from collections.abc import Sequence

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
    limits = {"labels": label_values, "label": label_values, "label_ids": label_values}
    unknown = [f"{name} ({type(value).__name__})" for name, value in record.items() if not _known(value)]
    if unknown:
        raise ConfigError(
            f"cannot make up values for the columns {', '.join(unknown)}: let the dataset return tensors, numbers, "
            "strings or lists of them, or pass check_records=[...], a few public records for the self-check"
        )
    made = [
        {
            name: _made_up(
                name, value, length, length if "position" in name else limits.get(name, vocab_size), generator
            )
            for name, value in record.items()
        }
        for length in lengths
    ]
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
    return value is None or isinstance(
        value, (torch.Tensor, np.ndarray, np.generic, str, list, tuple, bool, int, float)
    )


def _made_up(name: str, value: Leaf, length: int, limit: int, generator: np.random.Generator) -> Leaf:
    if isinstance(value, torch.Tensor):
        return torch.as_tensor(_made_up(name, value.numpy(), length, limit, generator)).to(value.dtype)
    if isinstance(value, str):
        return " ".join(generator.choice(WORDS, length))
    if value is None:
        return None
    array = np.asarray(value)
    if array.ndim == 0:
        return array.dtype.type(_numbers(name, array, (), limit, generator)).item()
    if array.dtype.kind in "US":
        return [str(w) for w in generator.choice(WORDS, length)]
    fixed = array.ndim > 1 or (
        array.dtype.kind == "f" and "label" in name
    )  # pictures, and a score for each of k labels
    count = length * (SAMPLES if name == "input_values" and array.dtype.kind == "f" else 1)
    made = _numbers(name, array, array.shape if fixed else (count,), limit, generator)
    return made if isinstance(value, np.ndarray) or array.ndim > 1 else made.tolist()


def _numbers(
    name: str, like: np.ndarray, shape: tuple[int, ...], limit: int, generator: np.random.Generator
) -> np.ndarray:
    if like.dtype.kind == "f":
        made = generator.integers(2, size=shape) if "label" in name and shape else generator.standard_normal(shape)
        return np.asarray(made, like.dtype)
    if like.dtype.kind == "b" or "mask" in name:
        return np.ones(shape, like.dtype)
    if "type_ids" in name or "task_id" in name:  # there may be one type, or task, alone
        return np.zeros(shape, like.dtype)
    first = 3 if limit > 10 and shape else 0  # below it a vocabulary's special tokens usually lie
    return np.asarray(generator.integers(first, max(limit, first + 1), size=shape), like.dtype)
