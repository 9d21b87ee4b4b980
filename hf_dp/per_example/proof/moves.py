"""Rules of operations that move numbers about or add them up at given places: indexing, gathering, scattering, joining.

Where the places are the same for all examples, the very operation is done on the bytes. Where an example's own numbers
say the place, or trained weights, which may say another after a step, whatever might have been taken from, or put to,
counts.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hf_dp.per_example.proof import flow
from hf_dp.per_example.proof.calls import Call, Value, as_tensor, tensors_in
from hf_dp.per_example.proof.labels import UNWRITTEN, Labels

aten = torch.ops.aten


def moved(call: Call) -> Labels:
    """flip, roll, repeat, cat, pad and their like: the operation itself on the bytes."""
    changed: dict[str, Value] = {}
    for name, value in call.arguments.items():
        if isinstance(value, Tensor):
            changed[name] = as_tensor(call.read(value))
        elif isinstance(value, (list, tuple)) and any(True for _ in tensors_in(value)):
            changed[name] = [as_tensor(call.read(v)) for v in value]
        elif name in ("value", "dtype") and not isinstance(value, bool):
            changed[name] = 0 if name == "value" else None
    return _array(call.replay(changed))


def gather(call: Call) -> Labels:
    """out[i] = x[index[i]] along one dimension."""
    labels, index = call.labels("self"), call.labels("index")
    places: Tensor = call.arguments["index"]
    if _is_fixed(call, places) and labels.ndim:
        taken = torch.gather(as_tensor(labels), call.arguments["dim"], places.cpu())
        return np.asarray(_array(taken) | index)
    if not labels.ndim or not index.ndim:
        return np.broadcast_to(flow.over(labels, None) | flow.over(index, None), index.shape)
    dim = call.arguments["dim"] % labels.ndim
    reach = flow.over(flow.cropped(labels, index.shape, dim), dim, True)
    return np.asarray(np.broadcast_to(reach, index.shape) | index)


def index_select(call: Call) -> Labels:
    """Rows by their numbers."""
    labels, index = call.labels("self"), call.labels("index")
    if not labels.ndim:
        return np.asarray(labels | flow.over(index, None))
    dim = call.arguments["dim"] % labels.ndim
    shape = [1] * labels.ndim
    shape[dim] = -1
    if _is_fixed(call, call.arguments["index"]):
        return np.asarray(np.take(labels, call.arguments["index"].cpu().numpy(), axis=dim) | index.reshape(shape))
    return np.asarray(flow.over(labels, dim, True) | index.reshape(shape))


def embedding(call: Call) -> Labels:
    """Rows of a table."""
    return np.asarray(call.labels("indices")[..., None] | flow.over(call.labels("weight"), 0))


def index(call: Call) -> Labels:
    """x[i, :, j]: dimensions whose index is the same for all are indexed so; of the others, everything counts."""
    labels, where = call.labels("self"), call.arguments["indices"]
    if any(_is_mask(i) and not _is_fixed(call, i) for i in where):
        return np.full(call.results[0].shape, call.everything | UNWRITTEN, dtype=np.uint8)
    open_dims, fixed = _open(call, where)
    taken = _array(aten.index.Tensor(as_tensor(flow.along(labels, open_dims) if open_dims else labels), fixed))
    return np.asarray(taken | _index_labels(call, where, taken.ndim))


def index_put(call: Call) -> Labels:
    """x[i, :, j] = values, or += values."""
    labels, where = call.labels("self"), call.arguments["indices"]
    if any(_is_mask(i) and not _is_fixed(call, i) for i in where):
        return _masked_put(call, labels, where)
    open_dims, fixed = _open(call, where)
    ndim = _array(aten.index.Tensor(torch.zeros(labels.shape, dtype=torch.uint8), fixed)).ndim
    values = np.asarray(call.labels("values") | _index_labels(call, where, ndim))
    start = np.zeros_like(labels) if open_dims or call.arguments.get("accumulate") else labels
    put = _by_bit(lambda s, v: aten.index_put(s, fixed, v, True), np.zeros_like(labels), values)
    if open_dims:
        put = flow.along(put, open_dims)
    if not open_dims and not call.arguments.get("accumulate"):
        hit = aten.index_put(torch.zeros(labels.shape, dtype=torch.bool), fixed, torch.ones((), dtype=torch.bool))
        start = np.where(hit.numpy(), 0, labels).astype(np.uint8)
        return np.asarray(start | put)
    return np.asarray(labels | start | put)


def _masked_put(call: Call, labels: Labels, where: Value) -> Labels:
    """x[mask] = one number is a choice number by number; several values go to places that depend on all of the mask."""
    if len(where) == 1 and call.arguments["values"].numel() == 1 and not call.arguments.get("accumulate"):
        mask = call.read(where[0])
        mask = mask.reshape(mask.shape + (1,) * (labels.ndim - mask.ndim))
        return np.asarray(labels | mask | flow.over(call.labels("values"), None))
    return np.broadcast_to(call.everything, labels.shape)


def scatter(call: Call) -> Labels:
    """out[index[i]] = src[i], or combined with what was there."""
    labels, index = call.labels("self"), call.labels("index")
    source = call.labels("src") if "src" in call.arguments else call.labels("value")
    if not labels.ndim or not index.ndim:
        return np.broadcast_to(call.everything, labels.shape)
    dim = call.arguments["dim"] % labels.ndim
    given = source if source.ndim == 0 else source[tuple(slice(0, n) for n in index.shape)]
    given = np.asarray(np.broadcast_to(given, index.shape) | index)
    if _is_fixed(call, call.arguments["index"]):
        places = call.arguments["index"].cpu()
        put = _by_bit(lambda s, v: s.scatter_add(dim, places, v), np.zeros_like(labels), given)
        return np.asarray(labels | put)
    out = labels.copy()
    reach = tuple(slice(None) if d == dim else slice(0, n) for d, n in enumerate(index.shape))
    out[reach] |= flow.over(given, dim, True)
    return out


def index_add(call: Call) -> Labels:
    """Rows added to, or put in the place of, rows by their numbers."""
    labels, index = call.labels("self"), call.labels("index")
    source = call.labels("source") if "source" in call.arguments else call.labels("value")
    if not labels.ndim:
        return np.asarray(call.everything)
    dim = call.arguments["dim"] % labels.ndim
    shape = [1] * labels.ndim
    shape[dim] = -1
    if not _is_fixed(call, call.arguments["index"]):
        given = np.asarray(source | index.reshape(shape)) if source.ndim else source | flow.over(index, None)
        return np.asarray(labels | (flow.over(given, dim, True) if np.ndim(given) else given))
    places = call.arguments["index"].cpu()
    given = np.broadcast_to(source, tuple(len(places) if d == dim else n for d, n in enumerate(labels.shape)))
    put = _by_bit(lambda s, v: s.index_add(dim, places, v), np.zeros_like(labels), given)
    return np.asarray(labels | put | (index.any() and np.bitwise_or.reduce(index)))


def _by_bit(function: Callable[[Tensor, Tensor], Tensor], start: Labels, values: Labels) -> Labels:
    """An operation that adds values up at places, done for each bit alone: the union of what arrives."""
    total = np.zeros_like(start)
    present = int(np.bitwise_or.reduce(values, axis=None, initial=0))
    for bit in (1 << k for k in range(8)):
        if present & bit:
            counts = function(torch.zeros(start.shape), as_tensor(((values & bit) != 0).astype(np.uint8)).float())
            total |= np.where(counts.numpy() > 0, bit, 0).astype(np.uint8)
    return total


def _open(call: Call, where: Value) -> tuple[list[int], list[Tensor | None]]:
    """The dimensions whose index is not fixed, and the indices with zeros in the place of those."""
    open_dims: list[int] = []
    fixed: list[Tensor | None] = []
    dim = 0
    for i in where:
        if i is None:
            fixed.append(None)
        elif _is_fixed(call, i):
            fixed.append(i.cpu())
        else:
            open_dims.append(dim)
            fixed.append(torch.zeros(i.shape, dtype=torch.long))
        dim += i.dim() if _is_mask(i) else 1
    return open_dims, fixed


def _index_labels(call: Call, where: Value, ndim: int) -> Labels:
    """The bytes of the indices themselves, where their dimensions stand in the result."""
    given = [k for k, i in enumerate(where) if i is not None]
    if any(_is_mask(i) for i in where):
        return np.asarray(np.bitwise_or.reduce([flow.over(call.read(where[k]), None) for k in given]))
    labels = flow.union(call.read(where[k]) for k in given)
    together = given == list(range(given[0], given[0] + len(given)))
    behind = ndim - labels.ndim - (given[0] if together else 0)
    return labels.reshape(labels.shape + (1,) * behind)


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _is_fixed(call: Call, index: Tensor) -> bool:
    """Whether places are the same for all examples, and before and after a step."""
    return not call.book.of_examples(index) and not call.book.follows_weights([index])


def _array(tensor: Tensor) -> Labels:
    return np.asarray(tensor.numpy(), dtype=np.uint8)
