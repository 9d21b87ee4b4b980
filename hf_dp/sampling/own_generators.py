"""A collator or data set -> the names of the random generators that it holds itself.

Reading and collating run under secret states of torch's, numpy's and Python's global generators (see `forked_rng`). A
generator of the collator's or data set's own usually has a public seed, and it hands out its numbers in the order of
the draw: if one record is removed, all records after it get other masks.
"""

import functools
import random
import types
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from hf_dp.per_example import used_by

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)
DEPTH = 8  # how deep attributes of attributes are followed
MEMBERS = 64  # how many members of a list or mapping are looked at
LIBRARIES = ("builtins", "collections", "transformers", "tokenizers", "trl", "torch", "datasets", "numpy", "hf_dp")
REMEDY = (
    "what it draws for one record depends on which others were drawn before; draw from torch's, numpy's or Python's "
    "global generator instead, which hf_dp runs under secret states"
)


def own_generators(holder: object, name: str) -> list[str]:
    """The random generators that `holder` reaches by attributes, members, closures and the globals its methods name."""
    return list(_found(holder, name, DEPTH, set()))


def _found(value: object, name: str, depth: int, seen: set[int]) -> Iterator[str]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, GENERATORS):
        if not isinstance(value, random.SystemRandom):
            yield f"{name} ({type(value).__module__}.{type(value).__name__})"
    elif depth and not isinstance(
        value, (str, bytes, int, float, type, Tensor, np.ndarray, nn.Module, types.ModuleType)
    ):
        for member, inner in _members(value):
            yield from _found(inner, f"{name}.{member}", depth - 1, seen)


def _members(value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        yield from ((str(key), member) for key, member in list(value.items())[:MEMBERS])
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((str(i), member) for i, member in enumerate(list(value)[:MEMBERS]))
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, types.MethodType):
        yield from (("__self__", value.__self__), ("__func__", value.__func__))
    elif isinstance(value, types.FunctionType):
        yield from used_by(value, with_globals=not _is_a_librarys(value))
    else:
        yield from getattr(value, "__dict__", {}).items()
        for kind in type(value).__mro__:
            yield from ((slot, getattr(value, slot, None)) for slot in _listed(kind.__dict__.get("__slots__", ())))
            if not _is_a_librarys(kind):
                yield from ((name, m) for name, m in kind.__dict__.items() if isinstance(m, types.FunctionType))


def _is_a_librarys(code: type | types.FunctionType) -> bool:
    return (code.__module__ or "").partition(".")[0] in LIBRARIES


def _listed(slots: str | Iterable[str]) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)
