"""A batch and each of its examples alone, made up -> an error if anything couples the examples.

The reference is autograd's own gradient with one example in the pass, so the check also tests the per-example rules on
the user's model. It catches, among others: left padding with absolute positions, a loss averaged over the batch, a
router's auxiliary loss, BatchNorm, layers that mix examples, gradients that reach a parameter past its proxy, and
layers that write what they saw into the model's state.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_dp.errors import SelfCheckError
from hf_dp.per_example.batches import Batch, MicroBatch, repeated
from hf_dp.per_example.capture import Pass, clipped_gradient_sum, clipped_gradients, per_example_factors
from hf_dp.per_example.factors import Factor, add_weighted_sum, exact
from hf_dp.per_example.gathering import trains_shards
from hf_dp.per_example.inventory import ExampleLosses
from hf_dp.per_example.proof import State, state_put_back, untouched

# The relative difference that rounding alone may make, by the dtype of the activations: bf16 has 8 bits, and the shapes
# of a batch and of an example alone take different kernels. A coupling moves the sum by 0.1 or more.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3, torch.bfloat16: 0.08, torch.float16: 0.02}


class Report(dict[str, float]):
    """What the check measured: 'difference' from one example at a time, 'tolerance', 'sensitivity' in units of C."""


class _NoDropout(TorchFunctionMode):
    """Within, dropout has rate 0, so that two passes can be compared; the model stays in training mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("dropout", "dropout_", "alpha_dropout", "feature_dropout", "dropout2d") and args:
            return args[0]
        if name == "scaled_dot_product_attention":
            kwargs.pop("dropout_p", None)
            args = args[:4]
        return func(*args, **kwargs)


def self_check(
    model: nn.Module,
    collated: Sequence[Batch],
    example_losses: ExampleLosses,
    clip_norm: float,
    factors_of: Pass,
    one_a_pass: bool = False,
) -> Report:
    """Compares a batch's gradients with those of its examples alone, and clipped sums of neighbouring batches.

    Args:
        model: unwrapped; left in its mode, with buffers and random state as they were.
        collated: the whole batch first, then each of its examples collated alone, in the same order. If examples have a
            pass of their own, the whole is the first example, and only what the others leave in the model is checked.
        example_losses: (model, batch) -> one loss an example.
        clip_norm: C.
        factors_of: what will do the passes over several examples.
        one_a_pass: there will be no such passes; only what a pass leaves in the model is checked.

    Raises:
        SelfCheckError: with the measured difference and the usual causes.
    """
    whole, *alone = collated
    batch = whole if isinstance(whole, MicroBatch) else MicroBatch(whole, len(alone))
    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng(devices=_devices(model)), ExitStack() as stack:
            plain = getattr(factors_of, "func", factors_of) is per_example_factors  # compiled blocks are not
            if plain or _draws(model, alone[0], example_losses):
                stack.enter_context(_NoDropout())
            _refuse_what_is_written(model, alone, example_losses)
            if one_a_pass:
                return Report(difference=0.0, tolerance=0.0, sensitivity=1.0)
            with untouched(model) if plain else state_put_back(model):
                return _compare(model, batch, alone, example_losses, clip_norm, factors_of)
    finally:
        model.train(was_training)


def is_coupled(model: nn.Module, collated: Sequence[Batch], example_losses: ExampleLosses, factors_of: Pass) -> bool:
    """Whether an example's gradient in the batch differs from that alone by more than rounding, or is not finite.

    Args:
        model: unwrapped; left as it was.
        collated: as for `self_check`, with several examples in the whole: those of the others, again and again where it
            has more of them.
        example_losses: (model, batch) -> one loss an example.
        factors_of: what will do the passes over several examples.
    """
    whole, *alone = collated
    batch = whole if isinstance(whole, MicroBatch) else MicroBatch(whole, len(alone))
    with undisturbed(model):
        difference = _difference(model, batch, alone, example_losses, factors_of)
    return not difference <= TOLERANCE[precision(model)]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[State]:
    """Around passes in training mode without dropout: they leave no trace in the model or in random states. Gives the
    model's state, to be put back between passes too.
    """
    was_training = model.training
    model.train()
    try:
        with untouched(model) as state, torch.random.fork_rng(devices=_devices(model)), _NoDropout():
            yield state
    finally:
        model.train(was_training)


