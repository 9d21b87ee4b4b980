"""Layers that PyTorch computes in one operation -> the same out of operations with rules: attention, and recurrent
layers.

Both may come with the positions first, [T, B, d]: examples lead inside, and the result goes back to the caller's
layout.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_dp.per_example.operations import linear
from hf_dp.per_example.proxy import ParameterProxy, proxies_in


def _project(x: Tensor, weight: Any, bias: Any = None) -> Tensor:
    """y = x W^T + b, through a tap where a trainable parameter is in it."""
    result = linear(x, weight, bias) if proxies_in((weight, bias)) else F.linear(x, weight, bias)
    assert result is not None
    return result


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None] | None:
    """torch.nn.MultiheadAttention, queries [T, B, d], keys and values [S, B, d]; without extra keys of its own."""
    data = (query, key, value)
    extra = any(v is not None for v in (bias_k, bias_v, static_k, static_v))
    if extra or add_zero_attn or (is_causal and attn_mask is None) or proxies_in(data) or query.dim() != 3:
        return None
    size, batch = embed_dim_to_check, query.shape[1]
    weights = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else (in_proj_weight,) * 3
    biases: tuple[Any, ...] = (in_proj_bias,) * 3
    known: dict[int, Tensor] = {}
    projected = []
    for i, (x, weight) in enumerate(zip(data, weights, strict=True)):
        if use_separate_proj_weight:
            y = _project(x.transpose(0, 1), weight)
            y = y if biases[i] is None else y + biases[i][i * size : (i + 1) * size]
        else:  # the packed weight as a whole, once for each distinct input: its rows for q, k and v are cut from the output
            if id(x) not in known:
                known[id(x)] = _project(x.transpose(0, 1), weight, biases[i])
            y = known[id(x)][..., i * size : (i + 1) * size]
        projected.append(y.unflatten(2, (num_heads, -1)).transpose(1, 2))
    q, k, v = projected
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if attn_mask is not None:
        scores = _masked(scores, attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, num_heads)))
    if key_padding_mask is not None:
        scores = _masked(scores, key_padding_mask[:, None, None])
    attention = F.dropout(scores.softmax(-1), dropout_p, training)
    out = _project((attention @ v).transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias).transpose(0, 1)
    shown = attention.mean(1) if average_attn_weights else attention
    return out, shown if need_weights else None


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask


State = tuple[Tensor, ...]


def _lstm_cell(ours: Tensor, before: Tensor, state: State) -> State:
    enter, keep, new, show = (ours + before).chunk(4, -1)
    cell = keep.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
    return show.sigmoid() * cell.tanh(), cell


def _gru_cell(ours: Tensor, before: Tensor, state: State) -> State:
    (reset, update, new), (reset_h, update_h, new_h) = ours.chunk(3, -1), before.chunk(3, -1)
    stay = (update + update_h).sigmoid()
    return ((1 - stay) * (new + (reset + reset_h).sigmoid() * new_h).tanh() + stay * state[0],)


def _tanh_cell(ours: Tensor, before: Tensor, state: State) -> State:
    return ((ours + before).tanh(),)


def _relu_cell(ours: Tensor, before: Tensor, state: State) -> State:
    return ((ours + before).relu(),)


CELLS: dict[str, Callable[[Tensor, Tensor, State], State]] = {
    "lstm": _lstm_cell,
    "gru": _gru_cell,
    "rnn_tanh": _tanh_cell,
    "rnn_relu": _relu_cell,
}


def recurrent(
    kind: str,
    input: Tensor,
    hx: Any,
    params: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...] | None:
    """torch.nn.LSTM, GRU and RNN, one position at a time. Packed sequences have no rule."""
    initial: Sequence[Tensor] = hx if isinstance(hx, (tuple, list)) else (hx,)
    packed = not isinstance(has_biases, bool)  # PyTorch's other signature: data, sizes, states, weights, ...
    if packed or isinstance(input, ParameterProxy) or proxies_in(list(initial)):
        return None
    directions = 2 if bidirectional else 1
    each = len(params) // (num_layers * directions)  # w_ih, w_hh, [b_ih, b_hh], [w_hr: an LSTM's projection]
    x = input if batch_first else input.transpose(0, 1)
    final: list[State] = []
    for layer in range(num_layers):
        if layer:
            x = F.dropout(x, dropout, training)
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            w_ih, w_hh, *rest = params[number * each : (number + 1) * each]
            b_ih, b_hh = rest[:2] if has_biases else (None, None)
            w_hr = rest[-1] if each % 2 else None
            state: State = tuple(s[number] for s in initial)
            ours, seen = _project(x, w_ih, b_ih), []
            times = range(x.shape[1])
            for t in reversed(times) if direction else times:
                state = CELLS[kind](ours[:, t], _project(state[0], w_hh, b_hh), state)
                if w_hr is not None:
                    state = (_project(state[0], w_hr), *state[1:])
                seen.append(state[0])
            outputs.append(torch.stack(seen[::-1] if direction else seen, 1))
            final.append(state)
        x = torch.cat(outputs, -1)
    last = (torch.stack(states) for states in zip(*final, strict=True))
    return (x if batch_first else x.transpose(0, 1), *last)
