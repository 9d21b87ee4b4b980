"""A model whose repeated blocks are compiled by torch.compile -> the same per-example gradients, in fewer kernels.

Code that is traced must not look at parameters through stand-ins. So within the blocks each trained linear map is
replaced, for the pass, by a *module*: y = x W^T with W constant, and a second argument `anchor`, one zero expanded to
[B, r, d], which takes no memory and is not read. The gradient of `anchor` is what W's would be for each example,
g_b^T x_b. The graph is an ordinary one, and autograd adds up several uses. Trained parameters outside of the blocks go
through `capture`. A pass over one example runs uncompiled.

A block under gradient checkpointing stays in its place, and what it checkpoints is compiled: forward and its repetition
in backward run the same graphs, and what lies between them is freed as without compiling.

Legend: B examples, T positions, d inputs, r outputs.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_dp.errors import UnsupportedOptionError
from hf_dp.per_example.capture import per_example_factors
from hf_dp.per_example.factors import Dense, Factor, per_example_product, wide
from hf_dp.per_example.forms import Forms
from hf_dp.per_example.inventory import Inventory
from hf_dp.per_example.taps import Context
from hf_dp.per_example.units import folded

# How many graphs one class of blocks may have (first block or later, padded or not, checked or trained, ...). Beyond
# that number, torch.compile runs blocks uncompiled.
GRAPHS = 32
CHECKPOINT = "_gradient_checkpointing_func"  # of transformers' GradientCheckpointingLayer, set where it is switched on


class AnchoredLinear(torch.autograd.Function):
    """y = x W^T for x [B, ..., d]. The gradient of `anchor`, [B, r, d], is g^T x over each example's positions."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, anchor: Tensor) -> Tensor:
        """`anchor` is not read."""
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, of W (none) and of `anchor`: g W, None, and g^T x for each example."""
        (g,) = grads
        x, weight = ctx.saved_tensors
        by_example = per_example_product(g.flatten(1, -2), x.flatten(1, -2))
        return (g @ weight if ctx.needs_input_grad[0] else None), None, by_example


class TappedLinear(nn.Module):
    """Stands in for a linear layer without bias during a pass, for which it is given `weight` and `anchor`."""

    weight: Tensor
    anchor: Tensor

    def __init__(self, dims: frozenset[int]) -> None:
        super().__init__()
        self.dims = dims  # numbers of dimensions with which x was seen to lead with the examples

    def forward(self, x: Tensor) -> Tensor:
        """[B, ..., d] -> [B, ..., r].

        Raises:
            UnsupportedOptionError: the examples do not lead.
        """
        if x.shape[0] != self.anchor.shape[0] or x.dim() not in self.dims:
            raise UnsupportedOptionError(
                f"torch_compile: {list(x.shape)} does not lead with {self.anchor.shape[0]} examples; leave it off"
            )
        weight = self.weight
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        result: Tensor = AnchoredLinear.apply(x, weight, self.anchor)
        return result


class _Leaf(NamedTuple):
    name: str  # of the weight
    parent: nn.Module
    key: str
    module: nn.Linear
    stand_in: TappedLinear


class CheckpointedCall:
    """Stands in for a block's checkpointing function: checkpoints the block's computation, compiled.

    Args:
        checkpoint: the block's own function, (call, *args) -> result, where the block gives a `functools.partial`.
        compile_: of a function.
    """

    def __init__(self, checkpoint: Callable[..., Any], compile_: Callable[..., Any]) -> None:
        self._checkpoint, self._compile = checkpoint, compile_

    def __call__(self, call: partial[Any], *args: Any) -> Any:
        """As the block's own function."""
        return self._checkpoint(partial(self._compile(call.func), *call.args, **call.keywords), *args)


