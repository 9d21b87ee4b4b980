"""Operations in which a parameter may meet the examples' data -> their results through taps: the exact per-example
rules.

A rule is given the operation's arguments, proxies among them. It returns None if the operation is not one that it
covers, for example because no data is in it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_dp.per_example.factors import Dense, Factor, Outer, Rows
from hf_dp.per_example.proxy import ParameterProxy, Value, derive, derive_any, plain, proxies_in, transposed, unchanged
from hf_dp.per_example.taps import AddTap, AnyTap, EmbeddingTap, LayerNormTap, LinearTap, MultiplyTap, Sink


def _sink(value: Value) -> Sink | None:
    return value.sink if isinstance(value, ParameterProxy) else None


def autocast(*operands: Value) -> tuple[Value, ...]:
    """The floating-point operands in autocast's dtype, if autocast is on: taps run below it and would not cast."""
    device = next(v for v in operands if isinstance(v, Tensor)).device.type
    if not torch.is_autocast_enabled(device):
        return operands
    return _to_dtype(torch.get_autocast_dtype(device), *operands)


def _to_dtype(dtype: torch.dtype, *operands: Value) -> tuple[Value, ...]:
    return tuple(v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in operands)


def linear(input: Value, weight: Value, bias: Value = None) -> Tensor | None:
    """y = x W^T + b, in any layout with the examples in front."""
    if isinstance(input, ParameterProxy):
        return None
    led = _leads("linear", proxies_in((weight, bias))[0], input, flat=True)
    if not led and not input.requires_grad:
        return None  # one input for all examples: the result is on the parameters' side too
    return _tapped(input, weight, bias, led)


def project(input: Tensor, weight: Value, bias: Value = None) -> Tensor:
    """`linear` for inputs of the examples; others are refused in backward."""
    return _tapped(input, weight, bias, _leads("linear", proxies_in((weight, bias))[0], input, flat=True))


def _tapped(input: Tensor, weight: Value, bias: Value, led: bool) -> Tensor:
    x, w, b = autocast(input, weight, bias)
    capture = proxies_in((weight, bias))[0].capture
    batch = capture.batch_size if led else None
    result: Tensor = LinearTap.apply(x, capture.anchor, plain(w), plain(b), batch, _sink(w), _sink(b))
    return result


def _leads(operation: str, w: ParameterProxy, data: Tensor, *, flat: bool = False) -> bool:
    """Whether the rows of `data`, which meets the parameter `w`, are the examples'; see `forms`."""
    result: bool = w.capture.leads(w.parameter, operation, data.shape, flat=flat)
    return result


def addmm(input: Value, mat1: Value, mat2: Value, *, beta: float = 1, alpha: float = 1) -> Tensor | None:
    """b + x W: GPT-2's Conv1D, whose weight is stored transposed."""
    if beta != 1 or alpha != 1 or isinstance(mat1, ParameterProxy):
        return None
    return linear(mat1, _transpose(mat2), input)


def matmul(input: Value, other: Value) -> Tensor | None:
    """X W and W X with a matrix W; one matrix a head, [H, k, m] or [1, H, k, m], is repeated for each example."""
    data, w = (other, input) if isinstance(input, ParameterProxy) else (input, other)
    if isinstance(data, ParameterProxy) or data.dim() == 1:
        return None
    if w.dim() == 2 and w is other:
        return linear(data, _transpose(w))
    if w.dim() == 2:
        result = linear(data.transpose(-1, -2), w) if data.dim() > 2 else None
        return None if result is None else result.transpose(-1, -2)
    batch = w.capture.batch_size
    if not (2 < w.dim() < data.dim() or (w.dim() == data.dim() and w.shape[0] == 1)) or not _leads("matmul", w, data):
        return None
    wide = _expanded(w, batch, *[1] * (data.dim() - w.dim() - 1), *(w.shape if w.dim() < data.dim() else w.shape[1:]))
    return None if wide is None else torch.matmul(data, wide) if w is other else torch.matmul(wide, data)


def _transpose(weight: Tensor) -> Tensor:
    return derive(weight, torch.t, transposed) if isinstance(weight, ParameterProxy) else weight.t()


