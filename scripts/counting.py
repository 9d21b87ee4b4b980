"""A function -> how many kernels a GPU would be given by it: PyTorch's operations that compute or copy something."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

FREE = frozenset(
    "detach alias lift_fresh _unsafe_view empty empty_like empty_strided new_empty new_empty_strided".split()
)
TOGETHER = 64  # tensors to one kernel of an operation on a list of tensors, as in PyTorch's `multi_tensor_apply`


class Kernels(TorchDispatchMode):
    """Counts the operations of what runs within, on the CPU (where backward runs in the same thread), by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if not func.is_view and name not in FREE:
            self.found[name] += -(-len(args[0]) // TOGETHER) if name.startswith("_foreach") else 1
        return func(*args, **(kwargs or {}))


def kernels_of(run: Callable[[], object]) -> Counter[str]:
    """Kernels by the operation's name. An operation counts as one, though some launch several on a GPU."""
    with Kernels() as counted:
        run()
    return counted.found
