"""The sizes of a micro-batch -> whether passes over several examples of such lengths give each the gradient it has
alone: compared once on public records of these lengths, when a training first meets them.

What a model does may depend on the length: a layer may lay out its rows otherwise, or mix them, beyond some number of
tokens. Made-up records of a few tokens don't show that, and the longest that a training meets are not known beforehand.
So lengths are compared in steps: 1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, ..., which are both ends of each doubling, one of
them odd. A micro-batch relies on the steps on both sides of its length, and so on whatever a model does below or above
one threshold between them. Where a comparison fails, each example of such lengths has a pass of its own, which is
exact.
"""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from hf_dp.per_example.batches import Batch, MicroBatch, Path, leaves
from hf_dp.per_example.synthetic import LENGTHS, MANY

MOST = 1 << 20  # tokens
DOUBLINGS = 4  # steps that make two doublings
Side = tuple[Path, int]  # a tensor of the batch, and one of its dimensions

Sizes = dict[Side, int]


class ComparedLengths:
    """Which lengths of records may share a pass.

    Args:
        made: lengths -> made-up records of them, all in one micro-batch first, then each alone. It is called with two
            lengths, of which the first is the greater, or equal where records of different lengths don't go together.
        are_right: whether the examples of such a micro-batch have the gradients in it that they have alone.
        known: a micro-batch of several examples that was compared already.
        longest: the most tokens that the model takes; None where any number is taken.
    """

    def __init__(
        self,
        made: Callable[[tuple[int, int]], Sequence[MicroBatch]],
        are_right: Callable[[Sequence[MicroBatch]], bool],
        known: MicroBatch,
        longest: int | None = None,
    ) -> None:
        self._made, self._are_right = made, are_right
        self._known = {_as_key(sizes_of(known))}
        self._steps = steps_up_to(min(longest or MOST, MOST))
        self._far = max(i for i, step in enumerate(self._steps) if step <= MANY)
        self._sizes: dict[int, Sizes] = {}  # of each step that was made, by its number
        self._found: dict[int, bool | None] = {}  # by the number of a step; None where passes failed

    def __call__(self, batch: MicroBatch) -> bool:
        """Whether passes over several examples of such sizes are right."""
        sizes = sizes_of(batch)
        if _as_key(sizes) in self._known:
            return True
        if not all(self._is_right(step) for step in sorted(self._relied_on(sizes))):
            return False
        self._known.add(_as_key(sizes))
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
        near = range(self._far + 1)
        first, far = (next(filter(None, map(self._at, order)), {}) for order in (near, near[::-1]))
        varying = [side for side in sizes if first.get(side) != far.get(side)]
        return {step for side in varying for step in self._around(side, sizes[side])}

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

    def _batches(self, step: int) -> Sequence[MicroBatch]:
        length = self._steps[step]
        made = self._made((length, length // 2 + 1))
        return made if made[0].size > 1 else self._made((length, length))

    def _is_right(self, step: int) -> bool | None:
        if step not in self._found:
            try:
                self._found[step] = _as_key(self._at(step)) in self._known or self._compared(self._batches(step))
            except Exception:  # of whatever kind, lack of memory too: one example a pass may still go
                self._found[step] = None
        return self._found[step]

    def _compared(self, batches: Sequence[MicroBatch]) -> bool | None:
        return self._are_right(batches) if batches[0].size > 1 else None


def steps_up_to(longest: int) -> list[int]:
    """1, 2, 3, 4, 5, 8, 9, 16, 17, ... up to `longest`, which is the last."""
    ends = (end for power in range(longest.bit_length()) for end in (1 << power, (1 << power) + 1))
    return sorted({longest, *(end for end in ends if end < longest)})


def _as_key(sizes: Sizes) -> frozenset[tuple[Side, int]]:
    return frozenset(sizes.items())


def sizes_of(batch: Batch) -> Sizes:
    """Every dimension of the batch's tensors but the first, which is the examples'."""
    tensors = {path: leaf for path, leaf in leaves(batch).items() if isinstance(leaf, Tensor)}
    return {(path, i): size for path, leaf in tensors.items() for i, size in enumerate(leaf.shape) if i}