def _draws(model: nn.Module, batch: Batch, example_losses: ExampleLosses) -> bool:
    """Whether a pass draws random numbers. If not, a compiled model is checked with the graphs that will be trained."""
    devices = _devices(model)
    before = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
    with untouched(model):
        per_example_factors(model, lambda: example_losses(model, batch), 1)
    after = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
    return not all(map(torch.equal, before, after))


def _refuse_what_is_written(model: nn.Module, alone: Sequence[Batch], example_losses: ExampleLosses) -> None:
    """An error if forward and backward leave something of an example in the model: it would be saved without noise."""
    saved = set(model.state_dict(keep_vars=True))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    ends = []
    for one in alone[:2]:
        with untouched(model) as state:
            per_example_factors(model, lambda one=one: example_losses(model, one), 1)  # type: ignore[misc]
            ends.append({k: v.detach().clone() for k, v in state.changed().items() if k in saved})
    first, last = ends[0], ends[-1]
    names = dict.fromkeys([*first, *last])
    written = [n for n in names if n in frozen or n not in first or n not in last or not torch.equal(first[n], last[n])]
    if written:
        raise SelfCheckError(
            f"the forward or backward pass writes to {', '.join(written)}, which then holds something of the private "
            "examples and is saved without noise: freeze these statistics (module.eval(), momentum=0) or replace the "
            "layer (BatchNorm by GroupNorm or LayerNorm)."
        )


def _compare(
    model: nn.Module,
    batch: MicroBatch,
    alone: Sequence[Batch],
    example_losses: ExampleLosses,
    clip_norm: float,
    factors_of: Pass,
) -> Report:
    difference = _difference(model, batch, alone, example_losses, factors_of)
    tolerance = TOLERANCE[precision(model)]
    if not difference <= tolerance:
        raise SelfCheckError(_explanation(difference, tolerance))
    sensitivity = _largest_move(model, batch, example_losses, clip_norm, factors_of) / clip_norm
    if not sensitivity <= 1 + tolerance:
        raise SelfCheckError(
            f"removing one example moved the clipped sum by {sensitivity:.3f} x C; at most 1 is allowed."
        )
    return Report(difference=difference, tolerance=tolerance, sensitivity=sensitivity)


def _difference(
    model: nn.Module, batch: MicroBatch, alone: Sequence[Batch], example_losses: ExampleLosses, factors_of: Pass
) -> float:
    """The greatest |g_b in the batch - g_b alone|, relative to the greatest |g_b alone|."""
    differences, sizes = _squared_differences(model, batch, alone, example_losses, factors_of)
    return float((differences.max() / sizes.max().clamp_min(torch.finfo(sizes.dtype).tiny)).sqrt())


def _squared_differences(
    model: nn.Module, batch: MicroBatch, alone: Sequence[Batch], example_losses: ExampleLosses, factors_of: Pass
) -> tuple[Tensor, Tensor]:
    """For each example alone: |g_b in the batch - g_b alone|^2 of its own row or, if that is greater, the mean over the
    rows in which it is repeated, with random weights, whose rounding doesn't grow with their number; and |g_b alone|^2.
    Each [examples alone]; one parameter of one example at a time.
    """
    together, losses = factors_of(model, lambda: example_losses(model, batch), batch.size)
    alone = alone[: batch.size]
    own = torch.eye(batch.size, dtype=exact(losses).dtype, device=losses.device)
    differences, sizes = own.new_zeros(2, len(alone))
    weights = torch.rand(batch.size, generator=torch.Generator().manual_seed(0)).to(own) + 0.5
    example_of = torch.tensor(repeated(len(alone), batch.size), device=losses.device)
    for number, one in enumerate(alone):
        singly, _ = per_example_factors(model, lambda one=one: example_losses(model, one), 1)  # type: ignore[misc]
        again = weights * (example_of == number) * (1 - own[number])
        sizes[number] = _squared_difference(model, singly, {}, own[number])
        differences[number] = _squared_difference(model, singly, together, own[number])
        if again.any():
            repeats = _squared_difference(model, singly, together, again / again.norm().clamp_min(1))
            differences[number] = torch.maximum(differences[number], repeats)
    return differences, sizes


