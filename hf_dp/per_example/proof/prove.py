"""A model, its losses and two public batches -> whether the examples of a pass are independent, or why that is not
shown.

What is shown. Every number of a pass carries the set of examples that it may depend on (`labels`), through a rule an
operation (`rules`); the result of one without a rule depends on everything. Where then

    the loss of example b depends on example b alone,
    nothing that depends on examples, or on the padded length, is read into Python, and no size is made of such values,
    wherever trained values meet the examples, row b is example b's (what the per-example rules take for granted), and
    a second pass, with other bits, depends on nothing of the first, nor does either write to anything that outlives it,

the loss of b is a function of the parameters and example b alone, whatever values the examples have, since no rule
looks at values. Then its gradient is as well: an operation of PyTorch's own returns in backward the derivative of what
it computed, and a derivative depends on nothing else. Autograd functions written in Python, and hooks on gradients, may
return anything: where a pass has such, its backward is followed too.

The library's own fast losses over tokens pick the rows that have targets, which no rule can tell from a coupling: in
their place stand the losses spelt out (`losses.spelt_out`), the same numbers by PyTorch's own operations, which tests
hold them to. So it is with Transformers' experts, which sort a batch's tokens (`experts.spelt_out`).

What is not shown, and stays with the numeric check (`self_check`) and with traces (`lengths`): the influence of sizes
themselves, of the number of examples in a pass and of the padded length, where Python takes them from `shape`; padding
that is not masked; the gradient rules' exactness.
"""

import gc
import os
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from cProfile import Profile
from functools import partial, wraps
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_dp.per_example.batches import Batch, leaves
from hf_dp.per_example.losses import spelt_out
from hf_dp.per_example.proof import experts
from hf_dp.per_example.proof.calls import Value, tensors_in
from hf_dp.per_example.proof.labels import PASSES, SIZE
from hf_dp.per_example.proof.put_back import is_sharded, untouched
from hf_dp.per_example.proof.state import State
from hf_dp.per_example.proof.tracker import Tracker

_PACKAGES = Path(torch.__file__).parents[1]
_TRUSTED = (
    *(_PACKAGES / name for name in ("torch", "transformers", "accelerate", "peft", "trl")),
    Path(__file__).parents[2],
)
TRUSTED = tuple(f"{path}{os.sep}" for path in _TRUSTED)  # not to change gradients
STANDARD_LIBRARY = sysconfig.get_path("stdlib") + os.sep
RECOMPUTING = os.path.join("torch", "utils", "checkpoint.py")


class Proof(NamedTuple):
    """Whether the examples of a pass are independent, and what stands against it.

    Attributes:
        independent: shown to be.
        reasons: what was found, each with module and function; of no private content.
        written: what a pass writes to: parameters, buffers, attributes, by name.
    """

    independent: bool
    reasons: tuple[str, ...]
    written: tuple[str, ...] = ()


