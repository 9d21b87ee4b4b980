"""A model -> where it keeps its trainable parameters; for a pass, stand-ins there in their place.

To find them takes a walk through all modules. Within `places_kept`, as within a step, the places of an earlier walk are
taken as long as they hold.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_dp.per_example.gathering import lent_when_gathered
from hf_dp.per_example.pairs import Pair, pair_in
from hf_dp.per_example.proxy import ParameterProxy, Value


class Place(NamedTuple):
    """Where a module keeps a parameter."""

    module: nn.Module
    key: str
    name: str
    parameter: nn.Parameter


class Seen(NamedTuple):
    """What a module held when it was walked through: modules, and parameters with whether they are trained."""

    module: nn.Module
    modules: dict[str, nn.Module | None]
    parameters: list[tuple[str, int, bool]]


class Places:
    """Where a model keeps its trainable parameters; a tied one has several places, and the name of the first.

    Attributes:
        parameters: by name, in the order of `named_parameters`.
        whole: those of them that do not lie in shards.
        shapes: of the parameters, and how many there are of each.
        pairs: LoRA's pairs among them that one tap takes (see `pairs`).
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._places: list[Place] = []
        self._seen: list[Seen] = []
        names: dict[int, str] = {}
        layers: list[LoraLinear] = []
        for prefix, module in model.named_modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what an evaluation gathered; before those within are looked at
            self._seen.append(Seen(module, dict(module._modules), _parameters(module)))
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    name = names.setdefault(id(parameter), f"{prefix}.{key}" if prefix else key)
                    self._places.append(Place(module, key, name, parameter))
            if type(module) is LoraLinear:
                layers.append(module)
        self.parameters = {place.name: place.parameter for place in self._places}
        self.whole = {name: p for name, p in self.parameters.items() if not isinstance(p, DTensor)}
        sharded = [(p, name) for name, p in self.parameters.items() if isinstance(p, DTensor)]
        self._in_shards: dict[nn.Parameter, str] = dict(sharded)
        self.shapes = Counter(p.shape for p in self.parameters.values())
        self.pairs: list[Pair] = [pair for layer in layers if (pair := pair_in(layer, names)) is not None]
        self._proxies: dict[str, ParameterProxy] = {}

    def hold(self, model: nn.Module) -> bool:
        """Whether this is the model, with the same modules and parameters, trained and in memory as they were."""
        return (
            model is self._model
            and all(s.module._modules == s.modules and _parameters(s.module) == s.parameters for s in self._seen)
            and all(p.data_ptr() == self.parameters[name].data_ptr() for name, p in self._proxies.items())
            and all(pair.holds() for pair in self.pairs)
        )

    def proxies(self, capture: Value) -> Mapping[str, ParameterProxy]:
        """A proxy for each whole parameter, watched by `capture`: the same ones in every pass."""
        if not self._proxies:
            self._proxies = {name: ParameterProxy.of(p, name, capture) for name, p in self.whole.items()}
        else:
            for proxy in self._proxies.values():
                proxy.capture = capture
                capture.watch(proxy)
        return self._proxies

    @contextmanager
    def lent(
        self, stand_ins: Mapping[str, Tensor], of_gathered: Callable[[str, Tensor], Tensor]
    ) -> Iterator[list[str]]:
        """Puts stand-ins wherever the model keeps the parameters, and always takes them out.

        Gradients that the parameters held are set aside during the pass. So a parameter that has one after it was used
        from elsewhere: it is a stray.

        Args:
            stand_ins: for every whole parameter, by name.
            of_gathered: (name, whole values) -> the stand-in of one that lies in shards, each time it is gathered.

        Yields:
            The names of strays; filled when the pass is over.
        """
        strays: list[str] = []
        held = {name: p.grad for name, p in self.parameters.items()}
        gathered = lent_when_gathered(self._model, self._in_shards, of_gathered) if self._in_shards else nullcontext()
        try:
            for module, key, name, parameter in self._places:
                if name in stand_ins:
                    module._parameters[key] = stand_ins[name]  # type: ignore[assignment]
                parameter.grad = None
            with gathered:
                yield strays
        finally:
            for module, key, _, parameter in self._places:
                module._parameters[key] = parameter
            strays += [name for name, p in self.parameters.items() if p.grad is not None]
            for name, p in self.parameters.items():
                p.grad = held[name]


def _parameters(module: nn.Module) -> list[tuple[str, int, bool]]:
    """Key, identity and whether it is trained, of each parameter that the module itself holds."""
    return [(key, id(p), p.requires_grad) for key, p in module._parameters.items() if p is not None]


_kept: dict[nn.Module, Places] = {}


def places_of(model: nn.Module) -> Places:
    """Those that are kept, or found now."""
    return _kept.get(model) or Places(model)


@contextmanager
def places_kept(model: nn.Module, known: Places | None) -> Iterator[Places]:
    """Around passes between which nothing changes but the examples: all take the same places.

    Args:
        model: of the passes.
        known: places found earlier; taken if they hold.
    """
    before = _kept.get(model)
    _kept[model] = known if known is not None and known.hold(model) else Places(model)
    try:
        yield _kept[model]
    finally:
        del _kept[model]
        if before is not None:
            _kept[model] = before
