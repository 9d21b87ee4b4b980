"""Autograd functions that compute what the plain operation does and, in backward, give out each example's gradient.

Each takes its parameters *detached*, and an `anchor`: a leaf without values that makes the output require a gradient
even if the input does not. So backward always runs, no gradient reaches the parameter itself, and no hook of DDP or
FSDP fires. `sink` receives one `Factor` each time backward is executed (once for each use, under both kinds of
checkpointing too), or None if the leading dimension of the gradient is not that of the examples.

Legend: B examples, T positions, d inputs, r outputs. All dimensions between B and the last one count as positions.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_dp.per_example.factors import Dense, Factor, Outer, Rows, wide

Sink: TypeAlias = Callable[[Factor | None], None]
Context: TypeAlias = Any  # of an autograd function: forward keeps in it, as attributes, what backward needs


def by_example(x: Tensor, batch: int | None) -> Tensor | None:
    """[B, ..., k], or [B*T, k] flattened example by example -> [B, T, k]; None if `batch` is.

    Whether the examples are in front is never read off a size here: the rule that applies a tap knows it.
    """
    return None if batch is None else x.reshape(batch, -1, x.shape[-1])


class LinearTap(torch.autograd.Function):
    """y = x W^T + b. Gradients per example: W: g^T x (Outer); b: the sum of g over positions (Dense)."""

    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        anchor: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        batch: int | None,
        *sinks: Sink | None,
    ) -> Tensor:
        """`batch`: None if the examples are not in front. `sinks`: of weight and bias, None where frozen."""
        ctx.batch, (ctx.weight_sink, ctx.bias_sink) = batch, sinks
        ctx.save_for_backward(x if ctx.weight_sink else None, weight)
        y = F.linear(x, weight, bias)
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y  # an in-place activation may follow

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Hands over the factors and returns the input's gradient."""
        (g,) = grads
        x, weight = ctx.saved_tensors
        g_by_example = by_example(g, ctx.batch)
        if ctx.weight_sink:
            x_by_example = by_example(x, ctx.batch)
            unknown = x_by_example is None or g_by_example is None
            ctx.weight_sink(None if unknown else Outer(x_by_example, g_by_example))  # type: ignore[arg-type]
        if ctx.bias_sink:
            ctx.bias_sink(None if g_by_example is None else Dense(g_by_example.sum(1, dtype=wide(g))))
        return (g @ weight if ctx.needs_input_grad[0] else None), None, None, None, None, None, None


class PairTap(torch.autograd.Function):
    """LoRA's pair beside its base: y + s (x A^T) B^T, with A [k, d] and B [r, k].

    Gradients per example, with u = x A^T: B: s g^T u; A: s (g B)^T x (both Outer, and handed over with s).
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, y: Tensor, anchor: Tensor, pair: tuple[Tensor, Tensor], *how: Any) -> Tensor:
        """`x` [B, ..., d] leads with the examples, `y` [B, ..., r] is the base's; `how`: s, B, the sinks of A and B."""
        (a, b), (ctx.scaling, ctx.batch, *ctx.sinks) = pair, how
        base, u = y.reshape(-1, y.shape[-1]), F.linear(x.reshape(-1, x.shape[-1]), a)
        ctx.save_for_backward(x, u, a, b)
        if base.dtype == u.dtype:
            out = torch.addmm(base, u, b.t(), alpha=ctx.scaling)
        else:
            out = (base + ctx.scaling * F.linear(u, b)).to(y.dtype)
        return torch.ops.aten._unsafe_view(out, y.shape)  # no view: an in-place activation may follow

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Hands over the factors and returns the gradients of x and y."""
        (g,) = grads
        x, u, a, b = ctx.saved_tensors
        inner = _pair(ctx, x, u, g.reshape(-1, g.shape[-1]).to(u.dtype), b)
        gx = None
        if ctx.needs_input_grad[0]:
            gx = x.new_empty(len(inner), x.shape[-1]).addmm_(inner, a, beta=0, alpha=ctx.scaling).view(x.shape)
        return gx, (g if ctx.needs_input_grad[1] else None), None, None, None, None, None, None


class PairedLinearTap(torch.autograd.Function):
    """`PairTap` with a base that is a frozen linear map: x W^T + c + s (x A^T) B^T."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, anchor: Tensor, base: Any, pair: tuple[Tensor, Tensor], *how: Any) -> Tensor:
        """`base`: W and c, or None; the rest as of `PairTap`."""
        (a, b), (ctx.scaling, ctx.batch, *ctx.sinks) = pair, how
        out, u = F.linear(x, *base), F.linear(x.reshape(-1, x.shape[-1]), a)
        ctx.save_for_backward(x, u, a, b, base[0])
        out.view(-1, out.shape[-1]).addmm_(u, b.t(), alpha=ctx.scaling)
        return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Hands over the factors and returns the input's gradient."""
        (g,) = grads
        x, u, a, b, weight = ctx.saved_tensors
        flat = g.reshape(-1, g.shape[-1])
        inner = _pair(ctx, x, u, flat, b)
        gx = None
        if ctx.needs_input_grad[0]:
            gx = (flat @ weight).addmm_(inner, a, alpha=ctx.scaling).view(x.shape)
        return gx, None, None, None, None, None, None, None


