"""An operation's name -> what each of its results depends on. What is in no table has no rule, and counts as a mixture
of everything.

Rules are of memory alone, so that views need none. An operation that PyTorch itself tags as pointwise needs none
either.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from hf_dp.per_example.proof import flow, moves
from hf_dp.per_example.proof.calls import Call
from hf_dp.per_example.proof.labels import EXAMPLES, SHAPED, UNWRITTEN, Labels

Rule = Callable[[Call], Labels | Sequence[Labels]]


def rule_of(call: Call) -> Rule | None:
    """The rule of an operation, or None."""
    if call.name in RULES:
        return RULES[call.name]
    if not call.inputs:
        return born
    if torch.Tag.pointwise in call.func.tags and call.func.namespace in ("aten", "prims"):  # others' tags may err
        return pointwise
    return attention if call.name.startswith("_scaled_dot_product") else None


def pointwise(call: Call) -> Sequence[Labels]:
    """Each number depends on those at its own place, broadcast."""
    labels = flow.union(call.read(t) for t in call.inputs)
    return [np.broadcast_to(labels, tuple(r.shape)) for r in call.results]


def born(call: Call) -> Sequence[Labels]:
    """arange, zeros, random numbers: values that depend on sizes and chance only."""
    return [np.full(tuple(r.shape), SHAPED, dtype=np.uint8) for r in call.results]


def unwritten(call: Call) -> Sequence[Labels]:
    """Memory whose content is still to be written."""
    return [np.full(tuple(r.shape), SHAPED | UNWRITTEN, dtype=np.uint8) for r in call.results]


def resized(call: Call) -> Labels:
    """Memory that may have grown by a part that nothing has written."""
    return np.full(tuple(call.results[0].shape), call.everything | UNWRITTEN, dtype=np.uint8)


def overwritten(call: Call) -> Labels:
    """copy, fill: what was there before does not matter any more."""
    source = call.arguments.get("src", call.arguments.get("value"))
    return np.broadcast_to(call.read(source) | SHAPED, tuple(call.results[0].shape))


def chance(call: Call) -> Labels | Sequence[Labels]:
    """Random numbers: in place, of their parameters alone; else of the tensors that hold the parameters, number by
    number.
    """
    if not call.written():
        return pointwise(call)
    return np.broadcast_to(call.read(call.arguments.get("p")) | SHAPED, tuple(call.results[0].shape))


def reduced(call: Call) -> Sequence[Labels]:
    """A reduction over `dim`, or over everything; max(x, y) is none."""
    if "other" in call.arguments:
        return pointwise(call)
    dims, keep = call.arguments.get("dim"), bool(call.arguments.get("keepdim", False))
    return [flow.over(call.labels("self"), dims, keep) for _ in call.results]


def scanned(call: Call) -> Sequence[Labels]:
    """Along `dim`, every number may depend on every other."""
    inputs = flow.union(call.read(t) for t in call.inputs)
    return [flow.along(inputs, call.arguments.get("dim", -1)) for _ in call.results]


def selected(call: Call) -> Sequence[Labels]:
    """topk, kthvalue: some of the numbers along `dim`."""
    labels, dim = call.labels("self"), call.arguments.get("dim", -1)
    keep = flow.over(labels, dim, True)
    return [
        np.broadcast_to(keep, tuple(r.shape)) if r.dim() == labels.ndim else flow.over(labels, dim)
        for r in call.results
    ]


def halved(call: Call) -> Labels:
    """glu: two halves of `dim`, number by number."""
    first, second = np.split(call.labels("self"), 2, axis=call.arguments["dim"])
    return np.asarray(first | second)


def matrix_product(a: str, b: str, *more: str) -> Rule:
    """A product of two arguments, with others added to it."""

    def rule(call: Call) -> Labels:
        added = flow.union(call.labels(name) for name in more)
        return np.asarray(flow.product(call.labels(a), call.labels(b)) | added)

    return rule


def vector_product(a: str, b: str, *more: str) -> Rule:
    """A matrix [n, k], or a vector [k], times a vector [k]."""

    def rule(call: Call) -> Labels:
        added = flow.union(call.labels(name) for name in more)
        return np.asarray(flow.over(call.labels(a), -1) | flow.over(call.labels(b), -1) | added)

    return rule


def matrix_wise(call: Call) -> Sequence[Labels]:
    """Solutions and inverses: everything within a matrix."""
    matrices = flow.union(flow.over(call.read(t), (-2, -1), True) for t in call.inputs)
    return [np.broadcast_to(matrices, tuple(r.shape)) for r in call.results[:1]]


def linear(call: Call) -> Labels:
    """x W^T + b, where it comes whole."""
    weight = call.labels("weight")
    rows = weight if weight.ndim < 2 else flow.over(weight, -1)
    return np.asarray(flow.over(call.labels("input"), -1, True) | rows | call.labels("bias"))


def quantised_linear(call: Call) -> Labels:
    """bitsandbytes' x W^T + b with W in 4 bits, for x of any shape [..., d]."""
    x, bias = (call.arguments.get(name) for name in ("A", "bias"))
    if any(bool(call.read(t).any()) for t in call.inputs if t is not x and t is not bias):
        raise NotImplementedError(call.name)
    return np.asarray(flow.over(call.read(x), -1, True) | call.read(bias))


