"""Micro-batches of one draw -> `p.grad` = (clipped sum + noise) / B for each trainable parameter: the whole algorithm.

This is algorithm 1 of Abadi et al. 2016. `DPTrainer`, `PrivateLoop` and the audit's controls take all their steps here.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_dp.errors import CaptureError, HfDpError, UnseenUse
from hf_dp.mechanism import Mechanism
from hf_dp.per_example import (
    Batch,
    ComparedLengths,
    MicroBatch,
    Pass,
    Places,
    Record,
    State,
    per_example_factors,
    places_kept,
    state_put_back,
    views,
)
from hf_dp.randomness import fork_forward_rng
from hf_dp.sampling import Failure
from hf_dp.step import sharding
from hf_dp.step.coordinates import as_gradient, local
from hf_dp.step.memory import MemoryLimit
from hf_dp.step.run import PrivateRun
from hf_dp.step.sums import ClippedSum, new_sum, refuse_impossible_sum, trainable

Batches = Callable[[], Iterable[MicroBatch]]  # called again if memory runs out and the sum is begun anew


@dataclass(frozen=True)
class Passes:
    """How passes are made; given by whoever owns the model.

    Attributes:
        example_losses: (model, batch) -> one loss an example, [B].
        device: where the sum is kept.
        to_device: brings a collated micro-batch to the model.
        precision: the context of a forward pass, such as autocast.
        factors_of: forms the per-example gradients of a pass; compiled blocks have a function of their own.
        made_up: a batch of one made-up example, for passes that a process takes only because others need its shards.
            Called only if weights are sharded.
        largest: makes up a batch of the largest size, to try what fits in memory; None tries nothing.
        alone: each example has a pass of its own, before which the model's state is put back to that of the first pass.
        copied: names of parameters that a pass is known to write to; they are put back too.
        compared: whether records of a micro-batch's lengths may share a pass (see `ComparedLengths`); None where all
            may. Not asked where weights are sharded, because all processes take as many passes.
        collated_alone: one record -> its micro-batch, or none if it has no tokens.
    """

    example_losses: Callable[[nn.Module, Batch], Tensor]
    device: torch.device
    to_device: Callable[[Batch], Batch]
    precision: Callable[[], AbstractContextManager[object]] = nullcontext
    factors_of: Pass = per_example_factors
    made_up: Callable[[], MicroBatch] | None = None
    largest: Callable[[], MicroBatch] | None = None
    alone: bool = False
    copied: tuple[str, ...] = ()
    compared: ComparedLengths | None = None
    collated_alone: Callable[[list[Record]], list[MicroBatch]] | None = None


class PrivateStep:
    """Takes the private steps of one model: `released = step(run, batches, draw_number)`.

    Guarantee: what each record, or each unit of several records, adds to the sum has Euclidean norm at most
    `level.clip_norm`, and the sum leaves only through `run.release`.

    Args:
        model: unwrapped (no DDP around it).
        mechanism: of the run.
        passes: how a pass is made.

    Raises:
        ConfigError: as `refuse_impossible_sum`.

    Attributes:
        level: the settings of the step under way; before the first step, those of the first.
        sum: what has been summed up so far in this step. Secret until it is released.
    """

    sum: ClippedSum

    def __init__(self, model: nn.Module, mechanism: Mechanism, passes: Passes) -> None:
        refuse_impossible_sum(model, mechanism.at(0))
        self.model, self.level, self.passes = model, mechanism.at(0), passes
        self.sharded = sharding.is_sharded(model)
        self._memory = MemoryLimit(fixed=self.sharded)
        self._names: list[str] = []
        self._state: State | None = None
        self._places: Places | None = None

    def __call__(
        self, run: PrivateRun, batches: Batches, draw_number: int, beside: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        """One step: clips and sums, charges, adds noise, writes the gradients.

        Args:
            run: open. It knows the step's level, charges the ledger and adds the noise.
            batches: the micro-batches of this process's slice of the draw; none if the slice is empty.
            draw_number: of the draw.
            beside: adds to the sum what belongs to the draw besides its records, such as canaries.

        Returns:
            What was released, float32 [P], or [P + 2] with metrics; of this process's shards where trained parameters
            lie in shards.

        Raises:
            ReleaseError: as `PrivateRun.release`.
            CaptureError: the model or its loss failed on an example; its message is left out, for it may quote the
                example. The step is charged, nothing was released. So it is with errors of `add`.
        """
        self.prepare()
        with run.told_to_all(self.sum.flat, draw_number, waiting_in_release=not self.sharded):
            self.level = run.level
            if self.passes.largest is not None:
                self._memory.try_out(
                    self.model, self.passes.largest, lambda some: self.sum_up(some, run.forward_seed())
                )
            self._sum_up_untold(batches, run)
            if beside is not None:
                beside(self.sum.flat)
        shards = self.sum.coordinates
        released = run.release(self.sum.flat, draw_number, *(() if shards is None else (shards,)))
        self.write_gradients(released)
        return released

    def in_the_room_of(self, before: "PrivateStep | None") -> "PrivateStep":
        """This step, which knows of how large a pass may be what the one before it had learnt."""
        if before is not None:
            self._memory = before._memory
        return self

    def prepare(self) -> None:
        """Training mode, and a sum of the size of the parameters that are trainable now; `sum_up` sets it to zero."""
        self.model.train()
        names = list(trainable(self.model))
        if names != self._names:
            self.sum, self._names = new_sum(self.model, self.level, self.passes.device, self.passes.factors_of), names
        if self.passes.alone and self._state is None:
            self._state = State(self.model, self.passes.copied)

    def sum_up(self, batches: Iterable[MicroBatch], forward_seed: int | None = None) -> None:
        """Sets the sum to zero and adds every example of the batches.

        Dropout masks come from secret randomness; from `forward_seed` only in debugging.
        """
        self.sum.begin()
        with fork_forward_rng([self.passes.device], seed=forward_seed):
            parts: Iterable[MicroBatch] = self._memory.parts(b.mapped(self.passes.to_device) for b in batches)
            parts, missing = sharding.counted(parts, self.passes.device) if self.sharded else (parts, 0)
            with places_kept(self.model, self._places) as self._places:
                for part in self._memory.one_by_one(parts):
                    self.add(part)
                for _ in range(missing):
                    self._pass_for_the_others()
        self.sum.refuse_rest()

    def add(self, batch: MicroBatch) -> None:
        """One pass: adds the clipped gradients of its examples to the sum.

        Where passes over public records of such lengths are not right, or this one uses a parameter as they did not,
        each example has a pass of its own instead, before which the model's state is put back.

        Raises:
            CaptureError: several examples in a pass although each should have its own; or as `ClippedSum.add`.
        """
        if self.passes.alone and batch.size > 1:
            raise CaptureError(f"each example has a pass of its own: expected one example a pass, got {batch.size}")
        if self._may_be_shared(batch):
            try:
                kept = nullcontext() if self._state is None else state_put_back(self.model, self._state)
                return self._add(batch, kept)
            except UnseenUse:
                if self.sharded or batch.size == 1:  # sharded: the other processes take as many passes as this one
                    raise
        state = State(self.model)
        for one in self._each_alone(batch):
            self._add(one, state_put_back(self.model, state))

    def _may_be_shared(self, batch: MicroBatch) -> bool:
        if self.passes.compared is None or self.sharded or (batch.size == 1 and not batch.records):
            return True
        with self.passes.precision():
            return self.passes.compared(batch)

    def _each_alone(self, batch: MicroBatch) -> Iterator[MicroBatch]:
        """Each example of a micro-batch in one of its own, not padded to the length of another where that is known."""
        for part in batch.pieces(1):
            if self.passes.collated_alone is None or not part.records:
                yield part
            else:
                alone = self.passes.collated_alone(list(part.records))
                yield from (one.owned_by(part.owned).mapped(self.passes.to_device) for one in alone)

    def _add(self, batch: MicroBatch, kept: AbstractContextManager[object]) -> None:
        with self.passes.precision(), kept:
            losses = lambda: self.passes.example_losses(self.model, batch)  # noqa: E731
            self.sum.add(self.model, losses, batch.size, self.level, batch.owned)

    def _sum_up_untold(self, batches: Batches, run: PrivateRun) -> None:
        """Sums up all examples. The message of an error in the model or the loss may quote one, so it is left out."""
        failure = None
        try:
            self._memory.until_it_fits(lambda: self.sum_up(batches(), run.forward_seed()))
        except HfDpError:
            raise
        except Exception as error:
            failure = Failure.of(error, "brought to a loss")
        if (
            failure is not None
        ):  # raised out here, because an exception raised above would keep the other as its context
            raise CaptureError(failure)

    def write_gradients(self, released: Tensor) -> None:
        """p.grad = released / B, with the public B. Whatever was in `p.grad` before is replaced."""
        parameters, mean = trainable(self.model), released / self.level.expected_batch_size
        for name, gradient in views(mean, {name: local(p) for name, p in parameters.items()}).items():
            parameters[name].grad = as_gradient(gradient, parameters[name])

    def forget(self) -> None:
        """Frees the sum's memory; the next step allocates it again."""
        if self._names:
            del self.sum
        self._names, self._state, self._places = [], None, None

    def _pass_for_the_others(self) -> None:
        """Forward and backward over a made-up example; its result is dropped.

        Other processes wait for this process's shards, though it has no more examples.
        """
        assert self.passes.made_up is not None
        model, made_up = self.model, self.passes.made_up()
        with self.passes.precision():
            per_example_factors(model, lambda: self.passes.example_losses(model, made_up), 1)
        self.sum.add_nothing()
