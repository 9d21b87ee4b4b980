"""A pass over one example -> the same pass, in which new memory holds zeros.

`torch.empty` returns memory as it was left, which may hold numbers of other examples. A pass over one example that
reads such memory is no function of the parameters and the example, although nobody else is in its batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

NEW = {
    torch.empty,
    torch.empty_like,
    torch.empty_permuted,
    torch.empty_strided,
    Tensor.new_empty,
    Tensor.new_empty_strided,
    Tensor.new,
}
GROWN = {Tensor.resize_, Tensor.resize_as_}


class _Zeros(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in GROWN:
            return _grown(func, args, kwargs)
        result = func(*args, **kwargs)
        if func in NEW and not (func is Tensor.new and args[1:] and not isinstance(args[1], int | torch.Size)):
            result.detach().zero_()
        return result


def _grown(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `resize_` adds behind the numbers that were there is zeros."""
    before = args[0].untyped_storage().nbytes()
    result = func(*args, **kwargs)
    storage = args[0].untyped_storage()
    if storage.nbytes() > before:
        torch.empty(0, dtype=torch.uint8, device=args[0].device).set_(storage)[before:].zero_()
    return result


@contextmanager
def zeros_in_new_memory() -> Iterator[None]:
    """Within, memory from `torch.empty` and the like, asked for by Python code, holds zeros.

    Not seen: `torch.Tensor(2, 3)` and the other constructors that are named after a type.
    """
    with _Zeros():
        yield