def _pair(ctx: Context, x: Tensor, u: Tensor, g: Tensor, b: Tensor) -> Tensor:
    """Hands over the factors of A and B, and returns g B, [B T, k]."""
    inner, batch = g @ b, ctx.batch
    ctx.sinks[1](Outer(u.view(batch, -1, u.shape[-1]), g.view(batch, -1, g.shape[-1])), ctx.scaling)
    ctx.sinks[0](Outer(x.reshape(batch, -1, x.shape[-1]), inner.view(batch, -1, inner.shape[-1])), ctx.scaling)
    return inner


class EmbeddingTap(torch.autograd.Function):
    """y = table[index]. Gradient per example: the rows of g, added up by index (Rows); the padding row gets none."""

    @staticmethod
    def forward(ctx: Context, index: Tensor, anchor: Tensor, table: Tensor, padding: int | None, sink: Sink) -> Tensor:
        """`padding`: the row whose gradient torch.nn.Embedding drops, or None."""
        ctx.padding, ctx.sink, ctx.num_rows = padding, sink, table.shape[0]
        ctx.save_for_backward(index)
        return F.embedding(index, table)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[None, ...]:
        """Hands over the rows."""
        (g,) = grads
        (index,) = ctx.saved_tensors
        if ctx.padding is not None:
            g = g.masked_fill((index == ctx.padding).unsqueeze(-1), 0.0)
        batch = index.shape[0]
        ctx.sink(Rows(index.reshape(batch, -1), g.reshape(batch, -1, g.shape[-1]), ctx.num_rows))
        return None, None, None, None, None


class MultiplyTap(torch.autograd.Function):
    """y = x * w with w broadcast over examples. Gradient per example: g * x, summed where w was broadcast (Dense)."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, anchor: Tensor, w: Tensor, batch: int, sink: Sink) -> Tensor:
        """`x` leads with the examples; `w` is what multiplies it."""
        ctx.sink, ctx.shape, ctx.batch = sink, w.shape, batch
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Hands over sum(g * x) and returns g * w."""
        (g,) = grads
        x, w = ctx.saved_tensors
        ctx.sink(summed(g * x, ctx.shape, ctx.batch))
        return ((g * w).sum_to_size(x.shape) if ctx.needs_input_grad[0] else None), None, None, None, None


