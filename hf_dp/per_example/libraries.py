"""The functions of PyTorch and of a model's own modules and classes, and PyTorch's settings -> whether one of them was
replaced since.
"""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

OF_TORCH = (torch, torch.autograd, torch.linalg, torch.special, functional, Tensor)
SETTINGS: tuple[Callable[[], object], ...] = (
    torch.get_default_dtype,
    torch.get_float32_matmul_precision,
    torch.are_deterministic_algorithms_enabled,
    torch.is_anomaly_enabled,
    lambda: (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
    lambda: (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
    lambda: (torch.backends.cuda.mem_efficient_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()),
    lambda: torch.backends.mkldnn.enabled,
)


class Functions:
    """What a pass through a model may call by name, and the settings under which it runs, noted when this is made. Two
    are equal if the settings are and if in both the same functions stand under the names of the first: what a library
    loads late is no change.
    """

    def __init__(self, model: nn.Module) -> None:
        self._settings = [read() for read in SETTINGS]
        self._noted = {
            id(place): {
                name: value for name, value in held.items() if callable(value) and not isinstance(value, nn.Module)
            }
            for place, held in _places(model)
        }

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Functions):
            return NotImplemented
        return self._settings == other._settings and all(
            other._noted.get(place, {}).get(name) is value
            for place, held in self._noted.items()
            for name, value in held.items()
        )

    __hash__ = None  # type: ignore[assignment]


def _places(model: nn.Module) -> Iterator[tuple[ModuleType | type | object, dict[str, Any]]]:
    kinds = {own for kind in {type(module) for module in model.modules()} for own in kind.__mro__}
    modules = {sys.modules[kind.__module__] for kind in kinds if kind.__module__ in sys.modules}
    for place in (*OF_TORCH, *kinds, *modules):
        yield place, dict(vars(place))
    yield ALL_ATTENTION_FUNCTIONS, dict(ALL_ATTENTION_FUNCTIONS)
