"""A model, its optimizer and the gradients that were released -> an error wherever anything else changes the weights.

What is compared is the bits themselves, as a sum over 64-bit words: a version counter would not see what is written
through `.data`. One read of the weights is a small part of a step, which reads them all in every pass.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_dp.errors import ConfigError, ReleaseError, UnsupportedOptionError
from hf_dp.per_example import refuse_hooks
from hf_dp.step.arithmetic import coarse_products


class WeightGuard:
    """Watches one model and the one optimizer that may change it, from `watch` to `leave`; before, and after, nothing.

    Guarantee: between two releases the weights (trainable, frozen, and the buffers that are saved) change by one
    `optimizer.step()` on exactly the gradients that were released, and by nothing else: not by a callback, a second
    optimizer, gradients added in between, or parameters that were never released. What is found is an error before the
    step, the next pass, or the next save.

    Attributes:
        waiting: gradients were released, and the optimizer has not stepped on them yet.
    """

    def __init__(self) -> None:
        self.waiting = False
        self._model: nn.Module | None = None
        self._optimizer: Any = None
        self._weights: dict[str, int] = {}
        self._gradients: dict[nn.Parameter, int] = {}
        self._within = 0  # steps under way: that of an optimizer may call that of its base class
        self._hooks: list[Any] = []

    def watch(self, model: nn.Module, optimizer: Any) -> None:
        """From here on `optimizer` steps on what was released alone. Nothing where it is watched already.

        Raises:
            ConfigError: it holds parameters that are not the model's, or its steps cannot be seen.
        """
        if self._model is not None:
            return
        refuse_foreign_parameters(model, optimizer)
        self._model, self._optimizer = model, optimizer
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def leave(self) -> None:
        """Takes the hooks off the optimizer."""
        for hook in self._hooks:
            hook.remove()
        self._model = self._optimizer = None
        self._weights, self._gradients, self._hooks, self.waiting = {}, {}, [], False

    def before_pass(self) -> None:
        """To be called before every step's first pass; an optimizer with a training mode (schedule-free ones) is put in
        it.

        Raises:
            ReleaseError: the weights are not those that the last step left, or that step never came.
            UnsupportedOptionError: matrix products have fewer bits than when training began.
            UnsupportedParameterError: hooks on parameters, which would not be called.
        """
        assert self._model is not None, "before_pass before watch"
        self.check()
        if self.waiting:
            raise ReleaseError(
                "the last release is still without its optimizer.step(): one step for each release, by the optimizer "
                "that was given"
            )
        if coarse := list(coarse_products()):
            raise UnsupportedOptionError("changed since training began: " + "; ".join(coarse))
        refuse_hooks(self._model)
        self._switch("train")

    def before_evaluation(self) -> None:
        """To be called before an evaluation in a training: an optimizer with an evaluation mode is put in it, and
        nothing else changes.

        Raises:
            ReleaseError: the weights are not those that the last step left.
        """
        if self._model is not None and self._weights:
            self.check()
            self._switch("eval")

    def released(self) -> None:
        """To be called when the gradients that may be stepped on lie in `p.grad`."""
        assert self._model is not None, "released before watch"
        self._gradients = _gradient_sums(p for p in self._model.parameters() if p.requires_grad)
        self.waiting, self._within = True, 0

    def check(self) -> None:
        """An error if the weights are not those that the optimizer left; nothing before the first pass.

        Raises:
            ReleaseError: naming what has changed.
        """
        if self._model is None or not self._weights:
            return
        now = _sums(_kept(self._model))
        changed = [name for name in now.keys() | self._weights.keys() if now.get(name) != self._weights.get(name)]
        if changed:
            raise ReleaseError(
                f"{_listed(sorted(changed))} changed otherwise than by the optimizer's step on what was released: a "
                "callback, a second optimizer, an average written back, or an adapter merged and unmerged. Do it to a "
                "copy of the model, or after training"
            )

    def _switch(self, mode: str) -> None:
        """`optimizer.train()` or `.eval()` where it has them: they may exchange the weights for others of its own."""
        assert self._model is not None
        switch = getattr(self._optimizer, mode, None)
        if callable(switch):
            switch()
        if callable(switch) or not self._weights:
            self._weights = _sums(_kept(self._model))

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._within:
            self._within += 1
            return
        if not self.waiting:
            raise ReleaseError("optimizer.step() without a release: each step takes one, once")
        if any(a is not None for a in (*args[1:], *kwargs.values())):
            raise ReleaseError(
                "optimizer.step() takes no closure: it would compute gradients without clipping and noise"
            )
        assert self._model is not None
        refuse_foreign_parameters(self._model, self._optimizer)
        stepped = dict.fromkeys([*self._gradients, *_held(self._optimizer)])
        now = _gradient_sums(stepped)
        wrong = [p for p in stepped if now.get(p) != self._gradients.get(p)]
        if wrong:
            names = {p: name for name, p in self._model.named_parameters()}
            raise ReleaseError(
                f"the gradients of {_listed([names.get(p, 'a parameter no longer in the model') for p in wrong])} are "
                "not those that were released: let no loss.backward(), callback or hook beside write to them"
            )
        self.check()
        self._within = 1

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        assert self._model is not None
        self._within -= 1
        if not self._within:
            self.waiting, self._gradients = False, {}
            self._weights = _sums(_kept(self._model))


def refuse_foreign_parameters(model: nn.Module, optimizer: Any) -> None:
    """An optimizer may hold the model's parameters alone.

    Raises:
        ConfigError: it holds others, or its steps cannot be watched.
    """
    if wrong := [*foreign_parameters(model, optimizer)]:
        raise ConfigError("; ".join(wrong))


def foreign_parameters(model: nn.Module, optimizer: Any) -> Iterator[str]:
    """What is wrong with the optimizer, in words."""
    if not isinstance(optimizer, torch.optim.Optimizer) or "_optimizer_step_pre_hooks" not in vars(optimizer):
        yield (
            f"the steps of {type(optimizer).__name__} cannot be watched: give a torch.optim.Optimizer whose __init__ "
            "calls super().__init__(params, defaults)"
        )
        return
    own = set(model.parameters())
    if foreign := [list(p.shape) for p in _held(optimizer) if p not in own]:
        yield (
            f"the optimizer holds {len(foreign)} parameters that are not the model's (of shapes "
            f"{_listed(map(str, foreign))}), which would be trained without clipping and noise: make what holds them a "
            "submodule of the model (model.loss_head = head; an nn.ModuleList or nn.ModuleDict in place of a list or "
            "dict), or leave them out of the optimizer and freeze them (requires_grad_(False))"
        )


def _held(optimizer: Any) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _kept(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and the buffers that are saved: what a checkpoint holds of the model, tied ones once."""
    saved = {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
    return {**dict(model.named_parameters()), **saved}


def _gradient_sums(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, int]:
    """Of each parameter that has a gradient."""
    with_gradient = [p for p in dict.fromkeys(parameters) if p.grad is not None]
    sums = _sums({str(i): p.grad for i, p in enumerate(with_gradient) if p.grad is not None})
    return dict(zip(with_gradient, sums.values(), strict=True))


@torch.no_grad()
def _sums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Name -> the sum of its 64-bit words, modulo 2**64; one wait for the device in all."""
    with torch._C.DisableTorchFunctionSubclass():
        words = [_sum_of_words(t) for t in tensors.values()]
        together = torch.stack([w.to(words[0].device) for w in words]).tolist() if words else []
    return dict(zip(tensors, together, strict=True))


def _sum_of_words(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if tensor.is_meta:  # lies elsewhere, as a module's hooks say
        return torch.zeros((), dtype=torch.int64)
    if is_traceable_wrapper_subclass(tensor):  # sharded or quantised: what it is made of
        parts, _ = tensor.__tensor_flatten__()
        return torch.stack([_sum_of_words(getattr(tensor, part)) for part in parts]).sum()
    dense = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    flat = dense.detach().contiguous().reshape(-1)
    octets = (torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).view(torch.uint8)
    start = -octets.storage_offset() % 8
    end = start + max(0, len(octets) - start) // 8 * 8
    ends = octets[:start].sum(dtype=torch.int64) + octets[end:].sum(dtype=torch.int64)
    return ends + octets[start:end].view(torch.int64).sum()


def _listed(names: Iterable[str]) -> str:
    """The first few of them, and how many more."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
