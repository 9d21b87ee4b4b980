"""The reads of example-dependent values into Python that change no result, each with its reason. A short list, and each
has a test.

A read is named by the end of the file's path, the function that reads, and what is read through. Anything else that a
pass reads from an example's values, or from values made of the padded length, can decide what is computed, and leaves
the pass unproved.
"""

from typing import Any, NamedTuple


class Read(NamedTuple):
    """Where a value is read, and why nothing depends on it."""

    file: str
    function: str
    reason: str


_NO_PADDING = "whether a mask has no padding: without, the kernel's own form is taken, which masks the same positions"
_PACKED = "whether positions that Python made count up by one: of arange they do at every length"
HARMLESS = (
    Read("transformers/masking_utils.py", "_ignore_causal_mask_sdpa", _NO_PADDING),
    Read("transformers/masking_utils.py", "_ignore_bidirectional_mask_sdpa", _NO_PADDING),
    Read("transformers/masking_utils.py", "flash_attention_mask", _NO_PADDING),
    Read("transformers/masking_utils.py", "create_recurrent_attention_mask", _NO_PADDING),
    Read("transformers/masking_utils.py", "find_packed_sequence_indices", _PACKED),
)


# What a first pass sets once, whatever its data: the name of an attribute, or of the module whose functions are
# installed.
SETTINGS = {
    "problem_type": (
        "a classifier's configuration notes whether labels are whole numbers, from their type and the number of classes"
    ),
    "_output_capturing_hooks_installed": (
        "Transformers notes that its hooks are installed, which give out layers' outputs when asked"
    ),
    "transformers.utils.output_capturing": "those hooks themselves",
}


def is_harmless_setting(key: Any, value: Any) -> bool:
    """Whether an attribute, or a hook, that a pass sets is one that any first pass would set in the same way."""
    return key in SETTINGS or getattr(value, "__module__", None) in SETTINGS


def is_harmless(file: str, function: str) -> bool:
    """Whether a read at this place changes no result."""
    path = file.replace("\\", "/")
    return any(path.endswith(read.file) and function == read.function for read in HARMLESS)


def is_harmless_file(file: str) -> bool:
    """Whether this file's reads are known to be harmless, so that mixtures made for them are not reported."""
    return any(file.replace("\\", "/").endswith(read.file) for read in HARMLESS)