def by_rows(call: Call) -> Sequence[Labels]:
    """Row by row of the leading dimension: convolutions, pooling, resizing, attention."""
    inputs = [call.read(t) for t in call.inputs]
    return [flow.leading(inputs, tuple(r.shape)) for r in call.results]


def convolution(call: Call) -> Labels:
    """[N, C, ...]; a kernel that depends on examples reaches everything."""
    shape = tuple(call.results[0].shape)
    kernel = flow.over(call.labels("weight"), None) | flow.over(call.labels("bias"), None)
    return np.asarray(flow.leading([call.labels("input")], shape) | kernel)


def attention(call: Call) -> Sequence[Labels]:
    """[B, H, T, d]: everything within a row of B."""
    masks = [call.labels(name) for name in ("attn_mask", "attn_bias", "bias")]
    inputs = [call.read(call.arguments[n]) for n in call.arguments if n not in ("attn_mask", "attn_bias", "bias")]
    inputs += [m.reshape((1,) * (4 - m.ndim) + m.shape) for m in masks]  # a mask [T, T] leads with no examples
    size = call.arguments["query"].shape[0]  # in backward, of its gradients too
    return [
        flow.leading(inputs, tuple(r.shape))
        if r.dim() > 1 and r.shape[0] == size
        else np.full(tuple(r.shape), call.everything)
        for r in call.results
    ]


def layer_norm(call: Call) -> Sequence[Labels]:
    """Over the last dimensions; mean and scale keep them with size 1."""
    dims = range(-len(call.arguments["normalized_shape"]), 0)
    labels = flow.over(call.labels("input"), tuple(dims), True)
    outer = flow.union([call.labels("weight"), call.labels("bias")])
    full = np.broadcast_to(labels | outer, tuple(call.results[0].shape))
    return [full, *(np.broadcast_to(labels, tuple(r.shape)) for r in call.results[1:])]


def group_norm(call: Call) -> Sequence[Labels]:
    """Within an example's channels and places."""
    inputs = [call.labels("input")]
    outer = flow.over(call.labels("weight"), None) | flow.over(call.labels("bias"), None)
    return [np.asarray(flow.leading(inputs, tuple(r.shape)) | outer) for r in call.results]


def batch_norm(call: Call) -> Sequence[Labels]:
    """In training over all but the channels; with kept statistics number by number. Statistics and weights of a channel
    count wherever they may be used.
    """
    labels = call.labels("input")
    train = call.arguments.get("training", call.arguments.get("train", not call.name.endswith("no_training")))
    together = flow.along(labels, [d for d in range(labels.ndim) if d != 1]) if train else labels
    together = np.asarray(together | flow.union(flow.over(call.read(t), None) for t in call.inputs[1:]))
    everything = call.everything if train else np.uint8(0)
    return [together, *(np.full(tuple(r.shape), everything) for r in call.results[1:])]


def negative_log_likelihood(call: Call) -> Sequence[Labels]:
    """[N, C, ...] and [N, ...] -> [N, ...], or their mean or sum; the total weight beside it."""
    scores, target = call.labels("self"), call.labels("target")
    each = flow.over(scores, 1 if scores.ndim > 1 else 0) | target | flow.over(call.labels("weight"), None)
    if call.arguments["reduction"] == 0:
        return [each, np.zeros((), dtype=np.uint8)]
    return [flow.over(each, None), flow.over(target, None)]


