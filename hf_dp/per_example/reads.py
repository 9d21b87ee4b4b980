"""Code that a user wrote -> what it reads besides its arguments: values that a later call may find changed.

A loss with an annealed weight, a collator whose settings a callback changes, a data set that numbers words as it meets
them: what such code does is no longer what it did when it was examined, or depends on what it was called with before.
"""

import functools
import os
import pickle
import sys
import threading
import types
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from contextvars import ContextVar
from functools import cache
from typing import Any, TypeAlias
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn

from hf_dp.per_example.checksums import checksums
from hf_dp.per_example.libraries import Functions

Reads: TypeAlias = dict[str, Any]  # the way to a value -> the value, or what tells it from others
PLAIN = (bool, int, float, complex, str, bytes)
DEPTH = 6  # how deep attributes of attributes are followed
MEMBERS = 64  # how many members of a container are looked at by themselves
LIST, PLACE = "list ", " at ["  # stand before the way to a list, which has its length, and before a member's number
COMPARED = 1 << 16  # the largest container or tensor of which all is compared
TRUSTED = ("accelerate", "datasets", "hf_dp", "numpy", "peft", "tokenizers", "torch", "transformers", "trl")
FOLLOWED = ("accelerate", "torch", "transformers")  # of whose objects what the code names is read


def reads(holder: object, name: str) -> Reads:
    """What a function, a method, or an object's methods read besides their arguments: closures, defaults, globals that
    are no library's, the object's own attributes, and of a trainer or an optimizer what the code names of it.

    Modules of a model are left out: `State` notes them.
    """
    found: Reads = {}
    _walk(holder, name, DEPTH, frozenset(), set(), found)
    return found


def reads_of_code(code: Mapping[str, object], model: nn.Module) -> Reads:
    """What code reads besides its arguments, together with `forward` of a model's own classes and what that calls, and
    the functions of libraries that a pass finds by name.

    Args:
        code: name -> a function, or an object with methods.
        model: whose modules are looked at.
    """
    of_model = {name: f for kind in {type(m) for m in model.modules()} for name, f in _called(kind).items()}
    found = {way: v for name, holder in {**code, **of_model}.items() for way, v in reads(holder, name).items()}
    return {**found, "functions of libraries": Functions(model)}


def names_in(found: Reads) -> set[str]:
    """All names in the code that was met."""
    return {name for value in found.values() if isinstance(value, types.CodeType) for name in named(value)}


def has_changed(before: Reads, after: Reads) -> bool:
    """Whether something that was read is another now. What was added to a list, as to a log, is none of it."""
    if any(after.get(name) != value for name, value in before.items() if not name.startswith(LIST)):
        return True
    return any(name not in before and not name.startswith(LIST) and not _was_added(name, before) for name in after)


def _was_added(name: str, before: Reads) -> bool:
    """Whether the way leads through a member that a list did not have before."""
    at = name.find(PLACE)
    while at >= 0:
        length = before.get(f"{LIST}{name[:at]}")
        if length is not None and int(name[at + len(PLACE) : name.index("]", at)]) >= length:
            return True
        at = name.find(PLACE, at + 1)
    return False


def used_by(function: types.FunctionType, *, with_globals: bool) -> Iterator[tuple[str, object]]:
    """What a function closes over, its defaults, its own attributes, and the globals that its code names."""
    yield from vars(function).items()
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    yield from ((name, cell.cell_contents) for name, cell in cells if cell != types.CellType())
    yield from (
        ("default", value) for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    )
    if with_globals:
        names = dict.fromkeys(named(function.__code__))
        yield from ((name, function.__globals__[name]) for name in names if name in function.__globals__)


def named(code: types.CodeType) -> Iterator[str]:
    """The names that a function uses, and those within it: comprehensions, lambdas and nested functions."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from named(constant)


@cache
def is_the_users(module: str | None) -> bool:
    """Whether a module is neither the standard library's nor an installed one."""
    top = (module or "").partition(".")[0]
    if top in TRUSTED or top in sys.stdlib_module_names - {"__main__"}:
        return False
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return "site-packages" not in file and "dist-packages" not in file


