"""The table of operations in which a parameter may meet the examples' data, each with its exact per-example rule.

A rule receives the operation's arguments, proxies among them, and returns the result computed through a tap; or None where the
operation has no data in it, which leaves it to the parameter's own side. What is in neither table is refused by name.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_dp.per_example.factors import Dense, Factor, Outer, Rows
from hf_dp.per_example.proxy import ParameterProxy, derive, plain, transposed, unchanged
from hf_dp.per_example.taps import AddTap, EmbeddingTap, LayerNormTap, LinearTap, MultiplyTap, Sink

Operand: TypeAlias = Tensor | float | int


def apply_rule(name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operation on proxies: through the rule of that name, on the parameter's side, or refused."""
    proxies = [v for v in (*args, *kwargs.values()) if isinstance(v, ParameterProxy)]
    rule = RULES.get(name)
    if rule is not None:
        result = rule(*args, **kwargs)
        if result is not None:
            return result
    if name in PARAMETER_SIDE and len(proxies) == 1:
        return _on_the_parameters_side(name, func, args, kwargs)
    others = plain(args), plain(kwargs)
    owner = _any_proxy((args, kwargs))
    return owner.capture.refuse(owner.parameter, name, lambda: func(*others[0], **others[1]))


def _any_proxy(value: Any) -> ParameterProxy:
    """The first proxy anywhere in (nested) arguments."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, ParameterProxy):
            return item
        stack.extend(item.values() if isinstance(item, dict) else item if isinstance(item, (tuple, list)) else ())
    raise AssertionError("an operation without a proxy was dispatched as if it had one")


def _sink(value: Any) -> Sink | None:
    return value.sink if isinstance(value, ParameterProxy) else None


def _autocast(*operands: Any) -> tuple[Any, ...]:
    """The floating operands in autocast's dtype where autocast is on: the taps run below it and would not cast themselves."""
    device = next(v for v in operands if isinstance(v, Tensor)).device.type
    if not torch.is_autocast_enabled(device):
        return operands
    return _cast(torch.get_autocast_dtype(device), *operands)


def _cast(dtype: torch.dtype, *operands: Any) -> tuple[Any, ...]:
    return tuple(v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in operands)


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor | None:
    """y = x W^T + b, in any layout that leads with the examples."""
    if isinstance(input, ParameterProxy):
        return None
    x, w, b = _autocast(input, weight, bias)
    capture = _any_proxy((weight, bias)).capture
    result: Tensor = LinearTap.apply(x, capture.anchor, plain(w), plain(b), capture.batch_size, _sink(w), _sink(b))
    return result


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Tensor | None:
    """b + x W: GPT-2's Conv1D, whose weight is stored transposed."""
    if beta != 1 or alpha != 1 or isinstance(mat1, ParameterProxy):
        return None
    return _linear(mat1, _transpose(mat2), input)


def _matmul(input: Any, other: Any) -> Tensor | None:
    """X W with a matrix W."""
    if isinstance(input, ParameterProxy) or other.dim() != 2:
        return None
    return _linear(input, _transpose(other))


def _transpose(weight: Tensor) -> Tensor:
    return derive(weight, torch.t, transposed) if isinstance(weight, ParameterProxy) else weight.t()