def embedding(
    input: Tensor,
    weight: Value,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    """A lookup in a table. Positions that all examples share stay on the parameter's side."""
    if not isinstance(weight, ParameterProxy):
        return None
    if max_norm is not None or scale_grad_by_freq:
        return _refuse(
            weight, "embedding with max_norm or scale_grad_by_freq", lambda: F.embedding(input, plain(weight))
        )
    if _leads("embedding", weight, input):
        return _looked_up(input, weight, None if padding_idx is None else padding_idx % weight.shape[0])
    return derive_any([weight], lambda table: F.embedding(input, table, padding_idx))


def _looked_up(index: Tensor, table: ParameterProxy, padding: int | None = None) -> Tensor:
    capture = table.capture
    result: Tensor = EmbeddingTap.apply(index, capture.anchor, table.plain_values, padding, table.sink)
    return result


def getitem(input: Value, index: Value) -> Tensor | None:
    """w[index] with a row of whole numbers for each example, [B, T]: a lookup."""
    rows = isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64) and index.dim() > 1
    if not rows or not isinstance(input, ParameterProxy) or input.dim() != 2:
        return None
    return _looked_up(index % len(input), input) if _leads("getitem", input, index) else None


def embedding_bag(input: Tensor, weight: Value, offsets: Value = None, *args: Value, **kwargs: Value) -> Tensor | None:
    """A sum or mean of looked-up rows, for bags [B, T] of one size; other bags have no rule."""
    names = (
        "max_norm norm_type scale_grad_by_freq mode sparse per_sample_weights include_last_offset padding_idx".split()
    )
    options = {**dict(zip(names, args, strict=False)), **kwargs}
    mode = options.pop("mode", "mean")
    plain_bag = input.dim() == 2 and offsets is None and mode in ("sum", "mean")
    if not plain_bag or any(options.get(n) not in (None, False) for n in names if n != "norm_type"):
        return None
    rows = embedding(input, weight)
    return None if rows is None or rows.dim() != 3 else rows.sum(1) if mode == "sum" else rows.mean(1)


def layer_norm(
    input: Value, normalized_shape: Value, weight: Value = None, bias: Value = None, eps: float = 1e-5
) -> Tensor | None:
    """LayerNorm with a trainable scale, shift, or both; in float32 under autocast, as in PyTorch."""
    if isinstance(input, ParameterProxy) or weight is None:
        return None
    led = _leads("layer_norm", proxies_in((weight, bias))[0], input, flat=weight.dim() == 1)
    if not led and not input.requires_grad:
        return None
    x, w, b = input, weight, bias
    if torch.is_autocast_enabled(x.device.type):
        x, w, b = _to_dtype(torch.float32, x, w, b)
    capture = proxies_in((weight, bias))[0].capture
    batch = capture.batch_size if led else None
    result: Tensor = LayerNormTap.apply(x, capture.anchor, plain(w), plain(b), eps, batch, _sink(w), _sink(b))
    return result


def rms_norm(input: Value, normalized_shape: Value, weight: Value = None, eps: float | None = None) -> Tensor | None:
    """RMSNorm: the norm without parameters, times the scale."""
    if isinstance(input, ParameterProxy):
        return None
    return multiply(F.rms_norm(input, normalized_shape, None, eps), weight)


def multiply(input: Value, other: Value) -> Tensor | None:
    """x * w with w broadcast over examples."""
    data, w = (other, input) if isinstance(input, ParameterProxy) else (input, other)
    if not _meets_data(data, w):
        return None
    result: Tensor = MultiplyTap.apply(data, w.capture.anchor, w.plain_values, w.capture.batch_size, w.sink)
    return result


def divide(input: Value, other: Value, *, rounding_mode: str | None = None) -> Tensor | None:
    """x / w as x * (1/w)."""
    if rounding_mode is not None or isinstance(input, ParameterProxy) or not _meets_data(input, other):
        return None
    return multiply(input, derive_any([other], torch.reciprocal))


def add(input: Value, other: Value, *, alpha: float = 1) -> Tensor | None:
    """x + w with w broadcast over examples."""
    data, w = (other, input) if isinstance(input, ParameterProxy) else (input, other)
    return _shift(data, w, 1.0) if alpha == 1 and _meets_data(data, w) else None


def subtract(input: Value, other: Value, *, alpha: float = 1) -> Tensor | None:
    """x - w; and w - x as (-x) + w."""
    if alpha != 1:
        return None
    if isinstance(other, ParameterProxy):
        return _shift(input, other, -1.0) if _meets_data(input, other) else None
    return _shift(-other, input, 1.0) if _meets_data(other, input) else None


