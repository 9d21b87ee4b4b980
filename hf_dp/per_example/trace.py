"""A pass -> which operations it takes and with which settings: what a model does only at some sizes shows here.

Python may read sizes from `shape` and do something else with them, which neither values nor their dependence tell. But
it has to do so by other operations, other settings, or other numbers than at the sizes before and after. The same is
true of backward where Python has a say in it; elsewhere it is the derivative of what forward did.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dp.per_example.batches import Batch, leaves
from hf_dp.per_example.losses import spelt_out
from hf_dp.per_example.proof import HOOKS, Memories, has_backward_in_python

Value: TypeAlias = Any  # an argument of an operation
Operation: TypeAlias = tuple[Value, ...]  # what is called, and with what besides sizes
Sizes: TypeAlias = tuple[int, ...]  # of one use


class Trace(dict[Operation, list[Sizes]]):
    """What a pass does: each operation, with its settings and the parameters that it takes -> the sizes of each use."""

    def lies_between(self, others: Sequence["Trace"]) -> bool:
        """Whether all do the same, and each number of this one lies between the least and the greatest of theirs.

        Numbers are how often an operation is used, and its sizes: those of each use, in their order, or, where others
        use it more or less often, as a loop over tokens does, the least and the greatest of all its uses.
        """
        return all(self.keys() == other.keys() for other in others) and all(
            min(ends) <= number <= max(ends)
            for operation, uses in self.items()
            for number, *ends in zip(*_numbers([uses, *(other[operation] for other in others)]), strict=True)
        )

    def is_grown(self, smaller: "Trace", factor: float) -> bool:
        """Whether this does what `smaller` does, with numbers (see `lies_between`) that stay or are `factor` times as
        great, as those of a loop over examples are.

        Numbers one less or one more, such as the last index, grow like their neighbours.
        """
        return self.keys() == smaller.keys() and all(
            number == before or any(number + i == factor * (before + i) for i in (0, 1, -1))
            for operation, uses in self.items()
            for number, before in zip(*_numbers([uses, smaller[operation]]), strict=True)
        )


def _numbers(of: list[list[Sizes]]) -> list[Sizes]:
    """Of the uses of one operation in several passes: the numbers to compare."""
    if len({len(uses) for uses in of}) == 1:
        return [tuple(size for sizes in uses for size in sizes) for uses in of]
    return [(len(uses), *map(min, zip(*uses, strict=True)), *map(max, zip(*uses, strict=True))) for uses in of]


def trace_of(model: nn.Module, example_losses: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> Trace:
    """What a pass over a batch of public records does: forward, and backward if Python has a say in it, by an autograd
    function or a hook. Compiled functions run as they are written.

    The model is in training mode, and a pass is known to write to nothing that outlives it. Forward keeps nothing for
    a backward pass that will not be followed.
    """
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"), spelt_out():
        noted, hooks = _Noted(model, batch), _Hooks()
        with noted, hooks, saved_tensors_hooks(lambda _: None, _not_kept):
            losses = example_losses(model, batch)
            followed = hooks.registered or has_backward_in_python(losses)
        if followed and losses.requires_grad:
            noted = _Noted(model, batch)
            gradients = [(p, p.grad) for p in model.parameters()]
            try:
                with noted:
                    example_losses(model, batch).sum().backward()
            finally:
                for p, gradient in gradients:
                    p.grad = gradient
    return noted.trace


def _not_kept(_: None) -> Tensor:
    raise RuntimeError("a pass that is traced calls for its gradients")


class _Hooks(TorchFunctionMode):
    """Notes whether a hook on gradients is registered within."""

    def __init__(self) -> None:
        super().__init__()
        self.registered = False

    def __torch_function__(self, func: Value, types: Value, args: Value = (), kwargs: Value = None) -> Value:
        self.registered |= getattr(func, "__name__", "") in HOOKS
        return func(*args, **(kwargs or {}))


class _Noted(TorchDispatchMode):
    """Notes each operation within."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__()
        self.trace = Trace()
        self._flags: dict[int, tuple[bool, ...]] = {}
        kept = [*model.named_parameters(), *model.named_buffers()]
        self._names = {t.data_ptr(): name for name, t in kept if t.layout is torch.strided and t.numel()}
        self._born = Memories()  # whose numbers follow from what is noted
        for value in [*(t for _, t in kept), *leaves(batch).values()]:
            self._is_born(value)

    def __torch_dispatch__(
        self, func: Value, types: Value, args: tuple[Value, ...] = (), kwargs: dict[str, Value] | None = None
    ) -> Value:
        out = func(*args, **(kwargs or {}))
        self._note(func, args, kwargs or {})
        for result in out if isinstance(out, (list, tuple)) else [out]:
            self._is_born(result)
        return out

    def _is_born(self, value: Value) -> None:
        if isinstance(value, Tensor):
            self._born.add(value)

    def _note(self, func: Value, args: tuple[Value, ...], kwargs: dict[str, Value]) -> None:
        key = id(func)  # an operation's own hash is slow
        flags = self._flags.get(key) or self._flags.setdefault(key, _are_sizes(func))
        settings: list[Value] = [key]
        sizes: list[int] = []
        for value, is_size in zip(args, flags, strict=False):
            self._take(value, is_size, settings, sizes)
        for name, value in kwargs.items():
            settings.append(name)
            self._take(value, False, settings, sizes)
        self.trace.setdefault(tuple(settings), []).append(tuple(sizes))

    def _take(self, value: Value, is_size: bool, settings: list[Value], sizes: list[int]) -> None:
        if isinstance(value, Tensor):
            known = self._names.get(value.data_ptr()) if value.layout is torch.strided else None
            settings.append((value.dim(), value.dtype, known))
            if value.layout is torch.strided and value not in self._born:
                self._take_numbers(value, settings, sizes)
        elif isinstance(value, (list, tuple)):
            listed: list[Value] = []
            for part in value:
                self._take(part, is_size, listed, sizes)
            alike = all(isinstance(part, Tensor) for part in value)  # such as one for each example
            settings.append(tuple(dict.fromkeys(listed) if alike else listed))
        elif is_size and type(value) is int:
            sizes.append(value)
            settings.append("size")
        else:
            settings.append(value)

    def _take_numbers(self, made_elsewhere: Tensor, settings: list[Value], sizes: list[int]) -> None:
        """Of a tensor that Python made, such as a list of indices: its numbers; of a range, its ends and its step."""
        numbers = made_elsewhere.detach().flatten().tolist()
        steps = [after - before for before, after in pairwise(numbers)]
        if all(type(number) is int for number in numbers) and len(set(steps)) <= 1:
            settings.append(("range", *steps[:1]))
            sizes += [len(numbers), *numbers[:1], *numbers[-1:]]
        else:
            settings.append(tuple(numbers))


@cache
def _are_sizes(func: Value) -> tuple[bool, ...]:
    """Of each argument of an operation, whether it is a size, or a number that may be made of sizes."""
    return tuple(_kind(a.real_type) in ("SymIntType", "NumberType") for a in func._schema.arguments)


def _kind(of: Value) -> str:
    while of.kind() in ("ListType", "OptionalType"):
        of = of.getElementType()
    return str(of.kind())