def likelihood_backward(call: Call) -> Labels:
    """The scores' gradient: of the target and what flows back to its row."""
    flowing = flow.over(call.labels("weight"), None) | flow.over(call.labels("total_weight"), None)
    each = np.asarray(call.labels("grad_output") | call.labels("target") | flowing)
    return np.expand_dims(each, 1) if call.labels("self").ndim > 1 and each.ndim else each


def norm_backward(call: Call) -> Sequence[Labels]:
    """The input's gradient stays in its normalised part; those of scale and shift add up everything."""
    names = ("grad_out", "grad_output", "input", "mean", "rstd", "save_mean", "save_rstd")
    shape = call.arguments.get("normalized_shape")
    if shape is None:
        inner = flow.leading([call.labels(n) for n in names], tuple(call.arguments["input"].shape))
    else:
        inner = flow.along(flow.union(call.labels(n) for n in names), tuple(range(-len(shape), 0)))
    outer = flow.over(call.labels("weight"), None)
    return [np.asarray(inner | outer), *_everything(call, 1)]


def convolution_backward(call: Call) -> Sequence[Labels]:
    """The input's gradient row by row; those of kernel and shift add up everything."""
    rows = flow.leading([call.labels("grad_output")], tuple(call.arguments["input"].shape))
    return [np.asarray(rows | flow.over(call.labels("weight"), None)), *_everything(call, 1)]


def _everything(call: Call, start: int) -> list[Labels]:
    return [np.full(tuple(r.shape), call.everything) for r in call.results[start:]]


def reduced_as_told(call: Call) -> Labels:
    """mse_loss and others that reduce where they are told to."""
    each = flow.union(call.read(t) for t in call.inputs)
    return each if call.arguments["reduction"] == 0 else flow.over(each, None)


def temporal_classification(call: Call) -> Sequence[Labels]:
    """CTC: [T, N, C] -> [N] and [N, T, 2 S + 1]."""
    scores = (
        np.moveaxis(call.labels("log_probs"), 1, 0) if call.labels("log_probs").ndim == 3 else call.labels("log_probs")
    )
    others = [call.labels(name) for name in ("targets", "input_lengths", "target_lengths")]
    others[0] = others[0] if others[0].ndim == 2 else flow.over(others[0], None)
    return [flow.leading([scores, *others], tuple(r.shape)) for r in call.results]


def among(call: Call) -> Labels:
    """isin: each element against all test elements."""
    elements, tests = call.labels("elements"), call.labels("test_elements")
    return np.asarray((elements | call.labels("element")) | flow.over(tests | call.labels("test_element"), None))


def each_against(name: str) -> Rule:
    """bucketize, prelu: each number, and all of an argument that has a dimension of its own."""

    def rule(call: Call) -> Labels:
        return np.asarray(call.labels("self") | flow.over(call.labels(name), None))

    return rule


def mixed(call: Call) -> Sequence[Labels]:
    """Every result depends on every input."""
    return [np.full(tuple(r.shape), call.everything, dtype=np.uint8) for r in call.results]


