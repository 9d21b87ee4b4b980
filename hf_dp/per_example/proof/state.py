"""Everything that a model remembers, noted once; what a pass has changed of it, by name; and all of it put back.

    a module's own attributes, its registries of submodules, parameters, buffers and hooks
    attributes of the user's own classes of modules, and the globals that their methods name, and what those name
    lists, dicts, sets, arrays, objects and closures that these hold, modules outside of the registry too
    gradients of parameters that are not trained, and the environment
    what a user's losses name, close over and keep, and of a trainer the values and containers that they name
    random generators among them, which no pass may advance
    the tensors among them: their memory, shape, type, values

Parameters are the exception: their values change by every step, rightly, and are too large to copy before every pass. A
pass that writes to one is found by its version, and named. It can be put back where it was given as `copied`, or where
the operations of the pass are followed, so that it is copied just before the first write to it (`untouched`).
"""

import itertools
import os
import pickle
import random
import types
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_pre_hook

from hf_dp.errors import SelfCheckError
from hf_dp.per_example.proof.bindings import (
    attribute,
    contents,
    frame_of,
    item,
    set_array,
    set_attribute,
    set_bytes,
    set_contents,
    set_environment,
    set_gradient,
    set_item,
    set_list,
    set_set,
    set_slot,
    set_variable,
    slot,
    slots_of,
    sorted_set,
)
from hf_dp.per_example.proof.calls import Value
from hf_dp.per_example.proof.kept import PLAIN, Empty, Kept, KeptMapping, KeptTensor, joined, local
from hf_dp.per_example.proof.labels import address
from hf_dp.per_example.reads import behind, functions_in, holds_values, is_a_trainer, is_the_users, methods_of, named

DEPTH = 8  # objects within objects that are no modules; adapters' settings and caches are within 3
LARGEST = 1 << 26  # bytes of an array that is copied
DEPTH_BESIDE = 3  # of what is no model: data sets and hooks may hold anything
_REGISTRIES = ("_parameters", "_buffers", "_modules")
_COLLECTIONS = {dict, OrderedDict, list, deque, set}
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)
_UNDER_WAY = ("torch.distributed", "torch.amp", "torch.autograd")  # whose objects are what a pass itself has under way
_NOTHING_WITHIN = {*PLAIN, types.ModuleType, types.BuiltinFunctionType}


_BESIDE: WeakKeyDictionary[nn.Module, list[nn.Module]] = WeakKeyDictionary()
_LOSSES: WeakKeyDictionary[nn.Module, dict[str, object]] = WeakKeyDictionary()


def note_beside(model: nn.Module, run: Callable[[], object]) -> None:
    """Finds the modules that a pass calls and that are not the model's, such as a teacher or a reference model. From
    here on, what they remember is noted and put back with what the model does.

    Args:
        model: unwrapped.
        run: one pass. It may fail; what was called until then is found.
    """
    own, called = set(model.modules()), dict[nn.Module, None]()
    handle = register_module_forward_pre_hook(lambda module, args: called.setdefault(module))
    try:
        run()
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever the model's code raises is told by the checks that follow
        pass
    finally:
        handle.remove()
    _BESIDE[model] = [module for module in called if module not in own]


def note_losses(model: nn.Module, code: Mapping[str, object]) -> None:
    """From here on, what this code remembers, a user's losses of the model, is noted and put back with the model's."""
    _LOSSES[model] = dict(code)


