"""Transformers' experts, which sort the tokens of a batch by expert -> the same numbers token by token, which a proof
can follow.

`grouped_mm_experts_forward` sorts all tokens, multiplies group by group and puts them back into their order. That no
token's result depends on another follows from the two permutations undoing each other, which no rule of an operation
can tell. Within `spelt_out` each token goes through every expert and counts with its router's weight, 0 for experts
that were not chosen. A test holds the two to each other.

Legend: N tokens of all examples, E experts, K experts chosen for a token, H hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.integrations import moe

SORTING = "grouped_mm"


@contextmanager
def spelt_out() -> Iterator[None]:
    """Within, Transformers' own grouped experts are `every_expert`; a form that somebody else registered stays."""
    functions = moe.ALL_EXPERTS_FUNCTIONS
    if functions.get(SORTING) is not moe.grouped_mm_experts_forward:
        yield
        return
    functions[SORTING] = every_expert
    try:
        yield
    finally:
        del functions[SORTING]


def every_expert(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the experts make of [N, H], given the router's choice [N, K] and its weights [N, K]: [N, H]."""
    if self._is_expert_parallel:
        return moe.grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    experts = torch.arange(self.num_experts, device=top_k_index.device)[:, None, None]
    shares = (top_k_weights * (top_k_index == experts)).sum(-1, keepdim=True)  # [E, N, 1]
    everywhere = hidden_states.expand(self.num_experts, *hidden_states.shape)
    if self.has_gate:
        out = self._apply_gate(_linear(self, everywhere, "gate_up_proj"))
    else:
        out = self.act_fn(_linear(self, everywhere, "up_proj"))
    out = _linear(self, out, "down_proj")
    if self.has_post_expert_norm:
        out = self.post_expert_norm(out)
    return (out * shares).sum(0).to(hidden_states.dtype)


def _linear(experts: Any, x: Tensor, name: str) -> Tensor:
    """[E, N, inputs] -> [E, N, outputs], each expert with its own weight and shift."""
    weight = getattr(experts, name)
    out = torch.bmm(x, weight if experts.is_transposed else weight.transpose(1, 2))
    return out + getattr(experts, f"{name}_bias")[:, None] if experts.has_bias else out
