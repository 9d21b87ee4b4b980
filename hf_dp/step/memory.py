"""A step's micro-batches -> parts that fit in memory: where an allocation fails, the step's sum is begun anew in smaller parts.

How a batch is cut never changes its sum, and nothing has left the process while the sum is formed, so the same draw is simply summed
again from zero, whatever had been added. What fits depends on private lengths: it is kept for the session, and logged or saved nowhere.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from hf_dp.errors import ConfigError
from hf_dp.per_example import MicroBatch, state_put_back, unambiguous

REMEDY = (
    "truncate the records when they are tokenized, set gradient_checkpointing=True or bf16=True, train fewer parameters, or take a "
    "machine with more memory. The step is charged, nothing was released; go on with resume_from_checkpoint=True"
)
SMALLER = "set a smaller per_device_train_batch_size or micro_batch_tokens"


class Room:
    """What fits in one pass, as far as this session has found out: at first everything that the collator made.

    Args:
        fixed: the number of passes can't be changed in the middle of a step; running out of memory is an error.
    """

    def __init__(self, *, fixed: bool = False) -> None:
        self._fixed = fixed
        self._tokens = math.inf  # padded, of one part; secret
        self._part: tuple[int, int] = (0, 0)
        self._tried = False

    def parts(self, batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """The batches in parts that fit and whose size is none of their other dimensions (see `unambiguous`), one after the other."""
        for batch in batches:
            step = int(max(1, min(batch.size, self._tokens // _width(batch))))
            for start in range(0, batch.size, step):
                yield from unambiguous(batch.rows(slice(start, start + step)))

    def one_by_one(self, parts: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """The parts, and which of them is in hand, should memory run out."""
        for part in parts:
            self._part = part.size, _width(part)
            yield part

    def until_it_fits(self, sum_all: Callable[[], None]) -> None:
        """Calls `sum_all`, which begins at zero and takes `one_by_one` what `parts` gives, until memory lasts; halves what fits each time.

        Raises:
            ConfigError: one example alone does not fit, or the number of passes is fixed.
        """
        while True:
            self._part = (0, 0)
            try:
                return sum_all()
            except RuntimeError as error:
                if not (_out_of_memory(error) and self._part[0]):
                    raise
            self._halve()  # out here: the exception held on to the tensors of the pass

    def try_out(
        self, model: nn.Module, make: Callable[[], MicroBatch], sum_all: Callable[[list[MicroBatch]], None]
    ) -> None:
        """Before the first sum of a session: halves what fits until the sum of the largest micro-batch, made up, can be formed.

        Never an error: it would tell that a long record exists, which no draw has been charged for. What fails for one example, or for
        another reason than memory, is left to the step that draws such a record. Nothing is tried where the number of passes is fixed,
        and where a pass that is too large would not fail (see `refuses_memory`).
        """
        if self._tried or self._fixed or not refuses_memory(model):
            return
        self._tried = True
        with state_put_back(model), suppress(Exception):
            batch = make()
            while not self._fits(batch, sum_all) and self._part[0] > 1:
                self._halve()
        clear_device_cache(garbage_collection=True)

    def _fits(self, batch: MicroBatch, sum_all: Callable[[list[MicroBatch]], None]) -> bool:
        self._part = (0, 0)
        try:
            sum_all([batch])
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            return False
        return True

    def _halve(self) -> None:
        size, width = self._part
        clear_device_cache(garbage_collection=True)
        if size == 1:
            raise ConfigError(f"one example by itself does not fit in memory: {REMEDY}")
        if self._fixed:
            raise ConfigError(f"a micro-batch does not fit in memory beside sharded weights: {SMALLER}, {REMEDY}")
        self._tokens = -(-size // 2) * width


def refuses_memory(model: nn.Module) -> bool:
    """Whether the model's device says so where memory runs out: a CPU's system grants what it does not have, and ends the process later."""
    return next(model.parameters()).device.type != "cpu"


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def _width(batch: MicroBatch) -> int:
    """Padded tokens of one example; 1 where there are none."""
    tokens = batch.get("input_ids")
    return max(1, tokens.numel() // batch.size) if isinstance(tokens, Tensor) and batch.size else 1
