"""A model as it was, after whatever a pass within did to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dp.per_example.gathering import let_go
from hf_dp.per_example.proof.calls import Value, bound, written
from hf_dp.per_example.proof.state import State


@contextmanager
def state_put_back(model: nn.Module, state: State | None = None) -> Iterator[State]:
    """The model as it was, after whatever the pass within did to it, an exception included.

    Args:
        model: unwrapped.
        state: its memory noted before, where many passes follow one another; noted now without.

    Raises:
        SelfCheckError: the pass wrote to a parameter that is not among those copied.
    """
    noted = State(model) if state is None else state
    noted.begin()
    try:
        yield noted
    finally:
        noted.put_back()


@contextmanager
def untouched(model: nn.Module) -> Iterator[State]:
    """As `state_put_back`, whatever the pass writes to: a parameter is copied just before. Compiled functions run as
    they are written.
    """
    if is_sharded(model):
        with _tensors_put_back(model) as state:
            yield state
        return
    state = State(model)
    try:
        with torch.compiler.set_stance("force_eager"), _CopyBeforeWrite(state):
            yield state
    finally:
        state.put_back()


def is_sharded(model: nn.Module) -> bool:
    """Whether several processes hold a part of each weight."""
    return any(isinstance(m, FSDPModule) for m in model.modules()) or any(
        isinstance(p, DTensor) for p in model.parameters()
    )


@contextmanager
def _tensors_put_back(model: nn.Module) -> Iterator[State]:
    """Trainable parameters and buffers alone: sharding sets itself up in the first pass, which must stay."""
    let_go(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    state = State(nn.Identity())
    for name, tensor in (*trained, *model.named_buffers()):
        state.keep(name, tensor)
    try:
        yield state
    finally:
        let_go(model)
        state.put_back()


class _CopyBeforeWrite(TorchDispatchMode):
    """Tells a state which memory the operation to come writes to."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self._state = state

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # within, nothing is compiled; asking again for each operation took longer than the operation

    def __torch_dispatch__(self, func: Value, types: Value, args: Value = (), kwargs: Value = None) -> Value:
        if _writes(func):
            with torch._C.DisableTorchFunction():
                for tensor in written(func, bound(func, args, kwargs or {})):
                    self._state.copy(tensor)
        return func(*args, **(kwargs or {}))


@cache
def _writes(operation: Value) -> bool:
    return bool(operation._schema.is_mutable)