@torch.no_grad()
def _squared_difference(
    model: nn.Module, singly: dict[str, list[Factor]], together: dict[str, list[Factor]], weights: Tensor
) -> Tensor:
    """|sum of weights_b (g_b in the batch - g alone)|^2, one parameter at a time; `weights` [B]."""
    total = torch.zeros((), dtype=weights.dtype, device=weights.device)
    for name, p in model.named_parameters():
        if p.requires_grad:
            difference = _zeros(p)
            add_weighted_sum(singly.get(name, []), weights.sum()[None], difference)
            add_weighted_sum(together.get(name, []), -weights, difference)
            total += difference.square().sum()
    return total


def precision(model: nn.Module) -> torch.dtype:
    """The coarsest dtype that activations may have."""
    device = next(model.parameters()).device.type
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    return min(dtypes, key=lambda d: torch.finfo(d).bits * 100 - torch.finfo(d).eps)


def _largest_move(
    model: nn.Module, batch: MicroBatch, example_losses: ExampleLosses, clip_norm: float, factors_of: Pass
) -> float:
    """max over examples of |clipped sum with it - clipped sum without it|: at most C."""
    whole = _clipped(model, batch, example_losses, clip_norm, factors_of)
    moves = []
    for row in range(batch.size):
        parts = [batch.rows(slice(0, row)), batch.rows(slice(row + 1, batch.size))]
        without = [_clipped(model, p, example_losses, clip_norm, factors_of) for p in parts if p.size]
        moves.append(_distance(model, whole, without))
    return max(moves)


def _clipped(
    model: nn.Module, batch: MicroBatch, example_losses: ExampleLosses, clip_norm: float, factors_of: Pass
) -> Callable[[str, Tensor], None]:
    """Adds the clipped sum of one parameter, by name; what lies in shards is never whole for all of them together."""
    losses = lambda: example_losses(model, batch)  # noqa: E731
    if trains_shards(model):
        return clipped_gradients(model, losses, batch.size, clip_norm, factors_of)[1]
    into = {name: _zeros(p) for name, p in model.named_parameters() if p.requires_grad}
    clipped_gradient_sum(model, losses, batch.size, clip_norm, into, factors_of)

    def add(name: str, total: Tensor) -> None:
        total += into[name]

    return add


@torch.no_grad()
def _distance(
    model: nn.Module, whole: Callable[[str, Tensor], None], without: Sequence[Callable[[str, Tensor], None]]
) -> float:
    squared = 0.0
    for name, p in model.named_parameters():
        if p.requires_grad:
            moved = _zeros(p)
            for add in without:
                add(name, moved)
            whole(name, moved.neg_())
            squared += float(moved.square().sum())
    return math.sqrt(squared)


def _zeros(p: Tensor) -> Tensor:
    return torch.zeros(p.shape, dtype=exact(p).dtype, device=p.device)


def _explanation(difference: float, tolerance: float) -> str:
    return (
        f"an example's gradient in a batch differs from its gradient alone by {difference:.3g} (relative; rounding "
        f"allows {tolerance:.0e}): something couples the examples, so no bound on one example's influence holds. Usual "
        "causes: padding on the left with absolute positions (set tokenizer.padding_side='right'), a loss averaged "
        "over the batch or over its tokens, a router's auxiliary loss, batch statistics, a layer that mixes examples. "
        "With per_device_train_batch_size=1 each example has a pass of its own, in which there is nobody to mix it "
        "with."
    )


def _devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