class AddTap(torch.autograd.Function):
    """y = x + scale * w with w broadcast over examples (also from nothing: x = 0). Gradient per example: scale * g
    (Dense).
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, anchor: Tensor, w: Tensor, scale: float, batch: int, sink: Sink) -> Tensor:
        """`x` leads with the examples, or the result does."""
        ctx.sink, ctx.shape, ctx.x_shape, ctx.scale, ctx.batch = sink, w.shape, x.shape, scale, batch
        return x + scale * w if scale != 1 else x + w

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Hands over the sum of g and returns g."""
        (g,) = grads
        ctx.sink(summed(g * ctx.scale, ctx.shape, ctx.batch))
        return (g.sum_to_size(ctx.x_shape) if ctx.needs_input_grad[0] else None), None, None, None, None, None


class LayerNormTap(torch.autograd.Function):
    """LayerNorm over the last dimension, y = w * n(x) + b. Per example: w: sum of g * n(x); b: sum of g (Dense)."""

    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        anchor: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        batch: int | None,
        *sinks: Sink | None,
    ) -> Tensor:
        """`batch`: None if the examples are not in front. `sinks`: of weight and bias, None where frozen."""
        ctx.batch = batch
        out, mean, rstd = torch.native_layer_norm(x, list(weight.shape), weight, bias, eps)
        ctx.weight_sink, ctx.bias_sink = sinks
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, mean, rstd, weight, *([bias] if bias is not None else []))
        return out

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Hands over both sums and returns the input's gradient."""
        (g,) = grads
        x, mean, rstd, weight, *rest = ctx.saved_tensors
        if ctx.weight_sink:
            ctx.weight_sink(summed(g * ((x - mean) * rstd), weight.shape, ctx.batch))
        if ctx.bias_sink:
            ctx.bias_sink(summed(g, weight.shape, ctx.batch))
        gx = None
        if ctx.needs_input_grad[0]:
            gx, _, _ = torch.ops.aten.native_layer_norm_backward(
                g, x, list(weight.shape), mean, rstd, weight, rest[0] if rest else None, [True, False, False]
            )
        return gx, None, None, None, None, None, None, None


class AnyTap(torch.autograd.Function):
    """y = f(data, parameters) for any f that maps each example by itself: f's own gradients, by vmap over examples."""

    @staticmethod
    def forward(
        ctx: Context, anchor: Tensor, function: Callable[..., Tensor], sinks: Sequence[Sink], *tensors: Tensor
    ) -> Tensor:
        """`tensors`: first one parameter a sink, then the data, each [B, ...]; `function` takes them in this order."""
        ctx.function, ctx.sinks = function, sinks
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Hands over each parameter's gradients and returns those of the data."""
        count = len(ctx.sinks)
        parameters, data = ctx.saved_tensors[:count], ctx.saved_tensors[count:]

        def of_one(g: Tensor, *example: Tensor) -> tuple[Tensor, ...]:
            one = [x.unsqueeze(0) for x in example]
            vjp = torch.func.vjp(lambda *all_: ctx.function(*all_), *parameters, *one)[1]
            return vjp(g.unsqueeze(0))

        found = torch.func.vmap(of_one)(grads[0], *data)
        for sink, gradient in zip(ctx.sinks, found[:count], strict=True):
            sink(Dense(gradient.to(wide(gradient))))
        inputs = [g.squeeze(1) for g in found[count:]]
        return None, None, None, *([None] * count), *inputs


def summed(g: Tensor, shape: torch.Size, batch: int | None) -> Dense | None:
    """[B, ...] -> [B, *shape]: the sum over the positions along which a tensor of `shape` was broadcast.

    The sum is in float32 or better. `g` may also be [B*T, k], flattened example by example. None if `batch` is.
    """
    if batch is None:
        return None
    if g.shape[0] != batch:
        g = g.reshape(batch, -1, g.shape[-1])
    padded = (1,) * (g.dim() - len(shape)) + tuple(shape)
    axes = [i for i in range(1, g.dim()) if padded[i] == 1 and g.shape[i] != 1]
    total = g.sum(axes, dtype=wide(g)) if axes else g.to(wide(g))
    return Dense(total.reshape(g.shape[0], *shape))