def _shift(data: Tensor, w: ParameterProxy, scale: float) -> Tensor:
    result: Tensor = AddTap.apply(data, w.capture.anchor, w.plain_values, scale, w.capture.batch_size, w.sink)
    return result


def expand(input: Value, *sizes: Value) -> Tensor | None:
    """One value repeated for each example (class tokens, prompts): x.expand(B, ...), x.repeat(B, 1, ...)."""
    shape = _sizes(sizes)
    return _expanded(input, *shape) if _is_for_each("expand", input, shape) else None


def _expanded(w: ParameterProxy, *shape: int) -> Tensor | None:
    wide = _for_each(w, len(shape))
    return None if wide is None else wide.expand(-1, *shape[1:])


def repeat(input: Value, *sizes: Value) -> Tensor | None:
    """x.repeat(B, ...); and w [h, ...] repeated to [B*h, ...], example by example, as attention with B*h heads wants
    it.
    """
    shape = _sizes(sizes)
    if not _is_for_each("repeat", input, shape):
        return None
    wide = _for_each(input, len(shape))
    if wide is not None:
        return wide.repeat(1, *shape[1:])
    heads = _for_each(input, len(shape) + 1) if shape[1:] == (1,) * (input.dim() - 1) else None
    return None if heads is None else heads.flatten(0, 1)


def _sizes(sizes: tuple[Value, ...]) -> tuple[int, ...]:
    return tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else tuple(sizes)


def _is_for_each(operation: str, input: Value, shape: tuple[int, ...]) -> bool:
    """Whether the first of the sizes that a parameter is repeated to is the number of examples."""
    if not isinstance(input, ParameterProxy) or len(shape) < max(1, input.dim()):
        return False
    return bool(input.capture.leads(input.parameter, operation, shape))


def _for_each(w: ParameterProxy, dims: int) -> Tensor | None:
    """A parameter's values once an example, [B, ..., *w.shape], in so many dimensions; None where `w` takes the first
    one itself.
    """
    if dims < w.dim() or (dims == w.dim() and (dims == 0 or w.shape[0] != 1)):
        return None
    return _shift(w.plain_values.new_zeros(w.capture.batch_size, *(1,) * (dims - 1)), w, 1.0)


