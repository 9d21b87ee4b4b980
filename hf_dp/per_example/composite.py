"""Layers that PyTorch computes in one operation -> the same, composed of operations that have rules: attention, LSTM,
...

Both kinds may be called with the positions in front, [T, B, d]. Inside, the examples are in front; the result is
brought back to the caller's layout.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_dp.per_example.operations import project
from hf_dp.per_example.proxy import ParameterProxy, proxies_in


def _project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b, through a tap if weight or bias is trained."""
    return project(x, weight, bias) if proxies_in((weight, bias)) else F.linear(x, weight, bias)


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
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
    separate = (q_proj_weight, k_proj_weight, v_proj_weight)
    weights = cast(tuple[Tensor, ...], separate if use_separate_proj_weight else (in_proj_weight,) * 3)
    known: dict[int, Tensor] = {}
    projected = []
    for i, (x, weight) in enumerate(zip(data, weights, strict=True)):
        if use_separate_proj_weight:
            y = _project(x.transpose(0, 1), weight)
            y = y if in_proj_bias is None else y + in_proj_bias[i * size : (i + 1) * size]
        else:  # one product with the whole packed weight for each distinct input; q, k and v are cut from the output
            if id(x) not in known:
                known[id(x)] = _project(x.transpose(0, 1), weight, in_proj_bias)
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


State: TypeAlias = tuple[Tensor, ...]  # of a recurrent layer: h, and for an LSTM c


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
    hx: Tensor | State,
    params: Sequence[Tensor],
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
