"""A model and a pass over it -> errors for gradients that reach tensors outside of the model, and for hooks on
gradients.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dp.errors import UnsupportedParameterError
from hf_dp.per_example.proxy import tensors_in


def hooks_in(model: nn.Module) -> Iterator[str]:
    """The names of everything in the model that has a hook on gradients: none of these hooks would work as intended.

    A hook on a trainable parameter would not run, because another tensor stands in for the parameter in every pass. A
    hook on a module would see the gradients of a whole micro-batch, and could mix or keep those of its examples.
    """
    for name, p in model.named_parameters():
        hooks = [*(p._backward_hooks or {}).values(), *(p._post_accumulate_grad_hooks or {}).values()]
        if p.requires_grad and not all(map(_averages, hooks)):
            yield name
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            yield f"{name or type(module).__name__} (a module)"
    if of_all_modules._global_backward_hooks or of_all_modules._global_backward_pre_hooks:
        yield "all modules (register_module_full_backward_hook)"


def _averages(hook: object) -> bool:
    """Whether this is the hook by which Trainer averages gradients over the processes of a sharded model.

    It is not needed and never runs: the release adds up the sums of all processes.
    """
    return getattr(hook, "__module__", "") == "transformers.trainer"


def refuse_hooks(model: nn.Module) -> None:
    """To be called before a pass.

    Raises:
        UnsupportedParameterError: naming everything that has hooks on gradients.
    """
    if hooked := list(hooks_in(model)):
        raise UnsupportedParameterError(
            f"hooks on gradients of {', '.join(hooked)}: gradients are formed example by example, where hooks do not "
            "run, or see many examples at once. Remove them (handle.remove()). To train some rows of a table alone, "
            "put them in a parameter of their own and freeze the table (peft: "
            "LoraConfig(trainable_token_indices=...)); to change the update, change the optimizer"
        )


class _Leaves(TorchDispatchMode):
    """Notes every leaf outside of the model that requires a gradient and is used; sets aside its gradient."""

    def __init__(self, model: nn.Module, anchor: Tensor) -> None:
        super().__init__()
        self._model = model
        self._own = {id(anchor)}
        self._made: dict[int, Tensor] = {}  # results of the pass are no parameters, even if they are made leaves
        self._seen: dict[int, tuple[Tensor, Tensor | None]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        in_backward = torch._C._current_graph_task_id() != -1  # there, checkpointing makes leaves of its own
        for t in () if in_backward else tensors_in([args, kwargs]):
            if t.requires_grad and t.is_leaf and id(t) not in self._seen and not self._is_own(t):
                self._seen[id(t)] = t, t.grad
                t.grad = None
        result = func(*args, **kwargs)
        self._made.update({id(t): t for t in tensors_in([result])})
        return result

    def _is_own(self, leaf: Tensor) -> bool:
        """Whether the pass made the leaf, or the model holds it now.

        During a pass the model holds stand-ins in the place of its parameters.
        """
        if id(leaf) in self._made:
            return True
        if id(leaf) not in self._own:
            self._own.update(map(id, self._model.parameters()))
        return id(leaf) in self._own

    def give_back(self) -> list[Tensor]:
        """Puts all gradients back as they were; returns the leaves that got one in the pass."""
        self._made = {}
        reached = [t for t, _ in self._seen.values() if t.grad is not None]
        for t, grad in self._seen.values():
            t.grad = grad
        return reached


@contextmanager
def nothing_outside(model: nn.Module, anchor: Tensor) -> Iterator[None]:
    """Around a forward and backward pass: only leaves of the model, or the `Capture`'s anchor, may get a gradient.

    A leaf that is used but gets no gradient is allowed, for example a teacher's weight under `no_grad`.

    Raises:
        UnsupportedParameterError: naming leaves outside of the model that got a gradient; raised after the pass.
    """
    leaves = _Leaves(model, anchor)
    try:
        with leaves:
            yield
    finally:
        reached = leaves.give_back()
    if reached:
        names = ", ".join(_name(model, t) for t in reached)
        raise UnsupportedParameterError(
            f"gradients reach {len(reached)} tensors that are not parameters of the model: {names}. They would be "
            "neither clipped nor noised. Make what holds them a submodule of the model (model.loss_head = head; an "
            "nn.ModuleList or nn.ModuleDict in place of a list or dict), so that they are trained with it, or freeze "
            "them (requires_grad_(False))"
        )


def _name(model: nn.Module, leaf: Tensor) -> str:
    """Where the model keeps a tensor that is not registered with it; if nowhere, the tensor's shape."""
    for prefix, module in model.named_modules():
        for key, value in vars(module).items():
            for at, held in _members(value):
                inner = held.named_parameters() if isinstance(held, nn.Module) else [("", held)]
                for name, tensor in inner:
                    if tensor is leaf:
                        return ".".join(filter(None, [prefix, f"{key}{at}", name]))
    return f"one of shape {list(leaf.shape)}"


def _members(value: object) -> Iterator[tuple[str, object]]:
    """The value itself; or, of a plain list, tuple or dict, what it holds, each with its place."""
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    yield from ((f"[{key!r}]", item) for key, item in items)
    if not items:
        yield "", value
