"""An operation's name -> its per-example rule, or the parameters' own side, which has no data in it; else it is
refused.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_dp.per_example import operations as ops
from hf_dp.per_example.composite import CELLS, multi_head_attention, recurrent
from hf_dp.per_example.proxy import ParameterProxy, Value, derive, derive_any, plain, proxies_in, tensors_in, transposed

IN_PLACE = frozenset("__iadd__ __isub__ __imul__ __itruediv__ __imatmul__ __ifloordiv__ __ipow__ __setitem__".split())


def apply_rule(name: str, func: Callable[..., Value], args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
    """The result of an operation on proxies: by the rule of that name, on the parameters' own side, or refused."""
    proxies = proxies_in((args, kwargs))
    owner = proxies[0]
    in_place = func.__name__ in IN_PLACE or (func.__name__.endswith("_") and not func.__name__.endswith("__"))
    if in_place or "out" in kwargs:
        result = None if "out" in kwargs else _in_place(name, args, kwargs)
    else:
        result = RULES[name](*args, **kwargs) if name in RULES else None
    if result is not None:
        for proxy in proxies:
            owner.capture.used(proxy.parameter, name)
        return result
    alone = len(tensors_in((args, kwargs))) == len(proxies) and name not in RANDOM
    pure = not in_place and "out" not in kwargs and not _carries_a_gradient((args, kwargs))
    if pure and (alone or name in PARAMETER_SIDE):
        return _on_the_parameters_side(proxies, func, args, kwargs)
    return owner.capture.refuse([p.parameter for p in proxies], name, lambda: func(*plain(args), **plain(kwargs)))


def _in_place(name: str, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Tensor | None:
    """x.mul_(w) as x.copy_(x * w): the tensor itself changes, which everything that shares its memory sees."""
    target = args[0]
    if name not in RULES or isinstance(target, ParameterProxy):
        return None
    result = RULES[name](target.clone(), *args[1:], **kwargs)
    return None if result is None else target.copy_(result)


def _carries_a_gradient(value: Value) -> bool:
    """Whether any tensor in (nested) arguments was computed from trained values, and so is not a constant."""
    return any(t.requires_grad and not isinstance(t, ParameterProxy) for t in tensors_in(value))


def _on_the_parameters_side(
    proxies: list[ParameterProxy], func: Callable[..., Value], args: tuple[Value, ...], kwargs: dict[str, Value]
) -> ParameterProxy:
    """An operation of parameters and constants alone: its result is a proxy again."""
    if len(proxies) == 1 and func in (torch.t, Tensor.t):
        return derive(proxies[0], torch.t, transposed)

    def function(*values: Tensor) -> Value:
        known = {id(p): v for p, v in zip(proxies, values, strict=True)}
        wider = values[0].dtype != proxies[0].plain_values.dtype  # in backward: the gradient's dtype, for constants too

        def put(v: Value) -> Value:
            if isinstance(v, (tuple, list)):
                return type(v)(put(u) for u in v)
            constant = isinstance(v, Tensor) and id(v) not in known and v.is_floating_point()
            return v.to(values[0].dtype) if constant and wider else known.get(id(v), v)

        return func(*put(args), **{k: put(v) for k, v in kwargs.items()})

    return derive_any(proxies, function)


RULES: dict[str, Callable[..., Value]] = {
    "linear": ops.linear,
    "addmm": ops.addmm,
    "matmul": ops.matmul,
    "embedding": ops.embedding,
    "embedding_bag": ops.embedding_bag,
    "getitem": ops.getitem,
    "einsum": ops.einsum,
    "layer_norm": ops.layer_norm,
    "rms_norm": ops.rms_norm,
    "conv2d": ops.conv2d,
    "mul": ops.multiply,
    "multiply": ops.multiply,
    "truediv": ops.divide,
    "div": ops.divide,
    "add": ops.add,
    "sub": ops.subtract,
    "expand": ops.expand,
    "repeat": ops.repeat,
    "dropout": ops.dropout,
    "index_copy": ops.index_copy,
    "to": ops.cast,
    "type_as": ops.cast,
    "float": ops.to_float,
    "multi_head_attention_forward": multi_head_attention,
}
FOR_EACH_EXAMPLE: dict[str, Callable[..., Value]] = {
    "where": torch.where,
    "masked_fill": Tensor.masked_fill,
    "cat": torch.cat,
    "scaled_dot_product_attention": F.scaled_dot_product_attention,
}
EXAMPLE_BY_EXAMPLE: dict[str, Callable[..., Value]] = {
    "group_norm": F.group_norm,
    "instance_norm": F.instance_norm,
    "conv1d": F.conv1d,
    "conv3d": F.conv3d,
    "conv_transpose1d": F.conv_transpose1d,
    "conv_transpose2d": F.conv_transpose2d,
    "conv_transpose3d": F.conv_transpose3d,
    "prelu": torch.prelu,
    "bilinear": F.bilinear,
}
RULES.update({name: partial(ops.example_by_example, func) for name, func in EXAMPLE_BY_EXAMPLE.items()})
RULES.update({kind: partial(recurrent, kind) for kind in CELLS})
RULES.update({name: partial(ops.for_each_example, func) for name, func in FOR_EACH_EXAMPLE.items()})
RANDOM = frozenset(
    "bernoulli rand_like randn_like randint_like multinomial normal rrelu native_dropout alpha_dropout".split()
)
PARAMETER_SIDE = frozenset(
    "clone contiguous t T mT transpose permute view reshape flatten unflatten unsqueeze squeeze movedim swapaxes "
    "expand getitem select narrow index_select neg mul multiply add sub rsub truediv div rdiv "
    "linear addmm matmul embedding layer_norm tanh relu gelu silu sigmoid".split()
)
