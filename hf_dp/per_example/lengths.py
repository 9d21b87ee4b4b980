"""The sizes of a micro-batch -> whether passes over several examples of such lengths give each the gradient it has
alone: compared once on public records of these lengths, when a training first meets them.

What a model does may depend on the length: a layer may lay out its rows otherwise, or mix them, beyond some number of
tokens. Made-up records of a few tokens don't show that, and the longest that a training meets are not known beforehand.
So lengths are compared in steps: 1, 2, 3, 4, 5, 9, 16, 32, 64, .... A micro-batch relies on the steps on both sides of
its length. Of the lengths between them, and of numbers of examples, a trace must show that the model does there what it
does at these steps (see `Trace`); otherwise such lengths are compared themselves. Where a comparison fails, each
example of such lengths has a pass of its own, which is exact.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hf_dp.per_example.batches import Batch, Leaf, MicroBatch, Path, leaves, with_leaves
from hf_dp.per_example.synthetic import LENGTHS, MANY
from hf_dp.per_example.trace import Trace

MOST = 1 << 20  # tokens
DOUBLINGS = 2  # steps that make two doublings
FIRST = -1  # stands for the step that was compared beforehand
Side = tuple[Path, int]  # a tensor of the batch, and one of its dimensions

Sizes = dict[Side, int]
Key = frozenset[tuple[Side, int]]


class ComparedLengths:
    """Which lengths of records may share a pass.

    Args:
        made: lengths -> made-up records of them, all in one micro-batch first, then each alone. It is called with two
            lengths, of which the first is the greater, or equal where records of different lengths don't go together.
        are_right: whether the examples of such a micro-batch have the gradients in it that they have alone.
        known: a micro-batch of several examples that was compared already, in as many as a pass may hold too.
        longest: the most tokens that the model takes; None where any number is taken.
        trace: a micro-batch of public records -> what a pass over it does. None where only lengths that are steps are
            looked at.
    """

    def __init__(
        self,
        made: Callable[[tuple[int, int]], Sequence[MicroBatch]],
        are_right: Callable[[Sequence[MicroBatch]], bool],
        known: MicroBatch,
        longest: int | None = None,
        trace: Callable[[MicroBatch], Trace] | None = None,
    ) -> None:
        self._made, self._are_right, self._trace = made, are_right, trace
        self._first, self._kinds = known, _kinds(known)
        self._first_key = _as_key(sizes_of(known))
        self._known: set[tuple[Key, int]] = set()  # sizes, and a number of examples, whose passes are right
        self._steps = steps_up_to(min(longest or MOST, MOST))
        self._far = max(i for i, step in enumerate(self._steps) if step <= MANY)
        self._sizes: dict[int, Sizes] = {}  # of each step that was made, by its number
        self._found: dict[int, bool | None] = {}  # by the number of a step; None where passes failed
        self._traces: dict[tuple[int, int], Trace | None] = {}  # by the number of a step and that of the examples
        self._numbers = {1, 2, known.size}  # of examples, that do together what two do

    def __call__(self, batch: MicroBatch) -> bool:
        """Whether passes over several examples of such sizes are right."""
        sizes, number = sizes_of(batch), batch.size
        key = _as_key(sizes)
        if _kinds(batch) != self._kinds or (self._trace is not None and not self._as_few(number)):
            return False
        pair = key, number if self._trace else 0
        if key == self._first_key or pair in self._known:
            return True
        steps = sorted(self._relied_on(sizes))
        if not all(self._is_right(step) for step in steps):
            return False
        if self._trace is not None and not self._is_right_between(sizes, steps, number):
            return False
        self._known.add(pair)
        return True

    def up_to(self, batch: MicroBatch) -> bool:
        """Whether no passes over several examples of such sizes, or of smaller ones that are longer than what made-up
        records have by default, give other gradients.

        Passes that fail count as right here: an example alone fails too, or the failure ends the step.
        """
        last = max(self._relied_on(sizes_of(batch)), default=-1)
        steps = [i for i, length in enumerate(self._steps[: last + 1]) if length > max(LENGTHS)]
        return all(self._is_right(step) is not False for step in steps)

    def _relied_on(self, sizes: Sizes) -> set[int]:
        """The steps on both sides of each size that depends on the length."""
        return {step for side in sizes if self._varies(side) for step in self._around(side, sizes[side])}

    def _varies(self, side: Side) -> bool:
        """Whether it depends on the length."""
        near = range(self._far + 1)
        first, far = (next(filter(None, map(self._at, order)), {}) for order in (near, near[::-1]))
        return first.get(side) != far.get(side)

    def _around(self, side: Side, size: int) -> Iterator[int]:
        """The last step of that size; or else the steps just below and above it."""
        below = -1
        for step in range(len(self._steps)):
            here = self._at(step).get(side)
            if here is None and below < 0:
                continue  # too short to be made up
            if here is None or here > size:
                if below < 0 or self._at(below)[side] < size:
                    yield step
                break
            if step > self._far and here == self._at(step - DOUBLINGS)[side]:
                break  # what is made up is cut to a length
            below = step
        if below >= 0:
            yield below

    def _at(self, step: int) -> Sizes:
        if step not in self._sizes:
            try:
                self._sizes[step] = sizes_of(self._batches(step)[0])
            except Exception:  # such records cannot be made up
                self._sizes[step] = {}
        return self._sizes[step]

    def _as_few(self, number: int) -> bool:
        """Whether a pass of the first sizes over so many examples does what it does over two."""
        if number not in self._numbers and self._trace_at(FIRST, number) is not None:
            self._numbers.add(number)
        return number in self._numbers

    def _is_right_between(self, sizes: Sizes, steps: Sequence[int], number: int) -> bool:
        """Whether passes of these sizes over `number` examples are right, given that those at the steps are."""
        first = sizes_of(self._first)
        if any(size != first[side] for side, size in sizes.items() if not self._varies(side)):
            return self._is_right_in_other_sizes(sizes, number)  # such as pictures of another size
        return self._does_as_at(steps, sizes, number) or self._is_right_itself(sizes, steps, number)

    def _is_right_in_other_sizes(self, sizes: Sizes, number: int) -> bool:
        """As `_is_right_itself`, of sizes that don't follow from a length."""
        try:
            whole = self._public(sizes)
            alone = whole.pieces(1)
            return whole.size > 1 and self._are_right([whole.first(max(number, whole.size)), *alone])
        except Exception:
            return False

    def _does_as_at(self, steps: Sequence[int], sizes: Sizes, number: int) -> bool:
        """Whether a pass over `number` examples does what it does at these steps, and there what it does over two."""
        if not steps:
            return True  # only sizes that are the same at every length
        steps = [FIRST if _as_key(self._at(step)) == self._first_key else step for step in steps]
        at_steps = [trace for step in steps if (trace := self._trace_at(step, number)) is not None]
        here = self._traced(lambda: self._public(sizes), number) if len(at_steps) == len(steps) else None
        return here is not None and here.lies_between(at_steps)

    def _trace_at(self, step: int, number: int) -> Trace | None:
        """Of a pass over `number` examples; None where it does another thing than one over two."""
        if (step, number) not in self._traces:
            found = self._traced(lambda: self._first if step == FIRST else self._batches(step)[0], number)
            few = self._trace_at(step, 2) if number > 2 else None
            grown = number <= 2 or (few is not None and found is not None and found.is_grown(few, number / 2))
            self._traces[step, number] = found if grown else None
        return self._traces[step, number]

    def _traced(self, made: Callable[[], MicroBatch], number: int) -> Trace | None:
        assert self._trace is not None
        try:
            return self._trace(made().first(number))
        except torch.OutOfMemoryError:
            raise  # fewer examples may go
        except Exception:  # whatever a model cannot do while it is traced: such sizes are compared themselves
            return None

    def _is_right_itself(self, sizes: Sizes, steps: Sequence[int], number: int) -> bool:
        """Whether passes over as many made-up examples of exactly these sizes are right; not if none can be made up."""
        try:
            whole, *alone = self._made_of(self._length_of(sizes, steps))
            right = whole.size > 1 and sizes_of(whole) == sizes
            return right and self._are_right([whole.first(max(number, whole.size)), *alone])
        except Exception:
            return False

    def _length_of(self, sizes: Sizes, steps: Sequence[int]) -> int:
        """How many tokens made-up records of these sizes have, if sizes grow evenly between steps."""
        low, high = min(steps), max(steps)
        side = next(side for side in sizes if self._at(low).get(side) != self._at(self._far).get(side))
        if low == high:
            return self._steps[low] + sizes[side] - self._at(low)[side]
        below, above = self._at(low)[side], self._at(high)[side]
        tokens = self._steps[high] - self._steps[low]
        return self._steps[low] + round((sizes[side] - below) * tokens / (above - below))

    def _public(self, sizes: Sizes) -> MicroBatch:
        """Made-up examples of these sizes: those of the steps above, cut; beyond the last step they are repeated."""
        steps = self._relied_on(sizes)
        template = self._batches(max(steps))[0] if steps else self._first

        def leaf(path: Path, value: Leaf) -> Leaf:
            if not isinstance(value, Tensor):
                return value
            sides = [(path, i) for i in range(1, value.dim())]
            steps = [step for side in sides if self._varies(side) for step in self._around(side, sizes[side])]
            found = leaves(self._batches(max(steps))[0])[path] if steps else value
            for side in sides:
                have, wanted = found.shape[side[1]], sizes[side]
                if have != wanted:
                    found = found.index_select(side[1], torch.arange(wanted, device=found.device) % have)
            return found

        return MicroBatch(with_leaves(template, leaf), template.size)

    def _batches(self, step: int) -> Sequence[MicroBatch]:
        return self._made_of(self._steps[step])

    def _made_of(self, length: int) -> Sequence[MicroBatch]:
        made = self._made((length, max(length // 2, 1)))
        return made if made[0].size > 1 else self._made((length, length))

    def _is_right(self, step: int) -> bool | None:
        if step not in self._found:
            try:
                self._found[step] = _as_key(self._at(step)) == self._first_key or self._compared(self._batches(step))
            except Exception:  # of whatever kind, lack of memory too: one example a pass may still go
                self._found[step] = None
        return self._found[step]

    def _compared(self, batches: Sequence[MicroBatch]) -> bool | None:
        return self._are_right(batches) if batches[0].size > 1 else None


def steps_up_to(longest: int) -> list[int]:
    """1, 2, 3, 4, 5, 9, 16, 32, 64, ... up to `longest`, which is the last; 9 is the longest of made-up records."""
    short = (1, 2, 3, 4, 5, max(LENGTHS))
    far = (1 << power for power in range(4, longest.bit_length()))
    return sorted({longest, *(step for step in (*short, *far) if step < longest)})


def _as_key(sizes: Sizes) -> Key:
    return frozenset(sizes.items())


def _kinds(batch: Batch) -> dict[Path, Leaf]:
    """What must be alike in all passes: which members there are, the types of tensors, and what is no row an example's.

    Code may read these, and do something else.
    """

    def kind(leaf: Leaf) -> Leaf:
        if isinstance(leaf, Tensor):
            return leaf.dtype, leaf.dim()
        return (type(leaf), leaf) if isinstance(leaf, (bool, int, float, str)) else type(leaf)

    return {path: kind(leaf) for path, leaf in leaves(batch).items()}


def sizes_of(batch: Batch) -> Sizes:
    """Every dimension of the batch's tensors but the first, which is the examples'."""
    tensors = {path: leaf for path, leaf in leaves(batch).items() if isinstance(leaf, Tensor)}
    return {(path, i): size for path, leaf in tensors.items() for i, size in enumerate(leaf.shape) if i}