def holds_values(kind: type) -> bool:
    """Whether a class of Python's own is made to hold a program's values: a namespace, a flag, a queue."""
    return kind.__module__ in ("types", "argparse", "collections", "threading", "queue", "configparser")


def methods_of(kind: type) -> dict[str, types.FunctionType]:
    """The functions that the user's classes among a class and its bases define, by name: properties and static methods
    too.
    """
    return {
        f"{own.__name__}.{'' if number == 0 else f'({number})'}{name}": function
        for own in kind.__mro__
        if is_the_users(own.__module__)
        for name, value in list(vars(own).items())
        for number, function in enumerate(functions_in(value))
    }


def functions_in(value: Any) -> list[types.FunctionType]:
    """The functions that Python calls for a value: a function, a method of any kind, a property, one with a cache."""
    found: list[Any]
    if isinstance(value, property):
        found = [value.fget, value.fset, value.fdel]
    elif isinstance(value, functools.cached_property):
        found = [value.func]
    elif isinstance(value, (staticmethod, classmethod, functools._lru_cache_wrapper)):
        found = functions_in(value.__wrapped__)
    else:
        found = [value]
    return [function for function in found if isinstance(function, types.FunctionType)]


def behind(value: Any) -> Any:
    """What a reference, a context's variable, a partial function or a thread's own values stand for; else the value."""
    if isinstance(value, ref):
        return value()
    if isinstance(value, ContextVar):
        with suppress(LookupError):
            return value.get()
        return None
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    return value.__dict__ if isinstance(value, threading.local) else value


def _walk(value: Any, name: str, depth: int, names: frozenset[str], seen: set[int], found: Reads) -> None:
    if isinstance(value, PLAIN):
        found[name] = "nan" if value != value else value
        return
    if value is None or not depth or isinstance(value, (nn.Module, nn.Parameter)):
        return
    visit = hash((id(value), names)) if _is_watched(value) else id(value)
    if visit in seen:
        return
    seen.add(visit)
    step = functools.partial(_walk, depth=depth - 1, names=names, seen=seen, found=found)
    if isinstance(value, Tensor):
        found[name] = _of_tensor(value)
    elif isinstance(value, np.ndarray) or getattr(type(value), "__array__", None) is not None:  # a column, a table
        found[name] = _of_array(np.asarray(value))
    elif isinstance(value, (Mapping, list, tuple, set, frozenset, deque)):
        _of_container(value, name, step, found)
    elif behind(value) is not value:
        step(behind(value), name)
    elif isinstance(
        value, (property, staticmethod, classmethod, functools.cached_property, functools._lru_cache_wrapper)
    ):
        step(functions_in(value), name)
    elif isinstance(value, types.MethodType):
        further = frozenset(_through(value.__func__, type(value.__self__)))
        step(value.__func__, name)
        _walk(value.__self__, f"{name}.__self__", depth, names | further, seen, found)
    elif isinstance(value, types.FunctionType):
        found[f"{name}()"] = value.__code__
        inside = names | frozenset(named(value.__code__))
        for member, inner in used_by(value, with_globals=is_the_users(value.__module__)):
            _walk(inner, f"{name}.{member}", depth - 1, inside, seen, found)
    elif isinstance(value, (type, types.ModuleType)):
        _of_namespace(value, name, step, names, found)
    else:
        _of_object(value, name, step, names)


def _called(kind: type) -> dict[str, types.FunctionType]:
    """The methods of the user's that a pass through a module of this class may call."""
    names = {"forward", "__call__", *_through(kind.__dict__.get("forward") or getattr(kind, "forward", None), kind)}
    return {name: method for name, method in methods_of(kind).items() if name.rpartition(".")[2] in names}


