"""Trained weights in shards (FSDP2) -> for a pass, stand-ins wherever the model gathers them whole.

A module whose weights are gathered keeps them whole from just before its forward or backward until just after, in one
tensor that is filled anew each time. A stand-in over that tensor's memory takes its place in the module, so that FSDP2
never sees a gradient, and reduces none.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from typing import Any
from unittest import mock

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_dp.errors import UnsupportedOptionError

PARAMETER = "torch.distributed.fsdp._fully_shard._fsdp_param"  # torch 2.6 to 2.13
NEEDED = "to_unsharded", "_setattr_on_modules"


def trains_shards(model: nn.Module) -> bool:
    """Whether any trained parameter lies in parts on several processes."""
    return any(p.requires_grad and isinstance(p, DTensor) for p in model.parameters())


def let_go(model: nn.Module) -> None:
    """Puts this process's parts in place of whole weights, which a pass without backward leaves behind."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def lent_when_gathered(
    model: nn.Module, names: Mapping[nn.Parameter, str], stand_in: Callable[[str, Tensor], Tensor]
) -> Iterator[None]:
    """Around a pass.

    Args:
        model: whose weights are gathered by module.
        names: trained parameter, as it lies in shards -> its name.
        stand_in: (name, whole values) -> what is put in the modules in their place.

    Raises:
        UnsupportedOptionError: this version of PyTorch gathers in another way, or two places of a tied weight apart.
    """
    owner: Any = vars(import_module(PARAMETER)).get("FSDPParam")
    if owner is None or any(name not in vars(owner) for name in NEEDED):
        raise UnsupportedOptionError(
            "trained weights in shards: this version of PyTorch gathers them in a way that is not known here; use one "
            "from 2.7 to 2.13, train an adapter on the sharded base (get_peft_model), or use DDP"
        )
    original, gathered_by = owner.to_unsharded, dict[str, Any]()

    @wraps(original)
    def to_unsharded(self: Any) -> None:
        original(self)
        name = names.get(self.sharded_param)
        if name is not None and gathered_by.setdefault(name, self) is self:
            self._setattr_on_modules(stand_in(name, self._unsharded_param))
        elif self.sharded_param.requires_grad:
            raise UnsupportedOptionError(
                f"{name or 'a weight that its module does not hold'} is trained, in shards, and gathered apart in the "
                "places that are tied, where a step would not reach all of them: let accelerate shard the model "
                "(fsdp_version: 2) instead of loading it in shards, or train an adapter on it (get_peft_model)"
            )

    try:
        with mock.patch.object(owner, "to_unsharded", to_unsharded):
            yield
    finally:
        let_go(model)