def prove(model: nn.Module, example_losses: Callable[[nn.Module, Batch], Tensor], batches: Sequence[Batch]) -> Proof:
    """Follows one pass over each of two batches.

    Args:
        model: unwrapped; left as it was, in state, mode, gradients and random numbers.
        example_losses: (model, batch) -> one loss an example, [B].
        batches: two, of three public examples each. All their tensors lead with the examples.

    Raises:
        ValueError: another number of batches.
    """
    if len(batches) != PASSES:
        raise ValueError(f"expected {PASSES} batches, of {SIZE} examples each; got {len(batches)}")
    with _undisturbed(model) as state:
        tracker = Tracker(model)
        backward = False
        for number, batch in enumerate(batches):
            if not _marked(tracker, batch, number):
                break
            backward = _follow(tracker, model, partial(example_losses, model, batch), backward)
        written = tuple(dict.fromkeys([*tracker.written, *state.changes()]))
    reasons = [
        *(tracker.mixes if tracker.crossed else ()),
        *tracker.found,
        *(f"the pass changes what outlives it: {name}" for name in written),
    ]
    return Proof(not reasons, tuple(reasons), written)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[State]:
    was_training = model.training
    gradients = [(p, p.grad) for p in model.parameters()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    model.train()
    for p, _ in gradients:
        p.grad = None
    try:
        with (
            untouched(model) as state,
            torch.random.fork_rng(devices),
        ):
            yield state
    finally:
        model.train(was_training)
        for p, gradient in gradients:
            p.grad = gradient


def _marked(tracker: Tracker, batch: Batch, number: int) -> bool:
    if any(isinstance(leaf, (list, tuple)) and leaf for leaf in leaves(batch).values()):
        tracker.found["the batch has texts, or other lists of what is no tensor, which cannot be followed"] = None
        return False
    for tensor in tensors_in(batch):
        if tensor.dim() == 0 or len(tensor) != SIZE:
            tracker.found["a tensor of the batch does not lead with the examples"] = None
            return False
        tracker.mark(tensor, number)
    return True


def _follow(tracker: Tracker, model: nn.Module, losses_of: Callable[[], Tensor], backward: bool) -> bool:
    """One pass. Answers whether its backward has to be followed too."""
    try:
        with torch.enable_grad(), spelt_out(), experts.spelt_out(), _by_itself(tracker), tracker.watching(backward):
            losses = losses_of()
            if backward and losses.requires_grad:
                tracker.in_backward = True
                losses.backward(losses.detach() * 0 + 1, retain_graph=True)
    except Exception as error:  # whatever a model cannot do under watch: not shown, and the training itself will tell
        tracker.found[f"the pass could not be followed ({type(error).__name__})"] = None
        return backward
    if not tracker.own(tracker.book.read(losses), leading=False):
        tracker.found["a loss depends on more than its own example"] = None
        tracker.crossed = True
    known = tracker.gradients_mended or has_backward_in_python(losses)
    if not known and not is_sharded(model) and (place := _python_called_by(losses)):
        tracker.found[f"Python has a say in backward, by a hook on a node or on saved tensors, in {place}"] = None
    return known


def _is_trusted(file: str) -> bool:
    of_python = file.startswith((STANDARD_LIBRARY, "<frozen ")) and "-packages" not in file
    return of_python or file.startswith(TRUSTED)


def _python_called_by(losses: Tensor) -> str:
    """The first Python function that backward calls, as file:function; not one of `TRUSTED` libraries, nor what
    checkpointing computes again. "" if none.
    """
    called: list[str] = []

    def look(frame: FrameType, event: str, _: Value) -> None:
        if event == "call" and not called and not _is_trusted(frame.f_code.co_filename):
            outer: FrameType | None = frame
            while outer is not None and not outer.f_code.co_filename.endswith(RECOMPUTING):
                outer = outer.f_back
            if outer is None:
                called.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")

    if not losses.requires_grad:
        return ""
    before = sys.getprofile()
    with torch.autograd.set_multithreading_enabled(False), _without_collecting_garbage():
        sys.setprofile(look)
        try:
            losses.backward(losses.detach() * 0 + 1, retain_graph=True)
        except Exception as error:
            called.append(f"a backward pass that fails ({type(error).__name__})")
        finally:
            if isinstance(before, Profile):  # it watches from within the interpreter
                sys.setprofile(None)
                before.enable()
            else:
                sys.setprofile(before)
    return called[0] if called else ""


@contextmanager
def _without_collecting_garbage() -> Iterator[None]:
    """Whoever wants to know when garbage is collected is called then, wherever the program stands."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def _by_itself(tracker: Tracker) -> Iterator[None]:
    """Notes work that is handed to other threads or processes, where no operation is seen."""
    here = threading.get_ident()
    originals = Thread.start, ThreadPoolExecutor.submit, ProcessPoolExecutor.submit

    def noting(original: Value) -> Value:
        @wraps(original)
        def hand_over(*args: Value, **kwargs: Value) -> Value:
            if threading.get_ident() == here:
                tracker.note(tracker.found, "work is handed to another thread or process")
            return original(*args, **kwargs)

        return hand_over

    noted = map(noting, originals)
    try:
        Thread.start, ThreadPoolExecutor.submit, ProcessPoolExecutor.submit = noted  # type: ignore[method-assign]
        yield
    finally:
        Thread.start, ThreadPoolExecutor.submit, ProcessPoolExecutor.submit = originals  # type: ignore[method-assign]


def has_backward_in_python(losses: Tensor) -> bool:
    """Whether an autograd function written in Python is behind the losses."""
    written_in_python = torch.autograd.function.BackwardCFunction
    return any(isinstance(node, written_in_python) and not _only_saves(node) for node in _graph(losses))


def _graph(losses: Tensor) -> Iterator[Value]:
    """All nodes of the graph behind the losses."""
    seen: set[Value] = set()
    waiting = [losses.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting.extend(following for following, _ in node.next_functions)


def _only_saves(node: Value) -> bool:
    """Whether a node is checkpointing's own, which computes nothing."""
    return type(node).__name__ == "_NoopSaveInputsBackward"