class State:
    """A model's memory as it stands when this is made, that of modules that its passes call (see `note_beside`), and
    that of its losses (see `note_losses`).

    Args:
        model: unwrapped, with its own parameters in place (outside of any pass).
        copied: names of parameters that a pass is known to write to.
    """

    def __init__(self, model: nn.Module, copied: Collection[str] = ()) -> None:
        self._empty, self._whole = Empty(), False  # whether globals and defaults of all functions belong to it
        self._containers: list[Kept | KeptMapping | Empty] = [self._empty]
        self._tensors: list[KeptTensor] = []
        self._at: dict[int, list[KeptTensor]] = {}
        self._own = {id(t) for t in (*model.parameters(), *model.buffers())}
        self._in_shards = {address(local(p)) for p in model.parameters() if isinstance(p, DTensor)}
        self._copied, self._depth = frozenset(copied), DEPTH
        self._seen: dict[int, Value] = {}
        modules = list(model.named_modules())
        self._seen.update((id(module), module) for _, module in modules)
        for name, module in modules:
            self._module(module, name, hooks=False)
        for name, module in modules:
            self._hooks(module, name)
        for kind in dict.fromkeys(type(module) for _, module in modules):
            self._class(kind)
        for module in _BESIDE.get(model, ()):
            self._walk(module, f"{type(module).__name__}, a module beside the model", 0)
        for name, holder in _LOSSES.get(model, {}).items():
            self._user_code(holder, name)
        self._keep("os.environ", lambda: [tuple(os.environ.items())], lambda held: set_environment(dict(held[0])))

    @classmethod
    def of(cls, holder: Value, name: str) -> "State":
        """What a function, or an object, remembers besides a model."""
        state = cls(nn.Identity())
        state._depth = DEPTH_BESIDE
        state._user_code(holder, name)
        return state

    def _user_code(self, holder: Value, name: str) -> None:
        self._whole = True
        owner = getattr(holder, "__self__", None)
        if isinstance(holder, dict):
            for key, member in holder.items():
                self._user_code(member, key)
        elif isinstance(holder, types.MethodType) and is_a_trainer(type(owner)):
            self._class(type(owner))
            self._names(vars(owner), list(dict.fromkeys(named(holder.__code__))), f"{name}.")
        else:
            self._walk(holder, name, 0)

    def keep(self, name: str, tensor: Tensor, copied: bool = True) -> None:
        """Notes one tensor more, under a name."""
        self._tensors.append(KeptTensor(name, tensor, copied))
        if id(tensor) in self._own:  # others' memory, such as what sharding gathers, may be freed meanwhile
            self._at.setdefault(address(local(tensor)), []).append(self._tensors[-1])

    def copy(self, about_to_be_written: Tensor) -> None:
        """Takes a copy of the parameters in the memory that is about to be written to, where there is none yet."""
        if about_to_be_written.layout is not torch.strided:
            return
        for kept in self._at.get(address(about_to_be_written), ()):
            kept.copy()

    def changed(self) -> dict[str, Tensor]:
        """The tensors that differ from what was noted, by name, as they are now; no copies."""
        return {kept.name: kept.tensor for kept in self._tensors if kept.changes()}

    def begin(self) -> None:
        """Notes anew what may rightly have changed since: the parameters' values."""
        for tensor in self._tensors:
            if isinstance(tensor.tensor, nn.Parameter):
                tensor.note()

    def changes(self) -> list[str]:
        """The names of what differs from what was noted."""
        names = [name for container in self._containers for name in container.changes()]
        return list(dict.fromkeys([*names, *(name for tensor in self._tensors for name in tensor.changes())]))

    def put_back(self) -> None:
        """Bit for bit as it was noted.

        Raises:
            SelfCheckError: a parameter was written to that is not `copied`.
        """
        for container in self._containers:
            if container.differs():
                container.put_back()
        for tensor in self._tensors:
            if tensor.changes():
                tensor.put_back()

    def _walk(self, value: Value, name: str, depth: int) -> None:
        if type(value) in _NOTHING_WITHIN or isinstance(value, (*PLAIN, type)) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if not isinstance(value, (Tensor, nn.Module)) and type(value).__module__.startswith(_UNDER_WAY):
            return
        if isinstance(value, Tensor):
            if isinstance(value, nn.Parameter) and not value.requires_grad:
                self._keep(joined(name, "grad"), lambda: [value.grad], partial(set_gradient, value))
                self._walk(value.grad, joined(name, "grad"), depth)
            sharded = not isinstance(value, nn.Parameter) and address(local(value)) in self._in_shards
            if value.layout is torch.strided and not sharded:  # sharding's own look at a parameter, which is noted so
                copied = not isinstance(value, nn.Parameter) or name in self._copied
                self.keep(name, value, copied)
        elif isinstance(value, nn.Module):
            self._module(value, name)
        elif depth < self._depth:
            self._container(value, name, depth + 1)

    def _module(self, module: nn.Module, name: str, hooks: bool = True) -> None:
        own = vars(module)
        self._containers.append(KeptMapping(name, own))
        for key, value in own.items():
            kind = type(value)
            if kind in _NOTHING_WITHIN:
                continue
            inner = name if key in _REGISTRIES else joined(name, key)
            if kind in _COLLECTIONS and not value:
                self._empty.append((inner, value))
            elif hooks or not key.endswith("_hooks"):
                self._walk(value, inner, 0)

    def _class(self, kind: type) -> None:
        """What the instances of a user's class share."""
        if id(kind) in self._seen:
            return
        self._seen[id(kind)] = kind
        functions = methods_of(kind)
        for own in (own for own in kind.__mro__ if functions and is_the_users(own.__module__)):
            for key, value in list(vars(own).items()):
                if not key.startswith("__") and _may_be_kept(value):
                    self._binding(own, key, value, f"{own.__name__}.{key}")
        for name, function in functions.items():
            self._code(function, name)

    def _code(self, function: types.FunctionType, name: str) -> None:
        """What a user's function names and closes over, its defaults, and its own attributes. What hooks note in such
        places, as a log, is theirs.
        """
        if id(function.__code__) in self._seen:
            return
        self._seen[id(function.__code__)] = function.__code__
        self._walk_all([*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()], name, 0)
        self._container(vars(function), name, 0)
        self._walk(function, name, 0)
        if is_the_users(function.__module__):
            names = list(dict.fromkeys(named(function.__code__)))
            self._names(function.__globals__, names)

    def _names(self, space: dict[str, Value], names: list[str], of: str = "") -> None:
        """What code finds in a namespace: values, containers, users' objects, and what further code of theirs finds."""
        for key in (key for key in names if key in space):
            value = behind(space[key])
            for function in functions_in(value):
                self._code(function, key)
            if isinstance(value, types.ModuleType) and is_the_users(value.__name__) and id(value) not in self._seen:
                self._seen[id(value)] = value
                self._names(vars(value), names)
            elif isinstance(value, type):
                self._class(value)
            elif _may_be_kept(value) or is_the_users(type(value).__module__) or holds_values(type(value)):
                self._walk(value, f"{of}{key}", 0)
                self._keep(f"{of}{key}", partial(item, space, key), partial(set_item, space, key))

    def _binding(self, owner: type, key: str, value: Value, name: str) -> None:
        self._walk(value, name, 0)
        self._keep(name, partial(attribute, owner, key), partial(set_attribute, owner, key))

    def _hooks(self, module: nn.Module, name: str) -> None:
        """What hooks hold comes last, so that a tensor of the model has the name that it has there."""
        for key, value in vars(module).items():
            if key.endswith("_hooks") and value:
                self._walk(value, joined(name, key), DEPTH - DEPTH_BESIDE)

    def _container(self, value: Value, name: str, depth: int) -> None:
        if behind(value) is not value:
            if isinstance(value, ContextVar):
                self._keep(name, lambda: [behind(value)], partial(set_variable, value))
            self._walk(behind(value), name, depth)
        elif type(value) in _COLLECTIONS and not value:
            self._empty.append((name, value))
        elif isinstance(value, dict):
            self._containers.append(KeptMapping(name, value))
            for key, element in value.items():
                self._walk(element, joined(name, key), depth)
        elif isinstance(value, (list, deque)):
            self._keep(name, partial(list, value), partial(set_list, value))
            self._walk_all(value, name, depth)
        elif isinstance(value, set):
            self._keep(name, partial(sorted_set, value), partial(set_set, value))
        elif isinstance(value, np.ndarray) and (isinstance(value, np.memmap) or value.nbytes > LARGEST):
            return  # on a disk, or too large to be copied
        elif isinstance(value, np.ndarray):
            self._keep(name, lambda: [value.tobytes()], partial(set_array, value, value.copy()))
        elif isinstance(value, (bytearray, array)):
            self._keep(name, lambda: [bytes(value)], partial(set_bytes, value, value[:]))
        elif isinstance(value, tuple):
            self._walk_all(value, name, depth)
        elif isinstance(value, itertools.count):
            self._keep(name, lambda: [repr(value)], _cannot(name))
        elif isinstance(value, types.GeneratorType):
            self._keep(name, partial(frame_of, value), _cannot(name))
        elif isinstance(value, _GENERATORS):
            self._keep(name, lambda: [_state_of(value)], _cannot(name))
        elif isinstance(value, types.MethodType):
            self._walk(value.__self__, name, depth)
            self._walk(value.__func__, name, depth)
        elif isinstance(value, types.FunctionType):
            self._closure(value, name, depth)
        else:
            self._object(value, name, depth)

    def _walk_all(self, values: Value, name: str, depth: int) -> None:
        for number, element in enumerate(values):
            self._walk(element, f"{name}[{number}]", depth)

    def _closure(self, function: types.FunctionType, name: str, depth: int) -> None:
        if self._whole:
            self._code(function, name)
        for cell in function.__closure__ or ():
            self._keep(name, partial(contents, cell), partial(set_contents, cell))
            for value in contents(cell):
                self._walk(value, name, depth)

    def _object(self, value: Value, name: str, depth: int) -> None:
        for key in slots_of(type(value)) if is_the_users(type(value).__module__) else ():
            self._keep(joined(name, key), partial(slot, value, key), partial(set_slot, value, key))
            self._walk_all(slot(value, key), joined(name, key), depth)
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            self._containers.append(KeptMapping(name, own))
            for key, element in own.items():
                self._walk(element, joined(name, key), depth)
        if is_the_users(type(value).__module__):
            self._class(type(value))

    def _keep(self, name: str, read: Callable[[], list[Value]], write: Callable[[list[Value]], None]) -> None:
        self._containers.append(Kept(name, read, write))


def _may_be_kept(value: Value) -> bool:
    """Whether a value is one that is set, or a container: not code, which stays as it is."""
    return isinstance(value, (*PLAIN, *_COLLECTIONS, tuple, Tensor, np.ndarray, bytearray, array))


def _state_of(generator: Value) -> bytes:
    if isinstance(generator, torch.Generator):
        return bytes(generator.get_state().numpy())
    return pickle.dumps(generator) if not isinstance(generator, random.SystemRandom) else b""


def _cannot(name: str) -> Callable[[list[Value]], None]:
    def refuse(held: list[Value]) -> None:
        raise SelfCheckError(
            f"a pass advances {name}, so what it gives an example depends on which others came before: keep a number "
            "instead of an iterator, and draw from torch's, numpy's or Python's global generator instead of your own"
        )

    return refuse
