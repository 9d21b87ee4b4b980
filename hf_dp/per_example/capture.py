"""Borrows a model's trainable parameters for one pass over a micro-batch, and gathers each example's gradient.

`Capture` records one pass. With several examples, parameters are replaced by proxies that see every use. With one
example they are replaced by plain leaves: autograd's gradient *is* the example's then, whatever the layer. Forward and
backward run, and factors are recorded. Other rooms call `clipped_gradient_sum`. The model is left as it was found,
after an exception too, and `p.grad` is never written.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from hf_dp.errors import CaptureError, UnseenUse, UnsupportedParameterError
from hf_dp.per_example import factors as fx
from hf_dp.per_example import norms
from hf_dp.per_example.borrowing import places_of
from hf_dp.per_example.clipping import clip_factors
from hf_dp.per_example.cost import LAUNCHES, materialise_is_cheaper
from hf_dp.per_example.factors import Dense, Factor, Outer
from hf_dp.per_example.forms import ONE, SEVERAL, SHARED, Forms, Key, Use
from hf_dp.per_example.new_memory import zeros_in_new_memory
from hf_dp.per_example.norms import Measured
from hf_dp.per_example.pairs import Pair, one_tap_each
from hf_dp.per_example.proxy import ParameterProxy
from hf_dp.per_example.rules import apply_rule
from hf_dp.per_example.stacks import Joined, Stacks, add_weighted_sums, joined
from hf_dp.per_example.units import folded

T = TypeVar("T")
Shapes: TypeAlias = Mapping[torch.Size, int]
REMEDY = (
    "freeze it, or set per_device_train_batch_size=1 (and no token budget): one example at a time is exact for any "
    "layer"
)


class Capture:
    """What one pass over `size` examples records: parameter name -> factors of its per-example gradients.

    Attributes:
        batch_size: how many rows lead in the pass: one an example, or `forms.unit_rows` where examples are units of
            several rows. Rules speak of rows; what they hand over is folded to examples (see `units`).
        anchor: a leaf without values, through which taps make their outputs require a gradient.
        operations: parameter name -> the operations that used it, in order.
        refusals: (parameter, operation) pairs without an exact rule. If `collecting`, they are noted here instead of
            raised.
        seen: the uses in which it had to be decided whether rows are the examples'.

    Args:
        size: B.
        collecting: to take an inventory.
        forms: whether rows are the examples', as far as an inventory has found it.
        shapes: of the parameters that are trained, and how many there are of each.
    """

    apply_rule = staticmethod(apply_rule)  # proxies call the rules through their capture, which imports both

    def __init__(self, size: int, forms: Forms, *, collecting: bool = False, shapes: Shapes | None = None) -> None:
        self._stacks = Stacks(shapes or {})
        self._unit_rows = forms.unit_rows
        self.batch_size = size * self._unit_rows
        self.seen: dict[Key, list[Use]] = {}
        self._forms = forms
        self.anchor = torch.zeros((), requires_grad=True)
        self.recorded: dict[str, list[Factor]] = {}
        self.operations: dict[str, dict[str, None]] = {}
        self.refusals: dict[tuple[str, str], None] = {}
        self._collecting = collecting
        self._watched: list[ParameterProxy] = []

    def watch(self, proxy: ParameterProxy) -> None:
        """Remembers a leaf to which autograd itself must never deliver a gradient."""
        self._watched.append(proxy)

    def forget(self) -> None:
        """Drops factors and proxies. They refer back to this object, and only the garbage collector frees a cycle."""
        self.recorded, self._watched, self._stacks = {}, [], Stacks({})

    def used(self, parameter: str, operation: str) -> None:
        """Notes that an operation with a rule uses `parameter`."""
        self.operations.setdefault(parameter, {})[operation] = None

    def leads(self, parameter: str, operation: str, shape: Sequence[int], *, flat: bool = False) -> bool:
        """Whether the rows that `parameter` meets are the examples'.

        Args:
            parameter: its name.
            operation: in which they meet.
            shape: of the rows, or what the parameter is repeated to.
            flat: a matrix may have several rows an example, one after the other.

        Raises:
            UnseenUse: they cannot be what the inventory found.
        """
        if not shape or (shape[0] == 1 and len(shape) > 1):
            return False
        flat = flat and len(shape) == 2
        times, rest = divmod(shape[0], self.batch_size)
        led = self._noted((parameter, operation, len(shape)), 0 if rest or not (flat or times == 1) else times)
        if self._collecting:
            self.seen.setdefault((parameter, operation, len(shape)), []).append(Use(shape[0], flat, led))
        return led

    def _noted(self, key: Key, times: int) -> bool:
        """Whether they are the examples', `times` for each; 0 if their number is no multiple of the examples'."""
        form = self._forms.get(key)
        if form == SHARED or (form == ONE and times == 1) or (form == SEVERAL and times):
            return form != SHARED
        if self._collecting:
            return times > 0
        raise UnseenUse(
            f"{key[0]} is used by {key[1]} as it was not on public records, so that it cannot be told which rows "
            f"are the examples': {REMEDY}"
        )

    def record(self, parameter: str, factor: Factor, scale: float | None = None) -> None:
        """Records one use of `parameter`, from a tap's backward: folded to examples, and materialised now if that is
        cheaper (see `cost`).

        Args:
            parameter: its name.
            factor: of its gradients; of LoRA's pairs, divided by `scale`.
            scale: alpha / r of a pair, whose factors are of the form Outer.
        """
        factor = folded(factor, self._unit_rows)
        if isinstance(factor, Outer):
            batch, positions, d = factor.inputs.shape
            spared = 0.0 if scale is None else LAUNCHES / batch
            if materialise_is_cheaper(positions, d, factor.grads.shape[-1], spared):
                factor = self._stacks.product(factor, 1.0 if scale is None else scale)
            elif scale is not None:
                factor = Outer(factor.inputs, factor.grads * scale)
        self.recorded.setdefault(parameter, []).append(factor)

    def refuse(self, parameters: Sequence[str], operation: str, compute: Callable[[], T]) -> T:
        """An operation without a rule: an error.

        If `collecting`, it is noted instead, and computed without these parameters' gradients.
        """
        self.refusals.update({(parameter, operation): None for parameter in parameters})
        if self._collecting:
            return compute()
        raise UnsupportedParameterError(refusal_message(self.refusals))

    def refuse_hidden(self, strays: list[str]) -> None:
        """Refuses parameters to which autograd itself delivered a gradient: `strays`, and proxies used elsewhere."""
        with torch._C.DisableTorchFunctionSubclass():
            strays = strays + [p.parameter for p in self._watched if p.grad is not None]
        for parameter in strays:
            self.refusals[parameter, "a use hidden from PyTorch's functions, as in a fused kernel"] = None
        if strays and not self._collecting:
            raise UnsupportedParameterError(refusal_message(self.refusals))


def refusal_message(refusals: dict[tuple[str, str], None]) -> str:
    """An error message that names each parameter without an exact rule, the operation that uses it, and a remedy."""
    uses = "; ".join(f"{parameter} (used by {operation})" for parameter, operation in refusals)
    return f"no exact per-example rule for: {uses}. For each: {REMEDY}."


def per_example_factors(
    model: nn.Module,
    example_losses: Callable[[], Tensor],
    batch_size: int,
    *,
    capture: Capture | None = None,
    forms: Forms | None = None,
    pairs: bool = True,
) -> tuple[dict[str, list[Factor]], Tensor]:
    """One forward and backward pass.

    Args:
        model: its parameters with `requires_grad` are differentiated.
        example_losses: runs the forward pass and returns one loss an example, [B].
        batch_size: B.
        capture: the record to fill, of batch size B.
        forms: of the model's inventory (`take_inventory(...).forms`). One example needs none.
        pairs: LoRA's pairs may have one tap each (see `pairs`); never where `capture` is given.

    Returns:
        Parameter name -> factors of its per-example gradients; and the losses [B], detached.

    Raises:
        UnsupportedParameterError: an operation that uses a parameter has no rule.
        CaptureError: the losses are not [B], a parameter is used from elsewhere than its module, or it is not known
            which rows are the examples'.
    """
    if batch_size == 1 and capture is None:
        return _single_example(model, example_losses)
    fast: Sequence[Pair] = ()
    places = places_of(model)
    if capture is None and forms is not None:
        capture, fast = Capture(batch_size, forms, shapes=places.shapes), places.pairs if pairs else ()
    if capture is None:
        raise CaptureError(
            f"a pass of {batch_size} examples needs the forms of the model's inventory: give `per_example_factors` "
            "forms=take_inventory(model, batch, example_losses).forms"
        )
    try:
        gathered = partial(_proxy_of, capture)
        with places.lent(places.proxies(capture), gathered) as strays, one_tap_each(fast, capture), torch.enable_grad():
            losses = _checked(example_losses(), batch_size)
            _backward(losses)
        capture.refuse_hidden(strays)
        return {name: fx.merge(uses) for name, uses in capture.recorded.items()}, losses.detach()
    finally:
        capture.forget()


def _proxy_of(capture: Capture, name: str, gathered: Tensor) -> ParameterProxy:
    return ParameterProxy.of(gathered, name, capture)


def _single_example(model: nn.Module, example_losses: Callable[[], Tensor]) -> tuple[dict[str, list[Factor]], Tensor]:
    """With one example in the pass, autograd's gradient is the example's, for any layer and any operation; memory that
    nothing has written holds zeros, not what another pass left there.
    """
    places = places_of(model)
    leaves = {name: p.detach().requires_grad_() for name, p in places.whole.items()}
    gathered = lambda name, values: leaves.setdefault(name, values.detach().requires_grad_())  # noqa: E731
    with places.lent(dict(leaves), gathered) as strays, torch.enable_grad(), zeros_in_new_memory():
        losses = _checked(example_losses(), 1)
        _backward(losses)
    if strays:
        raise CaptureError(f"the model uses {', '.join(strays)} from elsewhere than its module: freeze them")
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {name: [Dense(grad.to_dense().unsqueeze(0))] for name, grad in found.items()}, losses.detach()


def _backward(losses: Tensor) -> None:
    if losses.requires_grad:
        losses.sum().backward()


def _checked(losses: Tensor, batch_size: int) -> Tensor:
    if losses.shape != (batch_size,):
        raise CaptureError(
            f"expected one loss for each of {batch_size} examples, shape [{batch_size}]; got shape {list(losses.shape)}"
        )
    return losses


def squared_norms(factors: dict[str, list[Factor]], blocks: Sequence[Joined], losses: Tensor) -> Measured:
    """Upper bounds of |g_b|^2 over all parameters together, [B], in float64; zeros if there are none."""
    if not factors and not blocks:
        return Measured(torch.zeros_like(losses, dtype=torch.float64), {})
    return norms.squared_norms(factors, [block.gradients for block in blocks])


class PerExample(NamedTuple):
    """Gradient norms and losses, [B] each. Both are secret."""

    norms: Tensor
    losses: Tensor


Pass: TypeAlias = Callable[[nn.Module, Callable[[], Tensor], int], tuple[dict[str, list[Factor]], Tensor]]


@torch.no_grad()
def clipped_gradient_sum(
    model: nn.Module,
    example_losses: Callable[[], Tensor],
    batch_size: int,
    clip_norm: float,
    into: dict[str, Tensor],
    factors_of: Pass = per_example_factors,
) -> PerExample:
    """Adds sum_b min(1, C / |g_b|) g_b to the buffers `into`.

    g_b is the gradient of example b's loss with respect to all trainable parameters together (flat clipping). An
    example whose gradient is not finite, or whose norm cannot be bounded, adds exactly nothing. B = 0 does nothing.

    Args:
        model: unwrapped (no DDP around it).
        example_losses: runs the forward pass and returns one loss an example, [B].
        batch_size: B.
        clip_norm: C, above 0.
        into: parameter name -> accumulator of the parameter's shape, contiguous, float32 or better.
        factors_of: does the pass; it must give what `per_example_factors` gives.

    Returns:
        Upper bounds of the norms |g_b|, and the losses. Both are secret.

    Raises:
        UnsupportedParameterError, CaptureError: as `per_example_factors`.
    """
    if batch_size == 0:
        return PerExample(torch.zeros(0), torch.zeros(0))
    factors, losses = factors_of(model, example_losses, batch_size)
    with torch.autocast(losses.device.type, enabled=False):  # it would make float32 products bfloat16
        squares = _add_clipped(factors, losses, clip_norm, into)
    return PerExample(squares.sqrt(), losses)


def clipped_gradients(
    model: nn.Module, example_losses: Callable[[], Tensor], batch_size: int, clip_norm: float, factors_of: Pass
) -> tuple[PerExample, Callable[[str, Tensor], None]]:
    """As `clipped_gradient_sum`, one parameter after another, for sums that don't fit in memory together.

    Returns:
        Norms and losses, both secret; and `add(name, into)`, which adds sum_b min(1, C / |g_b|) g_b of one parameter to
        a tensor of its shape.
    """
    factors, losses = factors_of(model, example_losses, batch_size)
    with torch.no_grad(), torch.autocast(losses.device.type, enabled=False):
        measured = squared_norms(factors, (), losses)
        weights = clip_factors(measured.squares.sqrt(), clip_norm)
        bounded = weights > 0
        some = None if bool(bounded.all()) else bounded

    @torch.no_grad()
    def add(name: str, into: Tensor) -> None:
        uses = factors.get(name, [])
        with torch.autocast(losses.device.type, enabled=False):
            uses = uses if some is None else fx.without_examples(uses, some)
            fx.add_weighted_sum(uses, weights, into, measured.cancelling.get(name, ()) if uses else ())

    return PerExample(measured.squares.sqrt(), losses), add


def _add_clipped(factors: dict[str, list[Factor]], losses: Tensor, clip_norm: float, into: dict[str, Tensor]) -> Tensor:
    """Adds the clipped gradients to `into`; upper bounds of their squared norms before clipping, [B]."""
    blocks = joined(factors)
    inside = {name for block in blocks for name in block.names}
    factors = {name: uses for name, uses in factors.items() if name not in inside}
    measured = squared_norms(factors, blocks, losses)
    weights = clip_factors(measured.squares.sqrt(), clip_norm)
    bounded = weights > 0
    if not bool(bounded.all()):
        factors = {name: fx.without_examples(uses, bounded) for name, uses in factors.items()}
        blocks = [block.without_examples(bounded) for block in blocks]
    for name, uses in factors.items():
        fx.add_weighted_sum(uses, weights, into[name], measured.cancelling.get(name, ()))
    for block in blocks:
        add_weighted_sums(block, weights, into)
    return measured.squares


def views(flat: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameter name -> its part of a flat vector, in its shape, one after the other; a rest at the end stays out."""
    sizes = [p.numel() for p in parameters.values()]
    pieces = flat[: sum(sizes)].split(sizes)
    return {name: piece.view(p.shape) for (name, p), piece in zip(parameters.items(), pieces, strict=True)}
