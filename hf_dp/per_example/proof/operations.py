"""Names of operations, by what a proof has to know of them."""

NO_VALUES = frozenset(  # operations whose answer is no tensor, and not made of a tensor's values
    "_fused_sdp_choice sym_size sym_numel sym_stride sym_storage_offset sym_is_contiguous size stride dim numel "
    "is_same_size "
    "is_pinned is_contiguous is_strides_like_format is_non_overlapping_and_dense _has_same_storage_numel "
    "result_type".split()
)
SIZED_BY_VALUES = frozenset(
    "nonzero masked_select _unique _unique2 unique_dim unique_consecutive unique_dim_consecutive "
    "repeat_interleave bincount _to_sparse _to_sparse_csr _to_sparse_csc _to_sparse_bsr _to_sparse_bsc "
    "_pack_padded_sequence _pad_packed_sequence _sparse_coo_tensor_with_dims_and_tensors".split()
)
LEAVES = frozenset(
    "tolist numpy __array__ data_ptr storage untyped_storage _typed_storage __dlpack__ __deepcopy__ "
    "__reduce_ex__ __repr__ to_sparse to_sparse_csr to_sparse_csc to_sparse_bsr to_sparse_bsc "
    "sparse_coo_tensor tensor_split".split()
)
FROM_PYTHON = frozenset("tensor as_tensor new_tensor asarray scalar_tensor".split())
INDEXING = frozenset("__getitem__ __setitem__".split())
HOOKS = ("register_hook", "register_post_accumulate_grad_hook")  # on the gradient of a tensor
CHANCE = frozenset(
    "native_dropout fused_dropout bernoulli uniform normal random exponential cauchy geometric log_normal rand "
    "randn randint randperm rand_like randn_like randint_like multinomial poisson rrelu_with_noise".split()
)
HIDDEN_WRITES = {  # arguments that are written to though the schema does not say so
    "native_batch_norm": ("running_mean", "running_var"),
    "cudnn_batch_norm": ("running_mean", "running_var"),
    "miopen_batch_norm": ("running_mean", "running_var"),
}
