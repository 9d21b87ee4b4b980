"""The functions at work -> one of the user's that would catch an error of an operation.

Whether an operation fails may depend on the values of any example: a matrix that is not positive definite, an index out
of range. Where such an error is caught, the pass goes on in another way for all examples, and no operation shows it.
"""

import dis
import sys
import types
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

from hf_dp.per_example.reads import TRUSTED

SWALLOWS = "suppress"  # the name of a context manager that catches errors


def catching(until: str) -> str:
    """The innermost function of a user that catches errors of what it calls now, or "".

    Args:
        until: the file of the frame above which nobody's code belongs to the pass.
    """
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != until:
        guarded = () if _is_trusted(frame.f_globals.get("__name__", "")) else _guarded(frame.f_code)
        if any(start <= frame.f_lasti < end for start, end in guarded):
            return frame.f_code.co_name
        frame = frame.f_back
    return ""


@cache
def _is_trusted(module: str) -> bool:
    top = module.partition(".")[0]
    return top in TRUSTED or (top in sys.stdlib_module_names and top != "__main__")


@cache
def _guarded(code: types.CodeType) -> tuple[tuple[int, int], ...]:
    """Where in its code a function catches errors, or ends in `finally`."""
    return tuple(_ranges(code))


def _ranges(code: types.CodeType) -> Iterator[tuple[int, int]]:
    instructions = list(dis.get_instructions(code))
    if sys.version_info < (3, 11):
        if any(i.opname == "SETUP_FINALLY" for i in instructions) or SWALLOWS in code.co_names:
            yield 0, len(code.co_code)
        return
    following = {i.offset: (i, after) for i, after in pairwise(instructions)}
    for entry in dis._parse_exception_table(code):  # type: ignore[attr-defined]
        first, second = following.get(entry.target, (None, None))
        if first is None or second is None or first.opname != "PUSH_EXC_INFO":
            continue  # what tidies up after a handler
        if second.opname != "WITH_EXCEPT_START" or SWALLOWS in code.co_names:
            yield entry.start, entry.end