def dropout(input: Value, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor | None:
    """Dropout of a value that all examples share: one mask for all."""
    if not isinstance(input, ParameterProxy):
        return None
    mask = F.dropout(torch.ones_like(input.plain_values), p, training)
    return derive_any([input], lambda values: values * mask)


def conv2d(
    input: Value,
    weight: Value,
    bias: Value = None,
    stride: Value = 1,
    padding: Value = 0,
    dilation: Value = 1,
    groups: int = 1,
) -> Tensor | None:
    """A convolution, as a linear map of its patches: x unfolded to [B, L, C kh kw]."""
    if isinstance(input, ParameterProxy) or input.dim() != 4:
        return None
    if isinstance(padding, str) or groups != 1:
        return example_by_example(F.conv2d, input, weight, bias, stride, padding, dilation, groups)
    kernel = tuple(weight.shape[2:])
    w = proxies_in((weight, bias))[0]
    led = w.capture.leads(w.parameter, "conv2d", (*input.shape[:1], *input.shape[2:]))  # channels are no rows
    flat = (
        derive(weight, lambda w: w.flatten(1), unchanged) if isinstance(weight, ParameterProxy) else weight.flatten(1)
    )
    patches = F.unfold(input, kernel, dilation, padding, stride).transpose(1, 2)
    out = _tapped(patches, flat, bias, led)
    size, pad, dil, step = (torch.Size(_pair(v)) for v in (tuple(input.shape[2:]), padding, dilation, stride))
    height, width = ((size[i] + 2 * pad[i] - dil[i] * (kernel[i] - 1) - 1) // step[i] + 1 for i in (0, 1))
    return out.transpose(1, 2).unflatten(2, (height, width))


def example_by_example(func: Callable[..., Value], *args: Value, **kwargs: Value) -> Tensor | None:
    """The generic exact rule, for operations that map each example by itself, with the examples in front."""
    proxies = proxies_in((args, kwargs))
    capture = proxies[0].capture
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and not isinstance(v, ParameterProxy)]
    mapped = [t for t in tensors if t.requires_grad or t is tensors[0]]
    data = [t for t in mapped if capture.leads(proxies[0].parameter, func.__name__, t.shape)]
    if not data or any(t.requires_grad and not any(t is d for d in data) for t in tensors):
        return None
    return _through_any_tap(func, args, kwargs, data)


def _through_any_tap(func: Callable[..., Value], args: Value, kwargs: Value, data: list[Tensor]) -> Tensor:
    """`func` with what its parameters' gradients need recorded; `data`: those of its arguments that lead with the
    examples.
    """
    proxies = proxies_in((args, kwargs))
    slots = [*proxies, *data]

    def function(*values: Tensor) -> Value:
        known = {id(slot): value for slot, value in zip(slots, values, strict=True)}
        return func(*[known.get(id(a), a) for a in args], **{k: known.get(id(v), v) for k, v in kwargs.items()})

    sinks = [p.sink for p in proxies]
    result: Tensor = AnyTap.apply(proxies[0].capture.anchor, function, sinks, *[p.plain_values for p in proxies], *data)
    return result


def _pair(value: Value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def einsum(equation: Value, *operands: Value) -> Tensor | None:
    """Products and sums over letters, where the first letter of each operand with the examples, and of the result, is
    theirs alone.
    """
    values = operands[0] if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return None
    terms, result = equation.replace(" ", "").split("->")
    w, letter = proxies_in(list(values))[0], result[:1]
    for term, value in zip(terms.split(","), values, strict=True):
        own = not isinstance(value, ParameterProxy) and term[:1] == letter and _leads("einsum", w, value)
        if not letter or (
            not own and (letter in term or (value.requires_grad and not isinstance(value, ParameterProxy)))
        ):
            return None
        if own and letter in term[1:]:
            return None
    data = [v for v, term in zip(values, terms.split(","), strict=True) if letter in term]
    return _through_any_tap(torch.einsum, (equation, *values), {}, data) if data else None


def index_copy(input: Value, dim: int, index: Tensor, source: Value) -> Tensor | None:
    """A frozen table with some trained rows (trainable tokens): gradients of the other rows are dropped."""
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


def cast(input: Value, *args: Value, **kwargs: Value) -> Tensor | None:
    """A change of dtype only: the gradient keeps its factored form."""
    if not isinstance(input, ParameterProxy):
        return input.to(*plain(args), **plain(kwargs)) if isinstance(input, Tensor) else None
    result = input.plain_values.to(*plain(args), **plain(kwargs))
    return input if result is input.plain_values else derive(input, lambda v: result, unchanged)


def to_float(input: Value) -> Tensor | None:
    """`cast` to float32."""
    return cast(input, torch.float32)


def _meets_data(data: Value, w: Value) -> bool:
    """Whether an elementwise operand carries the examples: in front, where `w` has one row or none; or, for a vector
    `w`, flattened with their positions, [B*T, k].
    """
    if not isinstance(w, ParameterProxy) or not isinstance(data, Tensor) or isinstance(data, ParameterProxy):
        return False
    shape = torch.broadcast_shapes(data.shape, w.shape)
    if data.dim() != len(shape) or shape[:1] != data.shape[:1] or not (w.dim() < len(shape) or w.shape[:1] == (1,)):
        return False
    return _leads("elementwise", w, data, flat=w.dim() == 1 and data.shape == shape)


def for_each_example(func: Callable[..., Value], *args: Value, **kwargs: Value) -> Value:
    """Masking, joining, attention: a parameter of shape [1, ...] is expanded to [B, ...] before the operation."""

    def widen(value: Value) -> Value:
        if isinstance(value, (tuple, list)):
            return type(value)(widen(v) for v in value)
        if not isinstance(value, ParameterProxy) or value.dim() == 0 or value.shape[0] != 1:
            return value
        return _expanded(value, value.capture.batch_size, *value.shape[1:])

    wide = [widen(v) for v in args], {k: widen(v) for k, v in kwargs.items()}
    stack = [*wide[0], *wide[1].values()]
    flat = [u for v in stack for u in (v if isinstance(v, (tuple, list)) else [v])]
    return None if any(isinstance(v, ParameterProxy) for v in flat) else func(*wide[0], **wide[1])


def _refuse(proxy: ParameterProxy, what: str, compute: Callable[[], Tensor]) -> Tensor:
    result: Tensor = proxy.capture.refuse([proxy.parameter], what, compute)
    return result
