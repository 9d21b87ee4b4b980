"""What makes one example's loss depend on another's, and random architectures in which something may.

All of it maps hidden states [B, T, d] to hidden states.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Couplings: what comes out holds something of the other examples.


def capacity(h: Tensor) -> Tensor:
    tokens = h.flatten(0, 1)
    chosen = tokens[:, 0] > 0
    place = chosen.long().cumsum(0)
    return (tokens * (chosen & (place <= 2)).unsqueeze(1)).view_as(h)


def read_back(h: Tensor) -> Tensor:
    return h * 2 if h.mean().item() > 0 else h


def longest(h: Tensor) -> Tensor:
    positions = torch.arange(h.shape[1])
    return h * 2 if bool(positions.max() + 1 > 100) else h


def through_numpy(h: Tensor) -> Tensor:
    return h * float(h.detach().numpy().mean())


def through_a_list(h: Tensor) -> Tensor:
    return h * max(h.detach()[:, 0, 0].tolist())


def written_in_place(h: Tensor) -> Tensor:
    out = h.clone()
    out[0] += h[1]
    return out


def written_by_index(h: Tensor) -> Tensor:
    return h.index_add(0, torch.tensor([0, 0, 0]), h)


def attention_over_examples(h: Tensor) -> Tensor:
    q = h.transpose(0, 1).unsqueeze(1)
    return F.scaled_dot_product_attention(q, q, q).squeeze(1).transpose(0, 1)


def convolved(h: Tensor) -> Tensor:
    return F.conv1d(h.permute(1, 2, 0), torch.ones(h.shape[2], h.shape[2], 3), padding=1).permute(2, 0, 1)


def uninitialised(h: Tensor) -> Tensor:
    return h + torch.empty_like(h) * 0


class Crossing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / (1 + gradient.abs().amax())


def hooked(h: Tensor) -> Tensor:
    out = h * 1.0
    out.register_hook(lambda g: g - g.mean(0))
    return out


COUPLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda h: h - h.mean(0, keepdim=True),
    "one scale for all": lambda h: h / h.abs().amax(),
    "batch statistics": lambda h: F.batch_norm(h.transpose(1, 2), None, None, training=True).transpose(1, 2),
    "softmax over examples": lambda h: h * h.softmax(0),
    "sorted": lambda h: h.sort(0).values,
    "rolled and mixed": lambda h: 0.9 * h + 0.1 * h.roll(1, 0),
    "mixed with the reverse": lambda h: 0.5 * (h + h.flip(0)),
    "shifted by one in flat order": lambda h: h + F.pad(h.flatten(0, 1), (0, 0, 1, -1)).view_as(h),
    "scanned": lambda h: h.cumsum(0),
    "scanned in flat order": lambda h: h.reshape(-1).cumsum(0).view_as(h),
    "best of all": lambda h: h + h.topk(1, 0).values,
    "a product": lambda h: torch.einsum("bt,ctd->btd", h.sum(2), h),
    "a Gram matrix": lambda h: (h.flatten(1) @ h.flatten(1).T @ h.flatten(1)).view_as(h),
    "another's choice": lambda h: h + h[h[:, 0, 0].argsort()],
    "a count of chosen numbers": lambda h: h * h[h > 0].numel(),
    "groups over examples": lambda h: F.group_norm(h.transpose(0, 2), 1).transpose(0, 2),
    "a median": lambda h: h - h.median(),
    "distances": lambda h: h + torch.cdist(h.flatten(1), h.flatten(1)).sum(1).view(-1, 1, 1),
    **{f.__name__: f for f in (capacity, read_back, longest, through_numpy, through_a_list, written_in_place, hooked)},
    **{f.__name__: f for f in (written_by_index, attention_over_examples, convolved, uninitialised, Crossing.apply)},
}


# Random architectures with random couplings at random places.


class Stack(nn.Module):
    """Layers one after another on [B, T, d], and one loss an example."""

    def __init__(self, layers: list[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for layer in self.layers:
            h = layer(h)
        return self.last(h).square().flatten(1).sum(1)


def random_layer(draw: Callable[[int], int]) -> Callable[[Tensor], Tensor]:
    """A permutation to one of its layouts, an operation over some of the dimensions, and back."""
    layout = [(0, 1, 2), (1, 0, 2), (2, 1, 0), (0, 2, 1), (1, 2, 0), (2, 0, 1)][draw(6) if draw(2) else draw(2) * 3]
    back = tuple(layout.index(d) for d in range(3))
    dim = draw(3) if draw(3) == 0 else 1 + draw(2)
    operations: list[Callable[[Tensor], Tensor]] = [
        lambda h: h - h.mean(dim, keepdim=True),
        lambda h: h + h.roll(1, dim),
        lambda h: h * h.softmax(dim),
        lambda h: h.cumsum(dim),
        lambda h: h.flip(dim) + h,
        lambda h: h / (1 + h.abs().amax(dim, keepdim=True)),
        lambda h: h.sort(dim).values,
        lambda h: h + h.select(dim, 0).unsqueeze(dim),
        lambda h: (h.flatten(0, 1) * 1.5).view_as(h).tanh(),
        lambda h: h @ (h.mT @ h) * 0.1,
        lambda h: h.reshape(-1, h.shape[-1]).softmax(-1).view_as(h) + h,
        lambda h: F.layer_norm(h, h.shape[-1:]),
        lambda h: torch.relu(h) + h.clamp(-1, 1),
        lambda h: torch.cat([h.narrow(dim, 1, h.shape[dim] - 1), h.narrow(dim, 0, 1)], dim) + h,
    ]
    operation = operations[draw(len(operations))]
    return lambda h: operation(h.permute(layout)).permute(back)
