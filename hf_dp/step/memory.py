"""A step's micro-batches -> parts that fit in memory: where an allocation fails, the sum is begun anew in smaller
parts.

How a batch is cut never changes its sum, and nothing leaves the process while the sum is formed. So after a failure the
same draw is simply summed again from zero. What fits depends on private lengths: it is remembered for the session, and
never logged or saved.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from hf_dp.errors import ConfigError
from hf_dp.per_example import MicroBatch, state_put_back

REMEDY = (
    "truncate the records when they are tokenized, set gradient_checkpointing=True or bf16=True, train fewer "
    "parameters, or take a machine with more memory. The step is charged, nothing was released; go on with "
    "resume_from_checkpoint=True"
)
SMALLER = "set a smaller per_device_train_batch_size or micro_batch_tokens"


class MemoryLimit:
    """What fits in one pass, as far as this session has found out: at first everything that the collator made.

    Args:
        fixed: the number of passes cannot be changed in the middle of a step, so running out of memory is an error.
    """

    def __init__(self, *, fixed: bool = False) -> None:
        self._fixed = fixed
        self._tokens = math.inf  # padded, of one part; secret
        self._part: tuple[int, int] = (0, 0)  # examples of the pass under way, and tokens of each
        self._tried = False

    def parts(self, batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """The batches, one after the other, cut into parts that fit."""
        for batch in batches:
            yield from batch.pieces(int(max(1, min(batch.size, self._tokens // _width(batch)))))

    def one_by_one(self, parts: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """The parts; remembers the one under way, in case memory runs out in it."""
        for part in parts:
            self._part = part.size, _width(part)
            yield part

    def until_it_fits(self, sum_all: Callable[[], None]) -> None:
        """Calls `sum_all` until memory suffices, and halves the limit after each failure.

        Args:
            sum_all: begins at zero, and takes the parts that `parts` gives through `one_by_one`.

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
            self._halve()  # outside of `except`: the exception keeps the tensors of the pass alive

    def try_out(
        self, model: nn.Module, make: Callable[[], MicroBatch], sum_all: Callable[[list[MicroBatch]], None]
    ) -> None:
        """Before the first sum of a session: halves the limit until the largest micro-batch, made up, can be summed.

        This never raises an error. An error would tell that a long record exists before any draw is charged for it. If
        one example alone fails, or something else than memory, the step that draws such a record will fail. Nothing is
        tried where the number of passes is fixed, or where a pass that is too large would not fail (see
        `refuses_memory`).

        Args:
            model: whose buffers stand afterwards as before.
            make: makes the largest micro-batch up.
            sum_all: sums the examples of batches, from zero.
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
    """Whether allocating too much fails on the model's device.

    On a CPU it does not: the operating system grants memory that it does not have, and ends the process later.
    """
    return next(model.parameters()).device.type != "cpu"


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def _width(batch: MicroBatch) -> int:
    """Padded tokens of one example; 1 for a batch without tokens."""
    tokens = batch.get("input_ids")
    return max(1, tokens.numel() // batch.size) if isinstance(tokens, Tensor) and batch.size else 1
