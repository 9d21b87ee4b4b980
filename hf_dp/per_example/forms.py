"""Whether the rows that a trained parameter meets are the examples', or shared by all: found once on public records,
and never read off a size, which may coincide.

The inventory makes two passes over the same public records, of n and of m examples. A leading dimension of k n rows in
the one and k m rows in the other is that of the examples; one of equal size in both belongs to all of them, such as T
positions, heads, or a table of distances. This stays so whatever the sizes of a later batch are: there, the form that
was found is taken, and rows that cannot have it are an error.

A pass without forms, as in a program that calls `clipped_gradient_sum` by itself, has sizes alone to go by. It is
watched by `Coincidences`, and refused where a size leaves it open.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dp.errors import CaptureError
from hf_dp.per_example.proxy import tensors_in

Key: TypeAlias = tuple[str, str, int]  # a parameter, an operation, the number of dimensions of what it meets


class Forms(dict[Key, bool]):
    """Whether the rows that a parameter meets are the examples'.

    Attributes:
        unit_rows: k, how many rows of a pass each example has (see `units`).
    """

    def __init__(self, led: Mapping[Key, bool] | None = None, unit_rows: int = 1) -> None:
        super().__init__(led or {})
        self.unit_rows = unit_rows


class Use(NamedTuple):
    """One meeting of a parameter with other values.

    Attributes:
        size: the leading one.
        flat: whether several rows an example have a rule there.
        led: whether the rows were taken for the examples'.
    """

    size: int
    flat: bool
    led: bool


def settled(first: Mapping[Key, Sequence[Use]], second: Mapping[Key, Sequence[Use]], n: int, m: int) -> dict[Key, bool]:
    """The forms on which passes of n and of m rows agree."""
    forms = {}
    for key in first.keys() & second.keys():
        if len(first[key]) == len(second[key]):
            found = {_form(a, b, n, m) for a, b in zip(first[key], second[key], strict=True)}
            if found == {True} or found == {False}:
                forms[key] = found.pop() is True
    return forms


def _form(a: Use, b: Use, n: int, m: int) -> bool | None:
    times, rest = divmod(a.size, n)
    if not rest and b.size == times * m and (times == 1 or a.flat):
        return True
    return False if a.size == b.size else None


def disagreeing(forms: Forms, *passes: Mapping[Key, Sequence[Use]]) -> list[Key]:
    """What the passes used in another form than that, or in none that is known."""
    return list(
        {key: None for seen in passes for key, uses in seen.items() for use in uses if use.led != forms.get(key)}
    )


class Coincidences(TorchDispatchMode):
    """Watches a pass without forms for sizes from which it cannot be told whether rows are the examples'.

    By contract each tensor of the batch leads with the examples, and so does what trained parameters made of it. The
    model's own tensors do not, nor do values that the pass makes of sizes alone and that differ from row to row, such
    as positions. Of all else the number of rows alone speaks: where the number of examples is also another dimension of
    what the parameters meet, it is not enough.
    """

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        super().__init__()
        self._batch_size = batch_size
        self._kept = {_memory(t) for t in (*model.parameters(), *model.buffers())}
        self._born: set[int] = set()
        self._of_the_batch: set[int] = set()  # of what was born
        self._inner: set[int] = set()
        self._doubtful: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            tensors = tensors_in([args, kwargs])
            given, made = set(map(_memory, tensors)), set(map(_memory, tensors_in(out)))
            foreign = given - self._born - self._kept
            for t in tensors if foreign else ():
                if _memory(t) in foreign:
                    self._inner.update(t.shape[1 if t.dim() < 4 else 2 :])  # not the channels of pictures
        if foreign or given & self._of_the_batch:
            self._of_the_batch |= made
        self._born |= made - given
        return out

    def leads(self, parameter: str, shape: Sequence[int], data: Tensor | None, fits: bool) -> bool:
        """Whether rows, whose number `fits` or not, are taken for the examples'; notes what is in doubt until the pass
        ends.
        """
        self._inner.update(shape[1:])
        if not fits or (data is not None and (data.requires_grad or self._is_given(data))):
            return fits
        if data is not None and (self._is_constant(data) or self._is_flattened(data)):
            return False
        self._doubtful[parameter] = None
        return True

    def _is_given(self, data: Tensor) -> bool:
        """Whether it is a tensor of the batch as it came."""
        memory = _memory(data)
        return memory not in self._born and memory not in self._kept and data._base is None

    def _is_constant(self, data: Tensor) -> bool:
        """Whether nothing of the batch is in it, and its rows differ."""
        memory = _memory(data)
        if memory in self._of_the_batch or memory not in self._born | self._kept or data.is_meta:
            return False
        return not torch.equal(data, data[:1].expand_as(data))

    def _is_flattened(self, data: Tensor) -> bool:
        """Whether nothing of the batch is in several rows an example."""
        memory = _memory(data)
        return memory in self._born - self._of_the_batch and data.shape[0] != self._batch_size

    def refuse_doubtful(self) -> None:
        """At the end of the pass.

        Raises:
            CaptureError: naming the parameters.
        """
        if self._doubtful and self._batch_size in self._inner:
            raise CaptureError(
                f"a pass of {self._batch_size} examples, which is also another dimension of what parameters meet: it "
                f"cannot be told which rows are the examples' for {', '.join(self._doubtful)}. Take another number of "
                "examples a pass, or give `per_example_factors` the forms of an inventory (take_inventory(...).forms)"
            )


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else id(tensor)