def _embedding(
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    """A lookup. Positions that every example shares (leading dimension not B) stay on the parameter's side."""
    if not isinstance(weight, ParameterProxy):
        return None
    capture = weight.capture
    if max_norm is not None or scale_grad_by_freq:
        return _refuse(
            weight, "embedding with max_norm or scale_grad_by_freq", lambda: F.embedding(input, plain(weight))
        )
    if input.shape[0] == capture.batch_size:
        padding = None if padding_idx is None else padding_idx % weight.shape[0]
        result: Tensor = EmbeddingTap.apply(input, capture.anchor, weight.plain_values, padding, weight.sink)
        return result
    return derive(weight, lambda table: F.embedding(input, table, padding_idx))


def _layer_norm(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor | None:
    """LayerNorm with a trainable scale, shift, or both; in float32 under autocast, as PyTorch has it."""
    if isinstance(input, ParameterProxy) or weight is None:
        return None
    x, w, b = input, weight, bias
    if torch.is_autocast_enabled(x.device.type):
        x, w, b = _cast(torch.float32, x, w, b)
    anchor = _any_proxy((weight, bias)).capture.anchor
    result: Tensor = LayerNormTap.apply(x, anchor, plain(w), plain(b), eps, _sink(w), _sink(b))
    return result


def _rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Tensor | None:
    """RMSNorm: the parameterless norm, times the scale."""
    if isinstance(input, ParameterProxy):
        return None
    return _multiply(F.rms_norm(input, normalized_shape, None, eps), weight)


def _multiply(input: Any, other: Any) -> Tensor | None:
    """x * w with w broadcast over examples."""
    data, w = (other, input) if isinstance(input, ParameterProxy) else (input, other)
    if not _meets_data(data, w):
        return None
    result: Tensor = MultiplyTap.apply(data, w.capture.anchor, w.plain_values, w.sink)
    return result


def _divide(input: Any, other: Any, *, rounding_mode: str | None = None) -> Tensor | None:
    """x / w as x * (1/w)."""
    if rounding_mode is not None or isinstance(input, ParameterProxy) or not _meets_data(input, other):
        return None
    return _multiply(input, derive(other, torch.reciprocal))


def _add(input: Any, other: Any, *, alpha: float = 1) -> Tensor | None:
    """x + w with w broadcast over examples."""
    data, w = (other, input) if isinstance(input, ParameterProxy) else (input, other)
    return _shift(data, w, 1.0) if alpha == 1 and _meets_data(data, w) else None


def _sub(input: Any, other: Any, *, alpha: float = 1) -> Tensor | None:
    """x - w, and w - x as (-x) + w."""
    if alpha != 1:
        return None
    if isinstance(other, ParameterProxy):
        return _shift(input, other, -1.0) if _meets_data(input, other) else None
    return _shift(-other, input, 1.0) if _meets_data(other, input) else None


def _shift(data: Tensor, w: ParameterProxy, scale: float) -> Tensor:
    result: Tensor = AddTap.apply(data, w.capture.anchor, w.plain_values, scale, w.sink)
    return result


def _expand(input: Any, *sizes: Any) -> Tensor | None:
    """One vector for all examples, repeated for each: class tokens, prompts. x.expand(B, ...) and x.repeat(B, 1, ...)."""
    if not isinstance(input, ParameterProxy):
        return None
    shape = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else tuple(sizes)
    batch = input.capture.batch_size
    grows = len(shape) > input.dim() or (len(shape) == input.dim() and input.shape[0] == 1)
    if not shape or shape[0] != batch or not grows:
        return None
    trailing = (1,) * (input.dim() - (len(shape) == input.dim()))
    result = _shift(input.plain_values.new_zeros(batch, *trailing), input, 1.0)
    return result if _same_positions(shape[1:], result.shape[1:]) else None


def _same_positions(asked: tuple[int, ...], shape: torch.Size) -> bool:
    """Whether the other sizes of an expand or repeat leave things as they are: -1, 1 or the size itself."""
    return len(asked) == len(shape) and all(a in (-1, 1, s) for a, s in zip(asked, shape, strict=True))


def _conv2d(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor | None:
    """A convolution is a linear map of its patches: x unfolded to [B, L, C kh kw]."""
    if isinstance(input, ParameterProxy) or isinstance(padding, str) or groups != 1 or input.dim() != 4:
        return None
    kernel = tuple(weight.shape[2:])
    flat = (
        derive(weight, lambda w: w.flatten(1), unchanged) if isinstance(weight, ParameterProxy) else weight.flatten(1)
    )
    patches = F.unfold(input, kernel, dilation, padding, stride).transpose(1, 2)
    out = _linear(patches, flat, bias)
    assert out is not None
    size, pad, dil, step = (torch.Size(_pair(v)) for v in (tuple(input.shape[2:]), padding, dilation, stride))
    height, width = ((size[i] + 2 * pad[i] - dil[i] * (kernel[i] - 1) - 1) // step[i] + 1 for i in (0, 1))
    return out.transpose(1, 2).unflatten(2, (height, width))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _index_copy(input: Any, dim: int, index: Tensor, source: Any) -> Tensor | None:
    """A frozen table with some rows trained (trainable tokens): the other rows' gradients are dropped."""
    if dim != 0 or isinstance(input, ParameterProxy) or not isinstance(source, ParameterProxy):
        return None

    def pull_back(factor: Factor) -> Factor:
        if isinstance(factor, Outer):
            return Outer(factor.inputs, factor.grads[..., index])
        if isinstance(factor, Dense):
            return Dense(factor.gradient[:, index])
        match = factor.rows.unsqueeze(-1) == index
        kept = factor.grads * match.any(-1, keepdim=True)
        return Rows(match.int().argmax(-1), kept, index.shape[0])

    return derive(source, lambda rows: input.index_copy(0, index, rows), pull_back)


def _cast_rule(input: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """A change of dtype alone: the gradient keeps its factored form."""
    if not isinstance(input, ParameterProxy):
        return None
    result = input.plain_values.to(*plain(args), **plain(kwargs))
    return input if result is input.plain_values else derive(input, lambda v: result, unchanged)


def _float(input: Any) -> Tensor | None:
    return _cast_rule(input, torch.float32)


def _meets_data(data: Any, w: Any) -> bool:
    """Whether an elementwise operand carries examples: it makes the result lead with B, or itself needs a gradient."""
    if not isinstance(w, ParameterProxy) or not isinstance(data, Tensor) or isinstance(data, ParameterProxy):
        return False
    shape = torch.broadcast_shapes(data.shape, w.shape)
    return shape != w.shape and shape[0] == w.capture.batch_size and data.shape == shape


def _refuse(proxy: ParameterProxy, what: str, compute: Callable[[], Tensor]) -> Tensor:
    result: Tensor = proxy.capture.refuse(proxy.parameter, what, compute)
    return result


def _on_the_parameters_side(name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation between the parameter and constants: a proxy again."""
    proxy = _any_proxy((args, kwargs))

    def function(values: Tensor) -> Any:
        def put(v: Any) -> Any:
            return values if v is proxy else v

        return func(*[put(a) for a in args], **{k: put(v) for k, v in kwargs.items()})

    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v is not proxy]
    if any(t.requires_grad for t in tensors):
        return _refuse(
            proxy, f"{name} with data that has no leading dimension of examples", lambda: function(proxy.plain_values)
        )
    return derive(proxy, function, transposed if name in ("t", "T", "mT") and proxy.dim() == 2 else None)


RULES: dict[str, Callable[..., Tensor | None]] = {
    "linear": _linear,
    "addmm": _addmm,
    "matmul": _matmul,
    "embedding": _embedding,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "conv2d": _conv2d,
    "mul": _multiply,
    "multiply": _multiply,
    "truediv": _divide,
    "div": _divide,
    "add": _add,
    "sub": _sub,
    "expand": _expand,
    "repeat": _expand,
    "index_copy": _index_copy,
    "to": _cast_rule,
    "type_as": _cast_rule,
    "float": _float,
}
PARAMETER_SIDE = frozenset(
    "clone contiguous t T mT transpose permute view reshape flatten unflatten unsqueeze squeeze movedim swapaxes "
    "expand getitem select narrow index_select neg mul multiply add sub rsub truediv div rdiv".split()
)
