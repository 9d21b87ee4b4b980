"""A model, its optimizer and the released gradients -> an error wherever anything else changes the weights."""

import sys
import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_dp.errors import ConfigError, ReleaseError, UnsupportedOptionError
from hf_dp.per_example import checksums, let_go, refuse_hooks
from hf_dp.step.arithmetic import coarse_products


class WeightGuard:
    """Watches one model, and the one optimizer that may change it, from `watch` to `leave`.

    Guarantee: between two releases the weights (trainable, frozen, and the buffers that are saved) change only by one
    `optimizer.step()` on exactly the gradients that were released: not by a callback, a second optimizer, gradients
    added in between, or parameters that were never released. Any other change is an error before the step, at the next
    pass, or at the next save.

    Attributes:
        waiting: gradients were released, and the optimizer has not stepped on them yet.
    """

    def __init__(self) -> None:
        self.waiting = False
        self._model: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._weights: dict[str, int] = {}
        self._gradients: dict[nn.Parameter, int] = {}
        self._within = 0  # steps under way: an optimizer's step may call the step of its base class
        self._outermost: types.FrameType | None = None  # of them
        self._hooks: list[RemovableHandle] = []

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """From here on, `optimizer` may step only on what was released. Does nothing if a model is watched already.

        Raises:
            ConfigError: the optimizer holds parameters that are not the model's, or its steps cannot be watched.
        """
        if self._model is not None:
            return
        refuse_foreign_parameters(model, optimizer)
        self._model, self._optimizer = model, optimizer
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        # what other hooks write is then seen as a change
        hooks = cast("OrderedDict[int, object]", optimizer._optimizer_step_post_hooks)
        hooks.move_to_end(self._hooks[1].id, last=False)

    def leave(self) -> None:
        """Stops watching, and takes the hooks off the optimizer."""
        for hook in self._hooks:
            hook.remove()
        self._model = self._optimizer = None
        self._weights, self._gradients, self._hooks, self.waiting = {}, {}, [], False

    def before_pass(self) -> None:
        """To be called before the first pass of every step; puts optimizers that have a training mode into it.

        Raises:
            ReleaseError: the weights are not as the last step left them, or that step never came.
            UnsupportedOptionError: matrix products are computed with fewer bits than when training began.
            UnsupportedParameterError: parameters have hooks, which would not be called.
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
        """To be called before an evaluation during training; puts optimizers that have an evaluation mode into it.

        Raises:
            ReleaseError: the weights are not as the last step left them.
        """
        if self._model is not None and self._weights:
            self.check()
            self._switch("eval")

    def released(self) -> None:
        """To be called when the released gradients lie in `p.grad`: one step on them is allowed."""
        assert self._model is not None, "released before watch"
        self._gradients = _gradient_checksums(p for p in self._model.parameters() if p.requires_grad)
        self.waiting, self._within = True, 0

    def check(self) -> None:
        """Compares the weights with those that the optimizer left; does nothing before the first pass.

        Raises:
            ReleaseError: naming what has changed.
        """
        if self._model is None or not self._weights:
            return
        now = checksums(_kept(self._model))
        changed = [name for name in now.keys() | self._weights.keys() if now.get(name) != self._weights.get(name)]
        if changed:
            raise ReleaseError(
                f"{_listed(sorted(changed))} changed otherwise than by the optimizer's step on what was released: a "
                "callback, a second optimizer, an average written back, or an adapter merged and unmerged. Do it to a "
                "copy of the model, or after training"
            )

    def _switch(self, mode: str) -> None:
        """Calls `optimizer.train()` or `.eval()` if it has them (schedule-free ones do); that may exchange weights."""
        assert self._model is not None
        switch = getattr(self._optimizer, mode, None)
        if callable(switch):
            switch()
        if callable(switch) or not self._weights:
            self._weights = checksums(_kept(self._model))

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        if self._within and _is_at_work(self._outermost):
            self._within += 1
            return
        self._within = 0  # a step that ended in an exception is over
        if not self.waiting:
            raise ReleaseError("optimizer.step() without a release: each step takes one, once")
        if any(a is not None for a in (*args[1:], *kwargs.values())):
            raise ReleaseError(
                "optimizer.step() takes no closure: it would compute gradients without clipping and noise"
            )
        assert self._model is not None
        assert self._optimizer is not None
        if next(reversed(optimizer._optimizer_step_pre_hooks), None) != self._hooks[0].id:
            raise ReleaseError(
                "a step pre-hook was registered on the optimizer after this training began, and would run after the "
                "gradients are looked at: register it before, or remove it"
            )
        refuse_foreign_parameters(self._model, self._optimizer)
        stepped = dict.fromkeys([*self._gradients, *_held(self._optimizer)])
        now = _gradient_checksums(stepped)
        wrong = [p for p in stepped if now.get(p) != self._gradients.get(p)]
        if wrong:
            names = {p: name for name, p in self._model.named_parameters()}
            raise ReleaseError(
                f"the gradients of {_listed([names.get(p, 'a parameter no longer in the model') for p in wrong])} are "
                "not those that were released: let no loss.backward(), callback or hook beside write to them"
            )
        self.check()
        self._within, self._outermost = 1, sys._getframe(1)

    def _after_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        assert self._model is not None
        self._within -= 1
        if not self._within:
            self._outermost = None
            self.waiting, self._gradients = False, {}
            self._weights = checksums(_kept(self._model))


def _is_at_work(frame: types.FrameType | None) -> bool:
    """Whether a call is still under way."""
    at: types.FrameType | None = sys._getframe(1)
    while at is not None and at is not frame:
        at = at.f_back
    return at is not None


def refuse_foreign_parameters(model: nn.Module, optimizer: object) -> None:
    """An optimizer may hold only the model's own parameters.

    Raises:
        ConfigError: it holds others, or its steps cannot be watched.
    """
    if wrong := [*foreign_parameters(model, optimizer)]:
        raise ConfigError("; ".join(wrong))


def foreign_parameters(model: nn.Module, optimizer: object) -> Iterator[str]:
    """What is wrong with the optimizer's parameters, or with watching its steps, in words."""
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


def _held(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _kept(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of the model: parameters, tied ones once, and the buffers that are saved."""
    let_go(model)
    saved = {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
    return {**dict(model.named_parameters()), **saved}


def _gradient_checksums(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, int]:
    """The checksum of `p.grad` for each parameter that has a gradient."""
    with_gradient = [p for p in dict.fromkeys(parameters) if p.grad is not None]
    sums = checksums({str(i): p.grad for i, p in enumerate(with_gradient) if p.grad is not None})
    return dict(zip(with_gradient, sums.values(), strict=True))


def _listed(names: Iterable[str]) -> str:
    """The first few of them, and how many more."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