class CompiledBlocks:
    """Forms per-example factors as `capture.per_example_factors` does, with the model's repeated blocks compiled.

    Args:
        model: unwrapped; between passes it is left as it was.
        inventory: of the model.
        backend: of torch.compile.
        checkpointing: the model will be under gradient checkpointing.

    Raises:
        UnsupportedOptionError: there is nothing to compile, or other parameters are trained in the blocks, which names
            all; or `checkpointing` is asked for and not done by the blocks themselves.
    """

    def __init__(
        self, model: nn.Module, inventory: Inventory, backend: str = "inductor", checkpointing: bool = False
    ) -> None:
        self._forms = inventory.forms
        self._blocks = list(_repeated_blocks(model))
        inside = {id(m) for blocks in self._blocks for m in blocks.modules()}
        self._leaves = list(_leaves(model, inside, inventory.forms))
        linear = {
            row.parameter
            for row in inventory
            if {*row.operations.split(", ")} <= {"linear", "to", "float"} and _dims(row.parameter, inventory.forms)
        }
        wrong = list(_others(model, inside, linear & {leaf.name for leaf in self._leaves}))
        if wrong or not self._leaves:
            found = f"in them, {', '.join(wrong)}" if wrong else "no such parameter"
            raise UnsupportedOptionError(
                "torch_compile: compiles the model's repeated blocks where only weights of linear layers without bias "
                f"are trained in them, as LoRA's are; found {found}. Leave it off, or train LoRA on linear layers"
            )
        self._own = [list(blocks) for blocks in self._blocks]
        others = {type(b).__name__ for own in self._own for b in own if not isinstance(b, GradientCheckpointingLayer)}
        if checkpointing and others:
            raise UnsupportedOptionError(
                f"torch_compile and gradient_checkpointing: {', '.join(sorted(others))} is not checkpointed by itself "
                "(as transformers' GradientCheckpointingLayer is); leave one of both off"
            )
        compiled = partial(torch.compile, dynamic=True, backend=backend)
        self._compiled: list[list[nn.Module]] = [
            [cast(nn.Module, compiled(block)) for block in own] for own in self._own
        ]
        self._compile = cache(compiled)

    def __call__(
        self, model: nn.Module, example_losses: Callable[[], Tensor], batch_size: int
    ) -> tuple[dict[str, list[Factor]], Tensor]:
        """One forward and backward; see `capture.per_example_factors`."""
        if batch_size == 1:
            return per_example_factors(model, example_losses, batch_size)
        from torch._dynamo import config as dynamo  # 2 s, which only those who compile need to spend

        rows = self._forms.unit_rows
        with self._lent(batch_size * rows) as anchors, dynamo.patch(recompile_limit=GRAPHS):
            factors, losses = per_example_factors(model, example_losses, batch_size, forms=self._forms, pairs=False)
        found = {name: anchor.grad for name, anchor in anchors.items() if anchor.grad is not None}
        return factors | {name: [folded(Dense(gradient), rows)] for name, gradient in found.items()}, losses

    @contextmanager
    def _lent(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Puts compiled blocks and stand-ins into the model, and always takes them out; parameter -> its anchor."""
        anchors = {}
        checkpointed = {block: vars(block)[CHECKPOINT] for own in self._own for block in own if checkpoints(block)}
        try:
            for name, parent, key, module, stand_in in self._leaves:
                zero = torch.zeros((), dtype=wide(module.weight), device=module.weight.device)
                stand_in.weight = module.weight.detach()
                stand_in.anchor = anchors[name] = zero.expand(batch_size, *module.weight.shape).requires_grad_()
                parent._modules[key] = stand_in
            _put(self._blocks, self._compiled)
            for block in checkpointed:
                vars(block)[CHECKPOINT] = CheckpointedCall(checkpointed[block], self._compile)
            yield anchors
        finally:
            _put(self._blocks, self._own)
            for block, own in checkpointed.items():
                vars(block)[CHECKPOINT] = own
            for leaf in self._leaves:
                leaf.parent._modules[leaf.key] = leaf.module
                leaf.stand_in.weight = leaf.stand_in.anchor = torch.empty(0)


def _put(lists: Sequence[nn.ModuleList], modules: Sequence[Sequence[nn.Module]]) -> None:
    for blocks, those in zip(lists, modules, strict=True):
        for place, module in enumerate(those):
            if not checkpoints(blocks[place]):
                blocks[place] = module


def checkpoints(block: nn.Module) -> bool:
    """Whether the block itself checkpoints what it computes in training."""
    return CHECKPOINT in vars(block) and bool(block.gradient_checkpointing)


def _repeated_blocks(model: nn.Module) -> Iterator[nn.ModuleList]:
    """The outermost lists of two or more modules of one class."""
    for child in model.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(m) for m in child}) == 1:
            yield child
        else:
            yield from _repeated_blocks(child)


def _dims(parameter: str, forms: Forms) -> frozenset[int]:
    """The numbers of dimensions of what it meets; empty unless the examples always lead, with positions behind them."""
    met = {dims: led for (name, _, dims), led in forms.items() if name == parameter}
    return frozenset(met) if all(led and dims > 2 for dims, led in met.items()) else frozenset()


def _leaves(model: nn.Module, inside: set[int], forms: Forms) -> Iterator[_Leaf]:
    for prefix, parent in model.named_modules():
        for key, module in parent.named_children():
            plain = type(module) is nn.Linear and module.bias is None and module.weight.requires_grad
            if plain and id(module) in inside:
                name = f"{prefix}.{key}.weight"
                yield _Leaf(name, parent, key, module, TappedLinear(_dims(name, forms)))


def _others(model: nn.Module, inside: set[int], known: set[str]) -> Iterator[str]:
    """Names of parameters trained in the blocks that are not `known`, or that are tied to another place."""
    places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules():
        for key, p in module.named_parameters(recurse=False):
            name = f"{prefix}.{key}"
            if p.requires_grad and id(module) in inside and (name not in known or places[id(p)] > 1):
                yield name
