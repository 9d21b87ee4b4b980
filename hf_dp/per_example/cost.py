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

LoRA's pairs have many layers of few shapes, and what is materialised of one shape takes the operations of one parameter
(see `stacks`), where each factored form takes some twenty of its own, which take time however small they are. For a
pair, the time of `LAUNCHES` multiply-adds for all B examples together is spared.

`scripts/bench_cost` compares the choice with measured times.
"""

from functools import lru_cache

MOVE = 16.0  # multiply-adds in the time of one float32 moved; CPU cores and GPUs lie between 8 and 60
LAUNCHES = 1e6  # about 20 operations of 5 microseconds
HOLD = 4.0  # materialised gradients may hold at most this many times the numbers of the factored form


@lru_cache(1 << 12)
def materialise_is_cheaper(positions: int, d: int, r: int, spared: float = 0.0) -> bool:
    """Whether to form [r, d] for each example at once and keep it, given T, d, r; `spared`: see `LAUNCHES`, for one
    example.
    """
    kept, factored = d * r, positions * (d + r)
    if kept > HOLD * factored:
        return False
    by_gram = positions * factored + MOVE * 2 * positions * positions
    by_product = positions * d * r + MOVE * 2 * d * r
    return MOVE * 3 * kept <= MOVE * factored + min(by_gram, by_product) + spared