def _of_tensor(tensor: Tensor) -> object:
    if tensor.numel() > COMPARED or tensor.layout is not torch.strided:
        return tuple(tensor.shape), tensor._version, id(tensor)
    return tuple(tensor.shape), checksums({"": tensor})[""]


def _of_array(array: np.ndarray) -> object:
    if array.size > COMPARED:
        return array.shape, id(array) if array.base is None else id(array.base)
    return array.shape, hash(pickle.dumps(array.tolist()) if array.dtype.hasobject else array.tobytes())


def _of_container(value: Any, name: str, step: Any, found: Reads) -> None:
    if isinstance(value, (list, deque)):
        found[f"{LIST}{name}"] = len(value)
        for number, member in enumerate(list(value)[:MEMBERS]):
            step(member, f"{name}{PLACE}{number}]")
        return
    found[f"len({name})"] = len(value)
    members = list(value.items()) if isinstance(value, Mapping) else list(enumerate(list(value)[:COMPARED]))
    if len(value) <= COMPARED and all(isinstance(member, PLAIN) for _, member in members):
        found[name] = hash(frozenset(value)) if isinstance(value, (set, frozenset)) else hash(tuple(members))
        return
    for key, member in members[:MEMBERS]:
        step(member, f"{name}[{key!r}]")


def _of_namespace(value: Any, name: str, step: Any, names: frozenset[str], found: Reads) -> None:
    """Of a user's class its attributes that are no functions; of a user's module what the code names of it; the
    environment, where code names it.
    """
    if value is os and names & {"environ", "getenv"}:
        found[f"{name}.environ"] = hash(frozenset(os.environ.items()))
    is_class = isinstance(value, type)
    if not is_the_users(value.__module__ if is_class else value.__name__):
        return
    for key, member in list(vars(value).items()):
        is_code = key.startswith("__") or isinstance(member, types.FunctionType)
        if (not is_code) if is_class else (key in names):
            step(member, f"{name}.{key}")


def _of_object(value: Any, name: str, step: Any, names: frozenset[str]) -> None:
    kind = type(value)
    own = getattr(value, "__dict__", {})
    if _is_watched(value):
        calls_a_method = any(callable(getattr(kind, n, None)) for n in names if not n.startswith("_"))
        for key, member in list(own.items()):
            is_plain = calls_a_method and isinstance(member, (*PLAIN, list)) and not is_a_trainer(kind)
            if key in names or is_plain:
                step(member, f"{name}.{key}")
        for key, function in methods_of(kind).items():
            if key.rpartition(".")[2] in names:
                step(types.MethodType(function, value), f"{name}.{key}")
    elif is_the_users(kind.__module__) or holds_values(kind):
        for key, member in list(own.items()):
            step(member, f"{name}.{key}")
        for owner in kind.__mro__:
            if is_the_users(owner.__module__):
                for key, member in vars(owner).items():
                    if isinstance(member, types.MemberDescriptorType):  # a slot
                        step(getattr(value, key, None), f"{name}.{key}")
                    elif not key.startswith("__") or isinstance(member, types.FunctionType):
                        step(member, f"{name}.{owner.__name__}.{key}")


def _is_watched(value: Any) -> bool:
    """Whether of an object only what code names of it is read: trainers, and the objects of their libraries."""
    kind = type(value)
    return is_a_trainer(kind) or (kind.__module__ or "").partition(".")[0] in FOLLOWED


def is_a_trainer(kind: type) -> bool:
    """Whether a class is a Trainer, or made for one."""
    return any(own.__name__ in ("Trainer", "DPTrainerMixin") for own in kind.__mro__)


def _through(function: Any, kind: type) -> set[str]:
    """The names in a method, and in the methods of the user's that it names."""
    methods = {key.rpartition(".")[2]: method for key, method in methods_of(kind).items()}
    found: set[str] = set()
    todo = [function]
    while todo:
        code = getattr(todo.pop(), "__code__", None)
        if code is not None:
            new = set(named(code)) - found
            found |= new
            todo += [methods[name] for name in new if name in methods]
    return found
