"""A trainer whose trained weights lie in shards -> its files whole, as without shards; and files -> shards.

So a training may go on with other processes, sharded or not. What is written is gathered by all processes, a tensor
after another, and kept on the one that writes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer

from hf_dp.errors import UnsupportedOptionError
from hf_dp.step import sharding

if TYPE_CHECKING:
    _Host = Trainer  # what a mixin may count on
else:
    _Host = object


class ShardedStates(_Host):
    """The part of `DPTrainerMixin` that writes and reads weights and optimizer states in shards."""

    model: Any
    optimizer: Any

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        loaded_so = vars(getattr(self.model, "config", None) or self).get("distributed_config") is not None
        if sharding.trains_shards(self.model) and not loaded_so:  # the host gathers what it loaded in shards itself
            state_dict = _whole(self.model.state_dict(), kept=self.args.should_save)
            if not self.args.should_save:
                return
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not sharding.trains_shards(self.model):
            return super()._save_optimizer_and_scheduler(output_dir)
        whole = _whole_states(self.optimizer, kept=self.args.should_save)
        with mock.patch.object(self.optimizer, "state_dict", return_value=whole):
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not sharding.trains_shards(self.model):
            return super()._load_optimizer_and_scheduler(checkpoint)
        load = self.optimizer.load_state_dict

        def load_shards(whole: dict[str, Any]) -> None:
            load(_states_in_shards(self.optimizer, whole))

        with mock.patch.object(self.optimizer, "load_state_dict", load_shards):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with _loading_shards(self.model if model is None else model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with _loading_shards(self.model):
            super()._load_best_model()


def _whole(tensors: dict[str, Any], *, kept: bool) -> dict[str, Any]:
    """The tensors with shards gathered on the CPU; nothing where they are not `kept`. Every process calls it."""
    whole: dict[str, Any] = {}
    for name, value in tensors.items():
        gathered = value.full_tensor().cpu() if isinstance(value, DTensor) else value
        if kept:
            whole[name] = gathered
    return whole


def _whole_states(optimizer: Any, *, kept: bool) -> dict[str, Any]:
    """`optimizer.state_dict()` as of whole parameters.

    Raises:
        UnsupportedOptionError: a state in shards has another shape than its parameter, so that it could not be read.
    """
    found, parameters = optimizer.state_dict(), _parameters(optimizer)
    for number, states in found["state"].items():
        odd = [k for k, v in states.items() if isinstance(v, DTensor) and v.shape != parameters[number].shape]
        if odd:
            raise UnsupportedOptionError(
                f"the optimizer's {odd[0]} has another shape than its parameter, which lies in shards: its state can't "
                "be saved. Use adamw_torch or sgd, or set save_only_model=True or save_strategy='no'"
            )
    return {**found, "state": {number: _whole(states, kept=kept) for number, states in found["state"].items()}}


def _states_in_shards(optimizer: Any, whole: dict[str, Any]) -> dict[str, Any]:
    parameters = _parameters(optimizer)
    states = {
        number: {key: _as(parameters[number], value) for key, value in of_one.items()}
        for number, of_one in whole["state"].items()
    }
    return {**whole, "state": states}


def _parameters(optimizer: Any) -> list[nn.Parameter]:
    """In the order in which the optimizer numbers them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _as(p: Tensor | None, value: Any) -> Any:
    """A whole tensor of the shape of a parameter in shards -> this process's shard; anything else as it is."""
    if not isinstance(p, DTensor) or not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    if value.shape != p.shape:
        return value
    return distribute_tensor(value.to(p.to_local().device), p.device_mesh, p.placements, src_data_rank=None)


@contextmanager
def _loading_shards(model: nn.Module) -> Iterator[None]:
    """Within, `model.load_state_dict` takes whole tensors for what lies in shards."""
    if not sharding.trains_shards(model):
        yield
        return
    sharding.let_go(model)
    load: Callable[..., Any] = model.load_state_dict

    def load_shards(whole: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        own = model.state_dict(keep_vars=True)
        return load({name: _as(own.get(name), value) for name, value in whole.items()}, *args, **kwargs)

    with mock.patch.object(model, "load_state_dict", load_shards):
        yield
