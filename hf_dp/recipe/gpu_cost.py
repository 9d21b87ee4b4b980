"""Shapes, work and a card -> memory a GPU, tokens a second and days, by a model of the card that each rule states.

What is assumed, and measured nowhere here: `SHARE` of the card's peak in bfloat16, and `LINK` for gathering weights.
The memory is held against the peak of a small pass on a CPU (tests). Letters are those of `run_cost`. Imports no torch.
"""

from typing import NamedTuple

from hf_dp.accounting import Derived
from hf_dp.errors import ConfigError
from hf_dp.mechanism import Mechanism
from hf_dp.recipe.run_cost import FLOAT, Shapes, Work, all_reduced, micro_batches, per_example_gradients, size

SHARE = 0.4  # of the peak that passes reach
LINK = 50e9  # bytes a second that a GPU gathers, as by 400 Gbit/s between machines
TRAINED = 5  # float32 numbers beside a trained weight: its sum, release and gradient, and Adam's two
FREE = 0.9  # of the memory: the rest is the driver's, and lost between allocations
DAY = 86_400


class Card(NamedTuple):
    """A GPU: operations a second in bfloat16 at its peak, and bytes of memory."""

    peak: float
    memory: float


CARDS = {
    "A100": Card(312e12, 80e9),
    "H100": Card(989e12, 80e9),
    "H200": Card(989e12, 141e9),
    "L40S": Card(362e12, 48e9),
}
DEFAULT = "H100"


class Memory(NamedTuple):
    """Bytes on one GPU in a full pass. Where blocks are computed again in backward, `inputs` of all and the activations
    of one `block` stand for `activations`. `gathered` is what shards hold of weights: this process's, and two blocks.
    """

    weights: float
    gathered: float
    trained: float
    factors: float
    activations: float
    inputs: float
    block: float
    logits: float

    def total(self, *, sharded: bool, checkpointing: bool) -> float:
        """All that lives at once: with checkpointing, the logits are gone when a block is computed again."""
        kept = self.inputs + max(self.block, self.logits) if checkpointing else self.activations + self.logits
        weights = self.gathered if sharded else self.weights
        return weights + self.trained + self.factors + kept


def card_of(name: str | None) -> tuple[str, Card]:
    """A card by its name.

    Raises:
        ConfigError: none of `CARDS`.
    """
    by_name = {known.lower(): known for known in CARDS}
    known = by_name.get((name or DEFAULT).lower())
    if known is None:
        raise ConfigError(f"--gpu: expected one of {', '.join(CARDS)}, got {name}")
    return known, CARDS[known]


def memory(shapes: Shapes, work: Work) -> Memory:
    """What a pass over b examples of L tokens holds.

    Activations: the inputs and outputs of each linear map, in the weights' type; inputs of blocks: the hidden units of
    each token. Logits: of all b L positions, with their gradient, in float32.
    """
    tokens = work.examples * work.length
    number = shapes.bytes_of_weights / shapes.parameters
    each = sum(d + r for d, r in shapes.maps)
    part, blocks = shapes.bytes_of_weights / work.num_processes, 2 * shapes.bytes_of_weights / max(1, shapes.blocks)
    return Memory(
        weights=shapes.bytes_of_weights,
        gathered=min(part + blocks, shapes.bytes_of_weights),
        trained=TRAINED * FLOAT * shapes.trainable,
        factors=per_example_gradients(shapes, work),
        activations=number * tokens * each,
        inputs=number * tokens * shapes.blocks * shapes.width,
        block=number * tokens * each / max(1, shapes.blocks),
        logits=2 * FLOAT * tokens * shapes.vocabulary,
    )


def operations(shapes: Shapes, length: int) -> float:
    """Of one token, forward and backward: 4 a frozen weight of a linear map, 6 a trained one, and attention's."""
    weights = sum(d * r for d, r in shapes.maps) + shapes.width * shapes.vocabulary
    frozen = max(weights - shapes.trainable, 0)
    return 4 * frozen + 6 * shapes.trainable + 12 * length * shapes.width * shapes.blocks


def seconds_of_a_pass(shapes: Shapes, work: Work, card: Card, *, sharded: bool) -> float:
    """A full pass: computing, or gathering all weights twice where that takes longer."""
    computing = work.examples * work.length * operations(shapes, work.length) / (SHARE * card.peak)
    return max(computing, 2 * shapes.bytes_of_weights / LINK) if sharded else computing


def derivation(mechanism: Mechanism, shapes: Shapes, work: Work, gpu: str | None) -> list[Derived]:
    """Memory, speed and days, each with its rule; of whole weights where these fit, else of shards."""
    name, card = card_of(gpu)
    work = work._replace(max_examples=1) if mechanism.is_discrete else work
    held, room = memory(shapes, work), FREE * card.memory
    can_shard = work.num_processes > 1 and shapes.trainable < shapes.parameters
    ways = [(s, c) for s in (False, True)[: 1 + can_shard] for c in (False, True)]
    fitting = [way for way in ways if held.total(sharded=way[0], checkpointing=way[1]) <= room]
    sharded, checkpointing = (fitting or ways[-1:])[0]
    total = held.total(sharded=sharded, checkpointing=checkpointing)
    pass_time = seconds_of_a_pass(shapes, work, card, sharded=sharded)
    if checkpointing:
        pass_time *= 4 / 3
    step = micro_batches(mechanism, work) * pass_time
    step += 0 if work.num_processes == 1 else 2 * all_reduced(mechanism, shapes) / LINK
    weights = f"weights in shards {size(held.gathered)}" if sharded else f"weights {size(held.weights)}"
    kept = f"activations {size(held.activations)} + logits {size(held.logits)}"
    if checkpointing:
        kept = f"inputs of blocks {size(held.inputs)} + a block or logits {size(max(held.block, held.logits))}"
    verdict = "" if fitting else f"; MORE THAN AN {name} HAS ({size(card.memory)}): smaller micro-batches, more GPUs"
    bound = "gathering" if sharded and pass_time > seconds_of_a_pass(shapes, work, card, sharded=False) * 1.4 else ""
    return [
        Derived(
            "memory a GPU",
            size(total),
            f"{weights} + sum, gradient and Adam of what is trained {size(held.trained)} + per-example gradients "
            f"{size(held.factors)} + {kept}{verdict}",
        ),
        Derived(
            "tokens a second",
            f"{work.num_processes * work.examples * work.length / pass_time:,.0f}",
            f"on {work.num_processes} {name}, assumed at {SHARE:.0%} of {card.peak / 1e12:.0f} TFLOP/s"
            + (f", weights gathered twice a pass at {LINK / 1e9:.0f} GB/s" if sharded else "")
            + (", which takes longer than computing: larger micro-batches are faster" if bound else "")
            + (", blocks computed again" if checkpointing else ""),
        ),
        Derived(
            "days",
            f"{mechanism.num_steps * step / DAY:.3g}",
            "steps x passes of the busiest process, and the all-reduce; noise, loading and saving come beside it",
        ),
    ]
