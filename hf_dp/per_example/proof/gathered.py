"""A watched pass over weights in shards (FSDP2) -> the same pass, in which gathering and freeing weights goes unseen.

Other processes write what is gathered, which no operation here shows, and memory is freed and taken again in between.
None of it depends on an example: only weights are gathered. So gathered weights count as weights do.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from importlib import import_module
from typing import Any
from unittest import mock

GROUP = "torch.distributed.fsdp._fully_shard._fsdp_param_group"  # torch 2.6 to 2.13
METHODS = "unshard", "wait_for_unshard", "reshard"


@contextmanager
def unseen(apart: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Within, weights are gathered and freed within `apart()`. Where PyTorch has no such methods, it changes nothing,
    so that the proof fails.
    """
    try:
        owner: Any = import_module(GROUP).FSDPParamGroup
        originals = {name: getattr(owner, name) for name in METHODS}
    except (ImportError, AttributeError):
        yield
        return
    with ExitStack() as stack:
        for name, original in originals.items():
            stack.enter_context(mock.patch.object(owner, name, _within(original, apart)))
        yield


def _within(original: Callable[..., Any], apart: Callable[[], AbstractContextManager[None]]) -> Callable[..., Any]:
    @wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        with apart():
            return original(*args, **kwargs)

    return method
