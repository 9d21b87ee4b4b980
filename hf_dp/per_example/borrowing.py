"""A model -> where it keeps its trainable parameters; for a pass, stand-ins there in their place.

Where they are is found by walking through all modules, which takes as long as some layers do. Within `places_kept` that
is done once for all passes; nothing may be frozen, added or moved there, as within a step.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from hf_dp.per_example.pairs import Pair, pair_in
from hf_dp.per_example.proxy import ParameterProxy, Value


class Place(NamedTuple):
    """A parameter and where one module keeps it."""

    module: nn.Module
    key: str
    name: str
    parameter: nn.Parameter


class Places:
    """Where a model keeps its trainable parameters; a tied one has several places, and the name of the first.

    Attributes:
        parameters: by name, in the order of `named_parameters`.
        pairs: LoRA's pairs among them that one tap takes (see `pairs`).
        shapes: of the parameters, and how many there are of each.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: list[Place] = []
        names: dict[int, str] = {}
        layers: list[LoraLinear] = []
        for prefix, module in _modules(model):
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    name = names.setdefault(id(parameter), f"{prefix}.{key}" if prefix else key)
                    self._places.append(Place(module, key, name, parameter))
            if type(module) is LoraLinear:
                layers.append(module)
        self.parameters = {place.name: place.parameter for place in self._places}
        self.pairs: list[Pair] = [pair for layer in layers if (pair := pair_in(layer, names)) is not None]
        self.shapes = Counter(p.shape for p in self.parameters.values())
        self._proxies: dict[str, ParameterProxy] = {}

    def proxies(self, capture: Value) -> Mapping[str, ParameterProxy]:
        """A proxy for each parameter, watched by `capture`: the same ones in every pass."""
        if not self._proxies:
            self._proxies = {name: ParameterProxy.of(p, name, capture) for name, p in self.parameters.items()}
        else:
            for proxy in self._proxies.values():
                proxy.capture = capture
                capture.watch(proxy)
        return self._proxies

    @contextmanager
    def lent(self, stand_ins: Mapping[str, Tensor]) -> Iterator[list[str]]:
        """Puts stand-ins wherever the model keeps the parameters, and always takes them out.

        Gradients that the parameters held are set aside during the pass. So a parameter that has one after it was used
        from elsewhere: it is a stray.

        Args:
            stand_ins: for every parameter, by name.

        Yields:
            The names of strays; filled when the pass is over.
        """
        strays: list[str] = []
        held = {name: p.grad for name, p in self.parameters.items()}
        try:
            for module, key, name, parameter in self._places:
                module._parameters[key] = stand_ins[name]  # type: ignore[assignment]
                parameter.grad = None
            yield strays
        finally:
            for module, key, _, parameter in self._places:
                module._parameters[key] = parameter
            strays += [name for name, p in self.parameters.items() if p.grad is not None]
            for name, p in self.parameters.items():
                p.grad = held[name]


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As `model.named_modules()`, in a third of the time."""
    waiting, seen = [("", model)], set()
    while waiting:
        prefix, module = waiting.pop()
        if module not in seen:
            seen.add(module)
            yield prefix, module
            inner = [(f"{prefix}.{key}" if prefix else key, m) for key, m in module._modules.items() if m is not None]
            waiting.extend(reversed(inner))


_kept: WeakKeyDictionary[nn.Module, Places] = WeakKeyDictionary()


def places_of(model: nn.Module) -> Places:
    """The model's places: those kept, or found now."""
    return _kept.get(model) or Places(model)


@contextmanager
def places_kept(model: nn.Module) -> Iterator[None]:
    """Around passes between which nothing changes but the examples: places are found once."""
    if model in _kept:
        yield
        return
    _kept[model] = Places(model)
    try:
        yield
    finally:
        del _kept[model]
