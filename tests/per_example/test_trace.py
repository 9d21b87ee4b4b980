"""A trace tells passes apart that do other things, and takes for the same what only has other sizes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_dp.per_example.taps import Context
from hf_dp.per_example.trace import Trace, trace_of


class Model(nn.Module):
    def __init__(self, use: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.use = nn.Linear(4, 4), use
        self.register_buffer("here", torch.ones(4))
        self.register_buffer("there", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, self.linear(x))


def trace(use: Callable[[nn.Module, Tensor], Tensor], examples: int, length: int) -> Trace:
    losses = lambda model, batch: model(batch["x"]).sum((1, 2))  # noqa: E731
    return trace_of(Model(use), losses, {"x": torch.randn(examples, length, 4)})


def scan(model: nn.Module, x: Tensor) -> Tensor:
    state = torch.zeros_like(x[:, 0])
    for i in range(x.shape[1]):
        state = state * 0.5 + x[:, i]
    return x + state[:, None]


SAME = {
    "layers alone": lambda model, x: x,
    "heads": lambda model, x: x.view(*x.shape[:2], 2, 2).transpose(1, 2).reshape(x.shape),
    "a mask of the length": lambda model, x: x * torch.ones(x.shape[1], x.shape[1]).tril().sum(0)[:, None],
    "the last position": lambda model, x: x + x[:, x.shape[1] - 1 :],
    "positions that Python counted": lambda model, x: x + x[:, torch.tensor(list(range(x.shape[1])))],
    "examples and positions together": lambda model, x: x.reshape(-1, 4).view_as(x),
    "a loop over positions": scan,
    "a loop over examples": lambda model, x: torch.stack([one + 1 for one in x]),
}


@pytest.mark.parametrize("name", SAME)
def test_other_sizes_are_the_same_pass(name: str) -> None:
    lengths = {length: trace(SAME[name], 3, length) for length in (5, 7, 12)}
    assert lengths[7].lies_between([lengths[5], lengths[12]])
    assert not lengths[5].lies_between([lengths[7], lengths[12]])
    assert trace(SAME[name], 8, 6).is_grown(trace(SAME[name], 2, 6), 4)


def mixed(gradient: Tensor, here: bool) -> Tensor:
    return gradient - gradient.mean(0) if here else gradient * 1


class Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, here: bool) -> Tensor:
        ctx.here = here
        return x.clone()

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, None]:
        return mixed(gradient, ctx.here), None


def hooked(x: Tensor, here: bool) -> Tensor:
    y = x.clone()
    y.register_hook(lambda gradient: mixed(gradient, here))
    return y


OTHER = {
    "an operation": lambda model, x, here: x - x.mean(0, keepdim=True) if here else x,
    "one more of a kind": lambda model, x, here: x + x + x if here else x + x,
    "a dimension": lambda model, x, here: x + x.sum(0 if here else 1, keepdim=True),
    "a factor": lambda model, x, here: x * (0.5 if here else 1.0),
    "a shift": lambda model, x, here: x.roll(1 if here else 0, 0),
    "a buffer": lambda model, x, here: x + (model.here if here else model.there),
    "indices": lambda model, x, here: x[[0] * len(x) if here else list(range(len(x)))],
    "a tensor of indices": lambda model, x, here: x[torch.tensor([0] * len(x) if here else list(range(len(x))))],
    "a pass with gradients": lambda model, x, here: x + (x.mean(0) if here and torch.is_grad_enabled() else 1.0),
    "what a function gives back": lambda model, x, here: Back.apply(x, here),
    "what a hook gives back": lambda model, x, here: hooked(x, here),
    "what is computed again": lambda model, x, here: checkpoint(
        lambda y: y + (y.mean(0) if here and torch.is_grad_enabled() else 1.0), x, use_reentrant=True
    ),
    "a type": lambda model, x, here: x.double() if here else x.float(),
}


@pytest.mark.parametrize("name", OTHER)
def test_something_else_at_some_length_or_for_some_number_of_examples_is_seen(name: str) -> None:
    by_length = lambda model, x: OTHER[name](model, x, x.shape[1] == 7)  # noqa: E731
    lengths = {length: trace(by_length, 3, length) for length in (5, 6, 7, 12)}
    assert lengths[6].lies_between([lengths[5], lengths[12]])
    assert not lengths[7].lies_between([lengths[5], lengths[12]])
    by_number = lambda model, x: OTHER[name](model, x, len(x) == 8)  # noqa: E731
    few, some, many = (trace(by_number, number, 6) for number in (2, 6, 8))
    assert some.is_grown(few, 3)
    assert not many.is_grown(few, 4)
