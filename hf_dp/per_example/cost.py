"""The cost model: sizes of a linear map and its use -> whether to keep its per-example gradients, or to keep it
factored.

For one example of a linear map d -> r used at T positions, in multiply-adds, where moving one number through memory
counts as `MOVE` of them:

                           work                                                  numbers held, until weights are known
    materialise and keep   T d r + MOVE * 3 d r (write, read for norm and sum)   d r
    keep factored          T d r (sum) + MOVE * T (d + r) + norm                 T (d + r)
        norm by Gram       T^2 (d + r) + MOVE * 2 T^2
        norm by product    T d r + MOVE * 2 d r (formed a few examples at a time, then dropped)

For LoRA r is small, so d r is far below T (d + r): materialise. For wide layers in full fine-tuning d r is far above:
[B, r, d], a copy of the layer for each example, would be held until every layer's norm is known: keep factored.

Besides, a factored form takes some twenty operations a parameter more than one that is materialised (see `stacks`),
which take time however small they are: `LAUNCHES` multiply-adds for all B examples together.

`scripts/bench_cost` compares the choice with measured times.
"""

from functools import lru_cache

MOVE = 16.0  # multiply-adds in the time of one float32 moved; CPU cores and GPUs lie between 8 and 60
LAUNCHES = 1e6
HOLD = 4.0  # materialised gradients may hold at most this many times the numbers of the factored form


@lru_cache(1 << 12)
def materialise_is_cheaper(batch: int, positions: int, d: int, r: int) -> bool:
    """Whether to form [r, d] for each example at once and keep it, given B, T, d, r."""
    kept, factored = d * r, positions * (d + r)
    if kept > HOLD * factored:
        return False
    by_gram = positions * factored + MOVE * 2 * positions * positions
    by_product = positions * d * r + MOVE * 2 * d * r
    return batch * MOVE * 3 * kept <= batch * (MOVE * factored + min(by_gram, by_product)) + LAUNCHES
