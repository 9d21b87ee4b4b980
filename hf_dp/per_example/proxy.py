"""A stand-in for a trainable parameter during one pass: every operation that uses it has an exact rule, or is an error.

During a pass, `capture` puts a `ParameterProxy` where the model keeps the parameter. Whatever the layer's class, every
PyTorch function that is given the proxy arrives in `__torch_function__`, so no use is missed. What happens there
depends on the other arguments:

    a question (shape, dtype, ...)     is answered
    any use under no_grad              is computed plainly (first forward of reentrant checkpointing, generation)
    use with the examples' data        a rule computes the result through a tap, which in backward gives out each
                                       example's gradient (see `rules`)
    use with constants alone           is on the parameter's own side: casts, transposes, scalings, fixed positions of a
                                       table. The result is a proxy again, which can pull a gradient back to the
                                       parameter
    anything else                      is an error that names the parameter and the operation

A proxy is a leaf that requires a gradient. If autograd itself ever delivers a gradient to it, some autograd function
used it without PyTorch's functions, and the pass ends with an error.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hf_dp.per_example.factors import Dense, Factor, Outer, materialise

Value: TypeAlias = Any  # an argument or a result of a PyTorch function
Pullback: TypeAlias = Callable[[Factor], Factor]
Origins: TypeAlias = "Sequence[tuple[ParameterProxy, Pullback]]"

# Operations that only ask for a property of the tensor.
ASKING = frozenset(
    "size dim numel stride storage_offset is_floating_point is_complex element_size is_contiguous __len__ __hash__ "
    "__repr__ __format__ data_ptr get_device is_same_size nelement ndimension is_inference is_signed untyped_storage "
    "detach "
    "result_type is_tensor".split()
)
_REFLECTED = {"rmul": "mul", "radd": "add", "imul": "mul", "iadd": "add", "isub": "sub", "itruediv": "truediv"}
_REQUIRES_GRAD = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]


class ParameterProxy(torch.Tensor):
    """The parameter's values under the parameter's name, with every use watched. Made by `ParameterProxy.of`.

    Attributes:
        parameter: the name of the parameter, as in `model.named_parameters()`.
        capture: the `Capture` under way.
        plain_values: the same memory as an ordinary tensor without gradient.
        origins: the proxies that this one was computed from, each with the pullback that turns a factor of this
            gradient into a factor of that one. Empty for the parameter itself.
    """

    parameter: str
    capture: Any
    plain_values: Tensor
    origins: Origins

    @staticmethod
    def of(values: Tensor, parameter: str, capture: Value, origins: "Origins" = ()) -> "ParameterProxy":
        """A watched leaf that shares the memory of `values`."""
        plain = values.detach()
        proxy = torch.Tensor._make_subclass(ParameterProxy, plain, True)
        proxy.parameter, proxy.capture, proxy.plain_values, proxy.origins = parameter, capture, plain, origins
        capture.watch(proxy)
        return proxy

    def sink(self, factor: Factor | None) -> None:
        """Receives the factor of one use, in backward; None if the examples are not in front."""
        if factor is None:
            self.capture.refuse([self.parameter], "an operation on values that every example shares", lambda: None)
        elif not self.origins:
            self.capture.record(self.parameter, factor)
        for origin, pullback in self.origins:
            origin.sink(None if factor is None else pullback(factor))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Value],
        types: Sequence[type],
        args: Sequence[Value] = (),
        kwargs: dict[str, Value] | None = None,
    ) -> Value:
        """Every PyTorch function that has a proxy among its arguments."""
        kwargs = kwargs or {}
        if func.__name__ == "__set__" and args[1] is not None:
            return args[0].capture.refuse([args[0].parameter], "an assignment to one of its attributes", lambda: None)
        name = operation_name(func)
        if func == _REQUIRES_GRAD:
            return True
        if name in ASKING or not torch.is_grad_enabled():
            return func(*plain(args), **plain(kwargs))
        return proxies_in((args, kwargs))[0].capture.apply_rule(name, func, tuple(args), kwargs)


def operation_name(func: Callable[..., Value]) -> str:
    """'mul' for torch.mul, Tensor.__rmul__ and Tensor.mul_; '__len__' for attributes that only ask for a property."""
    name = func.__name__
    if name == "__get__":
        attribute = str(func.__self__.__name__)  # type: ignore[attr-defined]
        return attribute if attribute in ("T", "mT") else "__len__"
    if name in ASKING:
        return name
    bare = name.strip("_")
    return _REFLECTED.get(bare, bare)


def plain(value: Value) -> Value:
    """The arguments with each proxy replaced by its plain values."""
    if isinstance(value, ParameterProxy):
        return value.plain_values
    if isinstance(value, (tuple, list)):
        return type(value)(plain(v) for v in value)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value


def derive(proxy: ParameterProxy, function: Callable[[Tensor], Tensor], pullback: Pullback) -> ParameterProxy:
    """`function(parameter)`, with everything else constant, as a proxy; `pullback` is its adjoint on factors."""
    with torch.no_grad():
        result = function(proxy.plain_values)
    return ParameterProxy.of(result, proxy.parameter, proxy.capture, [(proxy, pullback)])


def derive_any(proxies: Sequence[ParameterProxy], function: Callable[..., Tensor]) -> ParameterProxy:
    """`function(*parameters)`, with everything else constant and nothing random in it, as a proxy.

    In backward, gradients are materialised and pulled back by `function`'s own vector-Jacobian product, for each
    example (vmap).
    """
    with torch.no_grad():
        result = function(*[p.plain_values for p in proxies])
    origins = [(p, partial(_vector_jacobian, function, proxies, i)) for i, p in enumerate(proxies)]
    return ParameterProxy.of(result, proxies[0].parameter, proxies[0].capture, origins)


def unchanged(factor: Factor) -> Factor:
    """The pullback of a cast, and of a reshaping that keeps a matrix's entries in their order."""
    return factor


def transposed(factor: Factor) -> Factor:
    """The pullback of a matrix transposition: (g^T x)^T = x^T g."""
    if isinstance(factor, Outer):
        return Outer(factor.grads, factor.inputs)
    return Dense(materialise(factor).transpose(1, 2))


def _vector_jacobian(
    function: Callable[..., Tensor], proxies: Sequence[ParameterProxy], which: int, factor: Factor
) -> Factor:
    """[B, *output] -> [B, *parameter]: for each example, the adjoint of `function` in its argument number `which`."""
    gradient = materialise(factor)
    values = [p.plain_values.to(gradient.dtype) for p in proxies]

    def of_one(value: Tensor) -> Tensor:
        return function(*values[:which], value, *values[which + 1 :]).to(gradient.dtype)

    vjp = torch.func.vjp(of_one, values[which])[1]
    return Dense(torch.func.vmap(lambda g: vjp(g)[0])(gradient))


def proxies_in(value: Value) -> list[ParameterProxy]:
    """All proxies in (nested) arguments, each once, in order."""
    return list({id(t): t for t in tensors_in(value) if isinstance(t, ParameterProxy)}.values())


def tensors_in(value: Value) -> list[Tensor]:
    """All tensors in (nested) arguments."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [t for item in items for t in tensors_in(item)]
