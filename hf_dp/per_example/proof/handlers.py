"""The functions at work -> one of the user's that would catch an error of an operation.

Whether an operation fails may depend on the values of any example: a matrix that is not positive definite, an index out
of range. Where such an error is caught, the pass goes on in another way for all examples, and no operation shows it.
What catches is a `try`, a `with` of anything but PyTorch's or peft's own and `nullcontext`, asyncio, which keeps a
task's error as its result, and Python itself where it goes through an object by its `__getitem__`.
"""

import dis
import inspect
import sys
import types
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from hf_dp.per_example.reads import TRUSTED

KEEPING = ("asyncio", "concurrent")  # of the standard library: what they call may fail without anybody noticing
NO_MANAGERS = "nullcontext no_grad enable_grad set_grad_enabled inference_mode autocast record_function".split()


class Guarded(NamedTuple):
    """Where in a function's code errors are caught, and the names that lead to a `with`'s manager; () of a `try`."""

    start: int
    end: int
    manager: tuple[str, ...]


def catching(until: str) -> str:
    """The innermost function of a user that catches errors of what it calls now, or "".

    Args:
        until: the file of the frame above which nobody's code belongs to the pass.
    """
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != until:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] in KEEPING:
            return f"{module}.{frame.f_code.co_name}"
        if not _is_trusted(module):
            at = [g for g in _guarded(frame.f_code) if g.start <= frame.f_lasti < g.end]
            if frame.f_code.co_name == "__getitem__" or any(not _lets_through(frame, g.manager) for g in at):
                return frame.f_code.co_name
        frame = frame.f_back
    return ""


@cache
def _is_trusted(module: str) -> bool:
    top = module.partition(".")[0]
    return top in TRUSTED or (top in sys.stdlib_module_names and top != "__main__")


@cache
def _guarded(code: types.CodeType) -> tuple[Guarded, ...]:
    """Where in its code a function catches errors, or ends in `finally`."""
    return tuple(_ranges(code))


def _ranges(code: types.CodeType) -> Iterator[Guarded]:
    instructions = list(dis.get_instructions(code))
    if sys.version_info < (3, 11):
        managers = sum(i.opname == "SETUP_WITH" for i in instructions)
        known = sum(i.opname.startswith("LOAD") and i.argval in NO_MANAGERS for i in instructions)
        if any(i.opname == "SETUP_FINALLY" for i in instructions) or managers > known:
            yield Guarded(0, len(code.co_code), ())
        return
    at = {i.offset: number for number, i in enumerate(instructions)}
    following = {i.offset: (i, after) for i, after in pairwise(instructions)}
    entries = dis._parse_exception_table(code)  # type: ignore[attr-defined]
    for entry in entries:
        first, second = following.get(entry.target, (None, None))
        if first is None or second is None or first.opname != "PUSH_EXC_INFO":
            continue  # what tidies up after a handler
        begin = min(other.start for other in entries if other.target == entry.target)
        is_with = second.opname == "WITH_EXCEPT_START"
        yield Guarded(entry.start, entry.end, _manager(instructions, at.get(begin, 0)) if is_with else ())


def _manager(instructions: list[dis.Instruction], number: int) -> tuple[str, ...]:
    """The names by which the manager of the `with` whose body begins there is found, or called; () if unknown."""
    if number < 2 or instructions[number - 1].opname != "BEFORE_WITH":
        return ()
    begins = _begins(instructions[number - 2])  # as the whole expression does
    names: list[str] = []
    for i in instructions[:number]:
        if _begins(i) == begins and isinstance(i.argval, str):
            names = names if names and i.opname in ("LOAD_ATTR", "LOAD_METHOD") else []
            names.append(i.argval)
    return tuple(names)


def _begins(instruction: dis.Instruction) -> tuple[int | None, ...]:
    """Line and column of what was written."""
    at = instruction.positions
    return () if at is None else (at.lineno, at.col_offset)


def _lets_through(frame: types.FrameType, manager: tuple[str, ...]) -> bool:
    """Whether a manager is PyTorch's or peft's own, or `nullcontext`: none keeps an error from whoever comes next."""
    if not manager:
        return False
    value = {**frame.f_builtins, **frame.f_globals, **frame.f_locals}.get(manager[0])
    for name in manager[1:]:
        value = (
            inspect.getattr_static(value, name, None)
            if not isinstance(value, types.ModuleType)
            else vars(value).get(name)
        )
    module = getattr(value if isinstance(value, (type, types.FunctionType)) else type(value), "__module__", "") or ""
    return value is nullcontext or type(value) is nullcontext or module.partition(".")[0] in ("torch", "peft")
