"""A linear layer with LoRA -> the same layer, whose pair A, B is taken by one tap in a pass: the fast path.

What `peft` computes as

    result = base(x);  result = result + B(A(dropout(x))) * scaling

is four operations forward and seven backward besides the base, two of them under a rule each. The tap takes two and
four, with less Python between them. It is used where nothing but this formula can be meant: the class is peft's own,
one adapter is active, and its A and B are plain linear maps without bias, both trained. Anything else goes the general
way, and so does every pass of an inventory: what it finds of the rows that A and B meet holds here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules

from hf_dp.per_example.operations import autocast
from hf_dp.per_example.proxy import Value
from hf_dp.per_example.taps import PairedLinearTap, PairTap


class Pair:
    """LoRA's A [k, d] and B [r, k] in one linear layer.

    Args:
        layer: of peft.
        adapter: the one that is active.
        names: of the weights of A and B.
    """

    def __init__(self, layer: Any, adapter: str, names: tuple[str, str]) -> None:
        self.layer, self._adapter, self._names = layer, adapter, names
        self._own, self._base, self._dropout = layer.forward, layer.base_layer, layer.lora_dropout[adapter]
        frozen = not any(p.requires_grad for p in self._base.parameters())
        self._one_map = frozen and _is_bare(self._base) and type(self._dropout) is nn.Identity
        self._maps = layer.lora_A[adapter], layer.lora_B[adapter], self._base
        self._a, self._b = (m.weight.detach() for m in self._maps[:2])

    def forward_in(self, capture: Value) -> Callable[..., Tensor]:
        """The layer's forward in the pass that `capture` records."""
        sinks = [partial(capture.record, name) for name in self._names]

        def forward(x: Tensor, *args: Value, **kwargs: Value) -> Tensor:
            if args or kwargs or not torch.is_grad_enabled() or not self._is_as_found() or not self._leads(capture, x):
                return self._own(x, *args, **kwargs)
            how = self.layer.scaling[self._adapter], capture.batch_size, *sinks
            base = self._base_weights(x)
            if base is not None:
                result: Tensor = PairedLinearTap.apply(x, capture.anchor, base, (self._a, self._b), *how)
                return result
            y = self._base(x)
            x = self._dropout(self.layer._cast_input_dtype(x, self._a.dtype))
            x, a, b = autocast(x, self._a, self._b)
            result = PairTap.apply(x, y, capture.anchor, (a, b), *how)
            return result

        return forward

    def holds(self) -> bool:
        """Whether the layer is still one that the tap covers, with the weights that it had."""
        same = all(m.weight.data_ptr() == w.data_ptr() for m, w in zip(self._maps, (self._a, self._b), strict=False))
        return same and _is_covered(self.layer, self._adapter) and (not self._one_map or _is_bare(self._base))

    def _is_as_found(self) -> bool:
        """Whether the adapter is active and nobody watches: a loss may switch it off, or hang hooks up, for a while."""
        layer = self.layer
        active = not (layer.disable_adapters or layer.merged) and list(layer.active_adapters) == [self._adapter]
        return active and not any(m._forward_hooks or m._forward_pre_hooks for m in self._maps)

    def _base_weights(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of the base where the tap may compute it too; None where it has to be called."""
        if not self._one_map or x.dtype != self._a.dtype or torch.is_autocast_enabled(x.device.type):
            return None
        weight, bias = self._base.weight, self._base.bias
        return (weight, bias) if weight.dtype == x.dtype else None

    def _leads(self, capture: Value, x: Tensor) -> bool:
        """Whether the rows that A and B meet are the examples' (see `forms`)."""
        a, b = self._names
        shape = (*x.shape[:-1], self._b.shape[1])
        return capture.leads(a, "linear", x.shape, flat=True) and capture.leads(b, "linear", shape, flat=True)


def pair_in(module: LoraLinear, names: Mapping[int, str]) -> Pair | None:
    """The pair in a layer, if it has one that the tap covers.

    Args:
        module: of exactly this class of peft.
        names: of the trained parameters, by identity.
    """
    adapters = list(module.active_adapters)
    if len(adapters) != 1 or not _is_covered(module, adapters[0]):
        return None
    a, b = (names.get(id(m[adapters[0]].weight)) for m in (module.lora_A, module.lora_B))
    return None if a is None or b is None else Pair(module, adapters[0], (a, b))


def _is_covered(layer: LoraLinear, adapter: str) -> bool:
    """Whether an adapter of the layer is LoRA as it was published, and nobody changed or watches how it is computed."""
    if "forward" in vars(layer) or adapter not in layer.lora_A or adapter in layer.lora_variant:
        return False
    return all(_is_bare(m) and m.bias is None for m in (layer.lora_A[adapter], layer.lora_B[adapter]))


def _is_bare(module: nn.Module) -> bool:
    """Whether calling it computes a linear map of a whole weight and nothing else, and nobody watches."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    hooks = hooks or of_all_modules._global_forward_hooks or of_all_modules._global_forward_pre_hooks
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and not hooks
        and "forward" not in vars(module)
    )


@contextmanager
def one_tap_each(pairs: Sequence[Pair], capture: Value) -> Iterator[None]:
    """Within, the layers of `pairs` compute the same by one tap; they are always given their own forward back."""
    try:
        for pair in pairs:
            vars(pair.layer)["forward"] = pair.forward_in(capture)
        yield
    finally:
        for pair in pairs:
            vars(pair.layer).pop("forward", None)
