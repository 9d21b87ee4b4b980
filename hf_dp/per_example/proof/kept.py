"""What one container, or one tensor, of a model held: whether it differs now, where, and all of it put back."""

from collections.abc import Callable
from operator import is_

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_dp.errors import SelfCheckError
from hf_dp.per_example.proof.calls import Value
from hf_dp.per_example.proof.harmless import is_harmless_setting

PLAIN = (int, float, complex, str, bytes, bool, type(None))


class Kept:
    """One container and what it held."""

    def __init__(self, name: str, read: Callable[[], list[Value]], write: Callable[[list[Value]], None]) -> None:
        self.name, self._read, self._write, self._held = name, read, write, read()

    def differs(self) -> bool:
        """Whether it holds something else now."""
        now = self._read()
        return len(now) != len(self._held) or not all(map(_same, now, self._held))

    def changes(self) -> list[str]:
        """The names of what differs."""
        return [self.name] if self.differs() else []

    def put_back(self) -> None:
        """Holds again what it held."""
        self._write(self._held)


class KeptMapping:
    """One mapping and what it held, such as a module's attributes. There are thousands, and few ever differ."""

    def __init__(self, name: str, own: dict[Value, Value]) -> None:
        self.name, self._own, self._keys, self._values = name, own, [*own], [*own.values()]

    def differs(self) -> bool:
        """Whether it holds something else now."""
        own, keys, values = self._own, self._keys, self._values
        if len(own) != len(keys):
            return True
        if all(map(is_, own, keys)) and all(map(is_, own.values(), values)):
            return False
        return not all(map(_same, own.items(), zip(keys, values, strict=True)))

    def changes(self) -> list[str]:
        """The names of what differs."""
        if not self.differs():
            return []
        old, new = dict(zip(self._keys, self._values, strict=True)), self._own
        keys = [k for k in {**old, **new} if k not in old or k not in new or not _same(old[k], new[k])]
        keys = [k for k in keys if not is_harmless_setting(k, new.get(k))]
        return [joined(self.name, k) if isinstance(k, str) else self.name for k in keys]

    def put_back(self) -> None:
        """Holds again what it held."""
        self._own.clear()
        self._own.update(zip(self._keys, self._values, strict=True))


class Empty(list[tuple[str, Value]]):
    """Containers without a member, by name: most of a module's registries."""

    def differs(self) -> bool:
        """Whether it holds something else now."""
        return any(own for _, own in self)

    def changes(self) -> list[str]:
        """The names of what differs."""
        return [told for name, own in self if own for told in self._of(name, own)]

    def put_back(self) -> None:
        """Holds again what it held."""
        for _, own in self:
            own.clear()

    def _of(self, name: str, own: Value) -> list[str]:
        if not isinstance(own, dict):
            return [name]
        keys = [k for k in own if not is_harmless_setting(k, own[k])]
        return [joined(name, k) if isinstance(k, str) else name for k in keys]


class KeptTensor:
    """One tensor: its memory and its values."""

    def __init__(self, name: str, tensor: Tensor, copied: bool) -> None:
        self.name, self.tensor, self.copied = name, tensor, copied
        self.note()

    def note(self) -> None:
        """Notes memory, values and version as they are now."""
        with torch.no_grad():
            self._alias = self.tensor.detach()
            self._copy = self._alias.clone() if self.copied else None
        self._version, self._grad = self.tensor._version, self.tensor.requires_grad

    def copy(self) -> None:
        """Takes a copy of values that are still those noted; nothing where there is one."""
        if self._copy is None:
            with torch.no_grad():
                self._copy = self._alias.clone()

    def changes(self) -> list[str]:
        """The names of what differs."""
        return [] if self._in_place() and self._unwritten() and self.tensor.requires_grad == self._grad else [self.name]

    def _in_place(self) -> bool:
        now, then = self.tensor, self._alias
        return local(now).data_ptr() == local(then).data_ptr() and now.shape == then.shape and now.dtype == then.dtype

    def _unwritten(self) -> bool:
        if self.tensor._version == self._version and self._alias._version == self._version and self._copy is None:
            return True
        return self._copy is not None and _equal(self._alias, self._copy)

    def put_back(self) -> None:
        """Holds again what it held."""
        with torch.no_grad():
            if not self._in_place():
                self.tensor.data = self._alias
            if self.tensor.requires_grad != self._grad and self.tensor.is_leaf:
                self.tensor.requires_grad_(self._grad)
            if self._copy is None:
                raise SelfCheckError(
                    f"a pass writes to {self.name}, whose values only the released steps may change: freeze it there"
                )
            if not _equal(self._alias, self._copy):
                self._alias.copy_(self._copy)


def _same(a: Value, b: Value) -> bool:
    if a is b:
        return True
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and isinstance(a, PLAIN) and a == b


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that lies in shards; any other as it is."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def _equal(a: Tensor, b: Tensor) -> bool:
    """The same bits: a NaN equals itself, and -0.0 is not 0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_meta or b.is_meta:  # lies elsewhere, as a module's hooks say
        return a.is_meta == b.is_meta
    first, second = (local(t).contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return bool(torch.equal(first, second))


def joined(name: str, key: Value) -> str:
    """The name of a member, as a model names its parameters."""
    return f"{name}.{key}" if name else str(key)
