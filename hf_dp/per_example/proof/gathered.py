"""A watched pass over weights in shards (FSDP2) -> the same pass, in which gathering and freeing weights goes unseen.

Other processes write what is gathered, which no operation here shows, and memory is freed and taken again in between.
None of it depends on an example: only weights are gathered. So gathered weights count as weights do, and trained ones
as trained. Gradients of trained ones are dropped where they would be reduced: a proof needs none.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from importlib import import_module
from typing import Any
from unittest import mock

from torch import Tensor

GROUP = "torch.distributed.fsdp._fully_shard._fsdp_param_group"  # torch 2.6 to 2.13
METHODS = "unshard", "wait_for_unshard", "reshard", "post_backward"


@contextmanager
def unseen(apart: Callable[[], AbstractContextManager[None]], trained: Callable[[Tensor], None]) -> Iterator[None]:
    """Within, weights are gathered and freed within `apart()`, and `trained` is told whole ones that are trained. Where
    PyTorch has no such methods, it changes nothing, so that the proof fails.
    """
    try:
        owner: Any = import_module(GROUP).FSDPParamGroup
        originals = {name: getattr(owner, name) for name in METHODS}
    except (ImportError, AttributeError):
        yield
        return
    with ExitStack() as stack:
        for name, original in originals.items():
            stack.enter_context(mock.patch.object(owner, name, _within(original, apart, trained)))
        yield


def _within(
    original: Callable[..., Any],
    apart: Callable[[], AbstractContextManager[None]],
    trained: Callable[[Tensor], None],
) -> Callable[..., Any]:
    @wraps(original)
    def method(group: Any, *args: Any, **kwargs: Any) -> Any:
        with apart():
            if original.__name__ == "post_backward":
                for weight in _whole(group):
                    weight.grad = None
            result = original(group, *args, **kwargs)
            for weight in _whole(group):
                if weight.requires_grad:
                    trained(weight)
            return result

    return method


def _whole(group: Any) -> list[Any]:
    """The tensors that hold a group's weights whole; before they are first gathered there are none."""
    return [p._unsharded_param for p in group.fsdp_params if "_unsharded_param" in vars(p)]
