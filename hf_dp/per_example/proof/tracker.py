"""A pass, operation by operation -> what each result depends on, and everything by which one example could reach
another.

A `TorchDispatchMode` sees each operation below autograd, those within autograd functions, checkpointed blocks and
backward too; a `TorchFunctionMode` above it sees what leaves PyTorch (`tolist`, `numpy`, an address for a foreign
kernel).
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dp.per_example.proof import gathered
from hf_dp.per_example.proof.calls import Call, Value, plain_name, tensors_in
from hf_dp.per_example.proof.handlers import catching
from hf_dp.per_example.proof.harmless import is_harmless, is_harmless_file
from hf_dp.per_example.proof.labels import (
    EXAMPLES,
    NOTHING,
    SHAPED,
    SIZE,
    UNWRITTEN,
    Book,
    Labels,
    Memories,
    address,
    bits_of,
    distinct,
    key,
)
from hf_dp.per_example.proof.operations import (
    CHANCE,
    FROM_PYTHON,
    HIDDEN_WRITES,
    HOOKS,
    INDEXING,
    LEAVES,
    NO_VALUES,
    SIZED_BY_VALUES,
)
from hf_dp.per_example.proof.put_back import is_sharded
from hf_dp.per_example.proof.rules import RULES, rule_of

_OWN = str(Path(__file__).parent)
_PROVE = str(Path(__file__).parent / "prove.py")
_TORCH = str(Path(torch.__file__).parent)
LONGEST = 12  # how many reasons of a kind are kept


class Tracker:
    """What is known of all memory during the passes, and what was found.

    Attributes:
        book: what each tensor depends on.
        mixes: operations whose results depend on several examples, while none of their inputs did.
        found: what leaves a pass unproved wherever its result goes: reads into Python, sizes made of values, crossed
            rows.
        written: parameters, buffers and other memory from before the pass that were written to.
        gradients_mended: whether a hook on gradients was registered.
        function: the name of the PyTorch function under way.
        dropped_are_own: whether dropout is at work, on numbers of the examples' own.
        crossed: whether trained parameters met rows that are not the examples' own.
        paused: nothing is followed.
        in_backward: what follows are gradients, which are summed over examples where they reach trained parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._trained = {address(p) for p in model.parameters() if p.requires_grad}
        self.book = Book(self._trained)
        self.mixes: dict[str, None] = {}
        self.found: dict[str, None] = {}
        self.written: dict[str, None] = {}
        self.gradients_mended = self.in_backward = self.crossed = self.dropped_are_own = self.paused = False
        self.names = {id(module): name for name, module in model.named_modules()}
        self._kept = {address(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
        self.function = ""
        self._sharded = is_sharded(model)
        self._born = Memories()
        self._from_before = Memories()  # constants that the first pass met and nobody made in it
        self._pass = 0

    def mark(self, tensor: Tensor, number: int) -> None:
        """The rows of `tensor` are examples 0, 1, ... of pass `number`."""
        bits = bits_of(number)
        self.book.write(tensor, bits.reshape(SIZE, *[1] * (tensor.dim() - 1)), fresh=True)
        self._born.add(tensor)
        self._pass = number

    def own(self, labels: Labels, leading: bool) -> bool:
        """Whether row b depends on example b of this pass alone; with `leading`, rows of B in equal parts of the first
        dimension.
        """
        if labels.ndim == 0 or (labels.shape[0] % SIZE if leading else labels.shape[0] != SIZE):
            return False
        rows = labels.reshape(SIZE, -1) & (EXAMPLES | UNWRITTEN)
        return not (rows & ~bits_of(self._pass)[:, None]).any()

    @contextmanager
    def watching(self, backward: bool = False) -> Iterator[None]:
        """Every operation within is followed; compiled functions run as they are written."""
        with (
            torch.compiler.set_stance("force_eager"),
            gathered.unseen(self._apart, self._note_trained) if self._sharded else nullcontext(),
            _Leaving(self, backward),
            _Operations(self),
        ):
            yield

    def _note_trained(self, whole: Tensor) -> None:
        self._trained.add(key(whole))
        self.book.of_weights.add(key(whole))

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Nothing within is followed."""
        outer, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = outer

    def note(self, into: dict[str, None], what: str) -> None:
        """Notes one finding, with the place in the model or in the code."""
        if len(into) < LONGEST:
            into[f"{what} in {self._place()}"] = None

    def read_into_python(self, what: str, tensors: Iterable[Tensor]) -> None:
        """Notes that Python reads a value that depends on examples, or on weights that are trained, unless the read is
        known to be harmless.
        """
        tensors = list(tensors)
        of_examples = any(bool(self.book.read(tensor).any()) for tensor in tensors)
        if (of_examples or self.book.follows_weights(tensors)) and not is_harmless(*_reader()):
            on = "examples or on their padded length" if of_examples else "weights that each step changes"
            self.note(self.found, f"a value that depends on {on} is read ({what})")

    def after(self, func: Value, args: tuple[Value, ...], kwargs: dict[str, Value], out: Value) -> None:
        """Follows one operation that has been done."""
        call = Call(func, args, kwargs, out, self.book)
        self._note_what_nobody_made(call)
        inputs, present = call.inputs, int(call.everything)
        if present & EXAMPLES and (function := catching(_PROVE)):
            self.note(self.found, f"{function} catches an error of {call.name}, which may depend on any example,")
        if not call.results and call.name not in NO_VALUES and call.answers:
            self.read_into_python(call.name, inputs)
        self._note_sizes(call)
        self._note_chance(call)
        self._note_writes(call)
        self._meet(call, inputs, present)
        self._results(call, inputs, present)

    def _note_what_nobody_made(self, call: Call) -> None:
        """Memory that is new in the second pass, and that no observed operation made, may hold anything: whatever made
        it, such as another thread, may have done so of the examples.
        """
        if self._sharded or call.name == "lift_fresh":  # gathered weights; what Python made, see `_lift`
            return
        for tensor in call.inputs:
            if tensor.layout is not torch.strided or not tensor.numel() or tensor in self._born:
                continue
            if self._pass == 0:
                self._from_before.add(tensor)
            elif tensor not in self._from_before and address(tensor) not in self._kept:
                self.note(self.found, f"{call.name} takes a tensor that no operation of the pass made,")

    def _note_sizes(self, call: Call) -> None:
        masks = (i for i in tensors_in(call.arguments.get("indices")) if i.dtype in (torch.bool, torch.uint8))
        deciding = list(masks) if call.name == "index" else call.inputs if call.name in SIZED_BY_VALUES else []
        if any(self.book.of_examples(tensor) for tensor in deciding):
            self.note(self.found, f"the size of a result depends on examples ({call.name})")
        elif self.book.follows_weights(deciding):
            self.note(self.found, f"the size of a result depends on weights that each step changes ({call.name})")

    def is_each_examples_own(self, tensor: Tensor) -> bool:
        """Whether a tensor has a row an example, or holds numbers of examples alone, in whatever layout."""
        return (tensor.dim() > 0 and len(tensor) == SIZE) or bool((self.book.read(tensor) & EXAMPLES).all())

    def _note_chance(self, call: Call) -> None:
        """Random numbers that a pass draws for all its examples make each depend on who else is in it."""
        if call.name in CHANCE and not self.in_backward and not self.dropped_are_own:
            of = [*call.results[:1], *call.inputs[:1]]
            if not any(self.is_each_examples_own(t) for t in of):
                self.note(self.found, f"random numbers are drawn for all examples together ({call.name})")

    def _note_writes(self, call: Call) -> None:
        hidden = HIDDEN_WRITES.get(call.name, ())
        training = call.arguments.get("training", True)
        for tensor in [*call.written(), *tensors_in([call.arguments[n] for n in hidden] if training else [])]:
            key = address(tensor) if tensor.layout is torch.strided else 0
            if key in self._kept:
                self.written[self._kept[key]] = None
            elif not key or tensor not in self._born:
                self.note(self.written, "a tensor that is kept from before the pass, written")

    def _meet(self, call: Call, inputs: list[Tensor], present: int) -> None:
        """Where trained values meet the examples, rows must lead with the examples, each in its own place."""
        follows = self.book.follows_weights(inputs)
        for known in (self._trained, self.book.of_weights):
            known.difference_update(self._fresh(call))
        if self.in_backward or not follows:
            return
        self.book.of_weights.update(key(r) for r in [*call.results, *call.written()])
        if not any(key(t) in self._trained for t in inputs):
            return
        if not present & (EXAMPLES | UNWRITTEN):
            self._trained.update(key(r) for r in call.results)
            return
        for tensor in inputs:
            labels = call.read(tensor)
            if (distinct(labels) & (EXAMPLES | UNWRITTEN)).any() and not self.own(labels, leading=True):
                self.crossed = True
                self.note(self.found, f"trained parameters meet rows that are not the examples' own ({call.name})")

    def _results(self, call: Call, inputs: list[Tensor], present: int) -> None:
        writes = bool(call.written())
        new_memory = self._fresh(call)
        fresh = [key(r) in new_memory for r in call.results]
        for result, new in zip(call.results, fresh, strict=True):
            if new:
                self._born.add(result)
        if call.name == "lift_fresh":
            return self._lift(call)
        if (not writes and not any(fresh)) or (torch.Tag.inplace_view in call.func.tags and call.name != "resize"):
            return None  # views, and other looks at the same memory
        labels = self._labels(call, inputs, present)
        targets = call.results or call.written()
        self._note_mixture(call, inputs, labels)
        for target, value, new in zip(targets, labels, fresh or [False] * len(targets), strict=True):
            if new or writes:
                self.book.write(target, value, fresh=new)
        return None

    def _fresh(self, call: Call) -> set[int]:
        """The memory that the operation made."""
        return {key(r) for r in call.results} - {key(t) for t in tensors_in(list(call.arguments.values()))}

    def _lift(self, call: Call) -> None:
        for tensor in call.results:  # a constant that Python made within the pass
            if key(tensor) not in self._kept:
                known = self.function in FROM_PYTHON | INDEXING  # what they are given has been looked at
                self._born.add(tensor)
                self.book.write(
                    tensor, np.full(tuple(tensor.shape), SHAPED if known else SHAPED | UNWRITTEN, np.uint8), fresh=True
                )

    def _labels(self, call: Call, inputs: list[Tensor], present: int) -> list[Labels]:
        targets = call.results or call.written()
        rule = rule_of(call)
        if not present and inputs and call.name not in RULES:
            return [np.broadcast_to(NOTHING, tuple(t.shape)) for t in targets]
        try:
            if rule is None or not call.results:
                raise NotImplementedError(call.name)
            made = rule(call)
            parts = [made] if isinstance(made, np.ndarray) else list(made)
            parts += [np.full(tuple(t.shape), call.everything) for t in targets[len(parts) :]]
            return [np.broadcast_to(p, tuple(t.shape)) for p, t in zip(parts, targets, strict=True)]
        except (NotImplementedError, ValueError, IndexError, RuntimeError, TypeError, KeyError):
            mixture = present | (UNWRITTEN if present & EXAMPLES else 0)
            if present & EXAMPLES and not self.in_backward:
                self.note(self.mixes, f"an operation without a rule, {call.name}")
            return [np.full(tuple(t.shape), mixture, dtype=np.uint8) for t in targets]

    def _note_mixture(self, call: Call, inputs: list[Tensor], labels: Iterable[Labels]) -> None:
        if self.in_backward or is_harmless_file(_reader()[0]) or len(self.mixes) >= LONGEST:
            return
        if any(_mixed(part) for part in labels) and not any(_mixed(call.read(t)) for t in inputs):
            self.note(self.mixes, f"examples are mixed by {call.name}")

    def _place(self) -> str:
        """The module and function at work, for a message."""
        function, module = "", ""
        frame = sys._getframe(1)
        while frame is not None and not (function and module):
            file = frame.f_code.co_filename
            if not function and not file.startswith((_OWN, _TORCH)):
                function = f"{Path(file).name}:{frame.f_code.co_name}"
            owner = frame.f_locals.get("self")
            if not module and id(owner) in self.names and isinstance(owner, nn.Module):
                module = self.names[id(owner)] or type(owner).__name__
            frame = frame.f_back  # type: ignore[assignment]
        return f"{module} ({function})" if module else function or "the loss"


class _Operations(TorchDispatchMode):
    """Passes each operation to the tracker; one that PyTorch composes of others is taken apart first."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
        self._tracker = tracker

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # within, nothing is compiled; asking again for each operation takes time

    def __torch_dispatch__(self, func: Value, types: Value, args: Value = (), kwargs: Value = None) -> Value:
        kwargs = kwargs or {}
        if self._tracker.paused:
            return func(*args, **kwargs)
        if plain_name(func) not in RULES and _is_composite(func):
            with self:
                whole = func.decompose(*args, **kwargs)
            if whole is not NotImplemented:
                return whole
        out = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            self._tracker.after(func, args, kwargs, out)
        return out


class _Leaving(TorchFunctionMode):
    """Sees what takes a tensor out of PyTorch's operations, and, where asked, what flows back into each result."""

    def __init__(self, tracker: Tracker, backward: bool) -> None:
        super().__init__()
        self._tracker, self._backward = tracker, backward

    def __torch_function__(self, func: Value, types: Value, args: Value = (), kwargs: Value = None) -> Value:
        kwargs = kwargs or {}
        if self._tracker.paused:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in LEAVES or name in FROM_PYTHON or name in INDEXING:
            self._look(name, [*args, *kwargs.values()])
        self._tracker.gradients_mended |= name in HOOKS
        outer = self._tracker.function, self._tracker.dropped_are_own
        self._tracker.function = name
        if "dropout" in name and args and isinstance(args[0], Tensor):
            self._tracker.dropped_are_own = self._tracker.is_each_examples_own(args[0])
        try:
            out = func(*args, **kwargs)
        finally:
            self._tracker.function, self._tracker.dropped_are_own = outer
        if self._backward:
            for tensor in tensors_in(out):
                self._watch(tensor, name)
        return out

    def _look(self, name: str, arguments: list[Value]) -> None:
        if name in ("as_tensor", "asarray") and isinstance(arguments[0], Tensor):
            return  # the tensor itself, or an operation that is followed
        if name in INDEXING:  # a list of numbers becomes a tensor, unseen
            arguments = [a for a in _listed(arguments[1:2]) if isinstance(a, list)]
        arguments = arguments[1:] if name in ("new_tensor", "tensor_split") else arguments
        self._tracker.read_into_python(name, tensors_in(arguments))

    def _watch(self, tensor: Tensor, name: str) -> None:
        if not tensor.requires_grad or tensor.layout is not torch.strided:
            return
        tracker = self._tracker
        owners = tracker.book.read(tensor)
        if not (owners & EXAMPLES).any():
            return

        def look(gradient: Tensor) -> None:
            if (tracker.book.read(gradient) & EXAMPLES & ~owners).any():
                tracker.note(
                    tracker.found, f"gradients of several examples are mixed on their way to the result of {name}"
                )

        Tensor.register_hook(tensor, look)


def _mixed(labels: Labels) -> bool:
    """Whether a number depends on several examples: whether their bits, less the lowest one, leave any."""
    bits = np.atleast_1d(distinct(labels)) & EXAMPLES  # an array's numbers wrap at 0 without a warning
    return bool((bits & (bits - 1)).any())


@cache
def _is_composite(func: Value) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _listed(arguments: list[Value]) -> list[Value]:
    """The argument that indexes, and what stands in it if it is a tuple."""
    return [part for a in arguments for part in (a if isinstance(a, tuple) else (a,))]


def _reader() -> tuple[str, str]:
    """File and function of the innermost frame that is neither in PyTorch nor in this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_OWN, _TORCH)):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_code.co_name