def _named(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_named(
        pointwise,
        "native_dropout _to_copy nan_to_num masked_fill tril triu clone contiguous lift_fresh_copy _conj_physical "
        "fused_dropout threshold_backward gelu_backward silu_backward tanh_backward sigmoid_backward "
        "native_dropout_backward hardtanh_backward leaky_relu_backward elu_backward softplus_backward "
        "hardswish_backward hardsigmoid_backward floor_divide log_sigmoid_forward log_sigmoid_backward polar complex "
        "rrelu_with_noise _prelu_kernel poisson",
    ),
    **_named(
        born, "zeros_like ones_like full_like rand_like randn_like randint_like new_zeros new_ones new_full lift_fresh"
    ),
    **_named(chance, "uniform normal random exponential cauchy geometric log_normal bernoulli"),
    "zero": born,
    **_named(unwritten, "empty empty_like new_empty empty_strided new_empty_strided empty_permuted"),
    "resize": resized,
    **_named(overwritten, "copy fill"),
    **_named(
        reduced,
        "sum nansum mean nanmean amax amin max min prod any all var std var_mean std_mean norm linalg_vector_norm "
        "logsumexp argmax argmin median nanmedian mode aminmax count_nonzero",
    ),
    **_named(
        scanned,
        "_softmax _log_softmax _safe_softmax softmax log_softmax cumsum cumprod cummax cummin logcumsumexp sort "
        "argsort _softmax_backward_data _log_softmax_backward_data _fft_c2c",
    ),
    **_named(selected, "topk kthvalue"),
    "glu": halved,
    **_named(
        moves.moved,
        "flip roll repeat cat stack constant_pad_nd expand_copy view_copy _unsafe_view _reshape_copy slice_scatter "
        "select_scatter diagonal_scatter diag_embed select_backward slice_backward unfold_backward permute_copy "
        "squeeze_copy unsqueeze_copy diagonal_backward rot90",
    ),
    **_named(moves.scatter, "scatter scatter_add scatter_reduce"),
    **_named(moves.index_add, "index_add index_copy index_reduce"),
    **_named(moves.index_put, "index_put _index_put_impl _unsafe_index_put"),
    **_named(moves.index, "index _unsafe_index"),
    **_named(
        mixed, "masked_scatter histc bincount repeat_interleave nonzero masked_select unique_consecutive _unique2"
    ),
    "isin": among,
    "bucketize": each_against("boundaries"),
    "prelu": each_against("weight"),
    "gather": moves.gather,
    "index_select": moves.index_select,
    "embedding": moves.embedding,
    "mm": matrix_product("self", "mat2"),
    "_int_mm": matrix_product("self", "mat2"),
    "bmm": matrix_product("self", "mat2"),
    "addmm": matrix_product("mat1", "mat2", "self"),
    "baddbmm": matrix_product("batch1", "batch2", "self"),
    "mv": vector_product("self", "vec"),
    "addmv": vector_product("mat", "vec", "self"),
    "dot": vector_product("self", "tensor"),
    "linear": linear,
    "bitsandbytes::gemm_4bit": quantised_linear,
    **_named(matrix_wise, "linalg_solve_triangular linalg_inv_ex"),
    **_named(
        by_rows,
        "avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d "
        "max_pool2d_with_indices max_pool3d_with_indices max_pool1d upsample_nearest1d upsample_nearest2d "
        "upsample_nearest3d upsample_bilinear2d upsample_linear1d upsample_bicubic2d upsample_trilinear3d "
        "_upsample_bicubic2d_aa _upsample_bilinear2d_aa reflection_pad1d reflection_pad2d replication_pad1d "
        "replication_pad2d pixel_shuffle pixel_unshuffle grid_sampler_2d grid_sampler_3d channel_shuffle",
    ),
    **_named(convolution, "convolution _convolution cudnn_convolution mkldnn_convolution"),
    **_named(layer_norm, "native_layer_norm _fused_rms_norm"),
    "native_group_norm": group_norm,
    **_named(batch_norm, "native_batch_norm _native_batch_norm_legit cudnn_batch_norm _batch_norm_with_update"),
    **_named(batch_norm, "_native_batch_norm_legit_no_training"),
    **_named(negative_log_likelihood, "nll_loss_forward nll_loss2d_forward"),
    **_named(
        reduced_as_told,
        "mse_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits soft_margin_loss",
    ),
    **_named(likelihood_backward, "nll_loss_backward nll_loss2d_backward"),
    **_named(norm_backward, "native_layer_norm_backward _fused_rms_norm_backward native_group_norm_backward"),
    "convolution_backward": convolution_backward,
    **_named(mixed, "embedding_dense_backward native_batch_norm_backward"),
    **_named(
        by_rows,
        "avg_pool2d_backward _adaptive_avg_pool2d_backward max_pool2d_with_indices_backward "
        "upsample_nearest2d_backward upsample_bilinear2d_backward upsample_bicubic2d_backward",
    ),
    **_named(pointwise, "mse_loss_backward smooth_l1_loss_backward huber_loss_backward binary_cross_entropy_backward"),
    "_ctc_loss": temporal_classification,
}
assert EXAMPLES & (SHAPED | UNWRITTEN) == 0
