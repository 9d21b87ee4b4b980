"""A mechanism, a model's shapes and the division of the work -> what a run costs: passes, communication, memory.

Legend: B expected batch, W processes, b examples of a micro-batch, L tokens of each; d inputs and r outputs of a linear
map. Imports no torch.
"""

import math
from typing import NamedTuple

from hf_dp.accounting import Derived
from hf_dp.mechanism import METRICS, Mechanism
from hf_dp.per_example import LAUNCHES, materialise_is_cheaper

FLOAT = 4  # bytes of float32: what is clipped, summed and reduced
BESIDE_THE_SUM = 3  # further numbers in the all-reduce: see `step/release.py`
INDEX = 2  # size of a 64-bit whole number, in units of FLOAT
TAIL = 1e-12  # draws of a size rarer than this are left out of the mean


class Shapes(NamedTuple):
    """The sizes of a model that its cost depends on.

    `linear` holds (d, r) of each trained linear map, `tables` the width of the trained token embedding; `others` counts
    all other trained parameters, such as biases and scales. `maps` holds (d, r) of each linear map but the output
    layer's and an adapter's; `blocks`, `width` and `vocabulary` are the number of repeated blocks, hidden units and
    tokens that there are.
    """

    parameters: int
    bytes_of_weights: int
    trainable: int
    linear: tuple[tuple[int, int], ...] = ()
    tables: tuple[int, ...] = ()
    others: int = 0
    maps: tuple[tuple[int, int], ...] = ()
    blocks: int = 0
    width: int = 0
    vocabulary: int = 0


class Work(NamedTuple):
    """How a step is divided: W; the most examples and padded tokens of a micro-batch; and the tokens of an example,
    padded.
    """

    num_processes: int
    max_examples: int
    max_tokens: int | None
    length: int

    @property
    def examples(self) -> int:
        """Examples of a full micro-batch, b."""
        return (
            self.max_examples
            if self.max_tokens is None
            else max(1, min(self.max_examples, self.max_tokens // self.length))
        )


def micro_batches(mechanism: Mechanism, work: Work) -> float:
    """Passes in a step of the busiest process: ceil(ceil(n / W) / b), averaged over the number n of records drawn."""
    import numpy as np
    from scipy.stats import binom

    drawn = binom(mechanism.num_examples, mechanism.largest.sample_rate)
    low, high = (int(n) for n in drawn.ppf([TAIL, 1 - TAIL]))
    n = np.arange(low, high + 1)
    passes = np.ceil(np.ceil(n / work.num_processes) / work.examples)
    return float((drawn.pmf(n) * passes).sum())


def all_reduced(mechanism: Mechanism, shapes: Shapes) -> int:
    """Bytes of a step's one all-reduce. They are the same in every step, also where nothing was drawn."""
    metrics = 0 if mechanism.loss_bound is None else len(METRICS)
    return _number_summed(mechanism) * (shapes.trainable + metrics + BESIDE_THE_SUM)


def _number_summed(mechanism: Mechanism) -> int:
    """Bytes of one coordinate of the sum; whole numbers have 64 bits."""
    return INDEX * FLOAT if mechanism.is_discrete else FLOAT


def per_example_gradients(shapes: Shapes, work: Work) -> int:
    """An upper bound, in bytes, on what is held of a full micro-batch's per-example gradients until their norms are
    known.

    A linear map's gradients are held as [r, d], or as inputs and output gradients where `cost` finds that cheaper. A
    single example holds its gradient.
    """
    if work.examples == 1:
        return FLOAT * shapes.trainable
    length = work.length
    held = 0
    for d, r in shapes.linear:
        kept, factored = d * r, length * (d + r)
        ways = {materialise_is_cheaper(length, d, r, spared) for spared in (0.0, LAUNCHES / work.examples)}
        held += max(kept if way else factored for way in ways)
    held += length * sum(width + INDEX for width in shapes.tables) + shapes.others
    return FLOAT * work.examples * held


def derivation(mechanism: Mechanism, shapes: Shapes, work: Work) -> list[Derived]:
    """What the run costs: each number with its rule."""
    number = _number_summed(mechanism)
    work = work._replace(max_examples=1) if mechanism.is_discrete else work
    passes, reduced, alone = micro_batches(mechanism, work), all_reduced(mechanism, shapes), work.num_processes == 1
    at_most = f"min({work.max_examples}, {work.max_tokens} // {work.length})" if work.max_tokens else "given"
    at_most = "noise on whole numbers takes one example a pass" if mechanism.is_discrete else at_most
    sharded = "" if alone else f"; 1/{work.num_processes} of it each, and a layer whole, where FSDP2 shards it"
    return [
        Derived(
            "model",
            f"{shapes.parameters:,}",
            f"parameters, {shapes.trainable:,} of them trained; weights take {size(shapes.bytes_of_weights)} a "
            f"process{sharded}",
        ),
        Derived("examples of a micro-batch b", str(work.examples), f"{at_most}; speed and memory, never the result"),
        Derived(
            "micro-batches a step",
            f"{passes:.1f}",
            f"ceil(ceil(n / {work.num_processes}) / b) of the busiest process, its mean over draws n; "
            f"{math.ceil(passes * mechanism.num_steps):,} in all",
        ),
        Derived(
            "all-reduced a step",
            "nothing" if alone else size(reduced),
            "one process"
            if alone
            else f"{number} bytes x (P + {reduced // number - shapes.trainable}), once; "
            f"{size(reduced * mechanism.num_steps)} in all",
        ),
        Derived(
            "per-example gradients",
            size(per_example_gradients(shapes, work)),
            f"of a full micro-batch at {work.length} tokens, in float32, until it is clipped; activations come beside "
            "it",
        ),
    ]


def size(number_of_bytes: float) -> str:
    """A number of bytes in the unit that leaves one to four digits before the point."""
    power = min(3, max(0, math.floor(math.log(max(number_of_bytes, 1), 1024))))
    return f"{number_of_bytes / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"
