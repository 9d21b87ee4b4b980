"""Bugs to be planted on purpose, each a patch of a line or two of a kind that was found in the wild."""

from typing import Any

import numpy as np
import pytest
import torch

from hf_dp.accounting import epsilon
from hf_dp.ledger.ledger import Ledger
from hf_dp.per_example import capture, losses, norms, stacks
from hf_dp.per_example.borrowing import Places
from hf_dp.per_example.pairs import Pair
from hf_dp.per_example.stacks import Stacks
from hf_dp.randomness.noise import NoiseSource
from hf_dp.sampling import microbatch
from hf_dp.sampling.poisson import Draw, PoissonSampler
from hf_dp.step import PrivateStep, opening, sums
from hf_dp.step.release import Releaser
from hf_dp.training import trainer

Patch = pytest.MonkeyPatch


def no_clipping(patch: Patch) -> None:
    patch.setattr(capture, "clip_factors", lambda norms, clip_norm: torch.ones_like(norms))


def clipped_after_averaging(patch: Patch) -> None:
    """The whole micro-batch's gradient is clipped to B C, as `max_grad_norm` would."""
    original = sums.clipped_gradient_sum

    def clipped(model: Any, example_losses: Any, batch_size: int, clip_norm: float, into: Any, *passes: Any) -> None:
        own = {name: torch.zeros_like(total) for name, total in into.items()}
        original(model, example_losses, batch_size, 1e9, own, *passes)
        norm = float(torch.stack([g.norm() for g in own.values()]).norm())
        for name, g in own.items():
            into[name] += g * min(1.0, batch_size * clip_norm / max(norm, 1e-30))

    patch.setattr(sums, "clipped_gradient_sum", clipped)


def clipped_by_parameter(patch: Patch) -> None:
    """Each parameter's gradient is held to C by itself, so that an example moves the sum by more than C."""
    original = capture.squared_norms

    def of_the_first(factors: Any, blocks: Any, losses: torch.Tensor) -> Any:
        return original({}, [capture.Joined(b.names[:1], b.gradients[:1]) for b in blocks[:1]], losses)

    patch.setattr(capture, "squared_norms", of_the_first)


def norms_of_one_stack_alone(patch: Patch) -> None:
    """Parameters of one shape are measured, and those of the others are clipped with them."""
    original = capture.squared_norms
    patch.setattr(capture, "squared_norms", lambda factors, blocks, losses: original(factors, blocks[:1], losses))


def full_blocks_alone_measured(patch: Patch) -> None:
    """Of a row, what is left over of the blocks of 128 numbers is forgotten."""
    original = norms._dense
    patch.setattr(norms, "_dense", lambda stack: original(stack[..., : stack.shape[2] // norms.BLOCK * norms.BLOCK]))


def a_stack_in_another_order(patch: Patch) -> None:
    original = stacks._as_written

    def turned_round(dense: Any) -> Any:
        block = original(dense)
        return block._replace(names=block.names[::-1])

    patch.setattr(stacks, "_as_written", turned_round)


def a_pair_without_its_scale(patch: Patch) -> None:
    """LoRA's A is given its gradient before alpha / r."""
    original = Stacks.product
    patch.setattr(Stacks, "product", lambda self, factor, scale: original(self, factor, 1.0))


def a_pair_that_forgets_its_switch(patch: Patch) -> None:
    """An adapter that the loss switches off for a while stays on."""
    patch.setattr(Pair, "_is_as_found", lambda self: True)


def places_that_always_hold(patch: Patch) -> None:
    patch.setattr(Places, "hold", lambda self, model: True)


def noise_divided_by_the_batch(patch: Patch) -> None:
    original = NoiseSource.gaussian
    patch.setattr(NoiseSource, "gaussian", lambda self, n, *, std, device=None: original(self, n, std=std / 8))


def noise_on_one_parameter(patch: Patch) -> None:
    original = NoiseSource.gaussian

    def half(self: NoiseSource, n: int, *, std: float, device: Any = None) -> torch.Tensor:
        noise = original(self, n, std=std, device=device)
        noise[n // 2 :] = 0
        return noise

    patch.setattr(NoiseSource, "gaussian", half)


def noise_for_every_micro_batch(patch: Patch) -> None:
    original = PrivateStep.add

    def noisy(self: PrivateStep, batch: Any) -> None:
        original(self, batch)
        self.sum.flat += NoiseSource().gaussian(len(self.sum.flat), std=self.level.noise_std)

    patch.setattr(PrivateStep, "add", noisy)


def noise_from_the_trainers_seed(patch: Patch) -> None:
    patch.setattr(opening, "NoiseSource", lambda key=None: NoiseSource(key=torch.initial_seed()))


def noise_of_the_session_before(patch: Patch) -> None:
    """A key that is kept with the checkpoint, and a count that begins again."""
    patch.setattr(opening, "NoiseSource", lambda key=None: NoiseSource(key=20_240_501))


def noise_on_every_process(patch: Patch) -> None:
    original = Releaser._fill

    def fill(self: Releaser, buffer: torch.Tensor, clipped_sum: torch.Tensor, c: float, sigma: float) -> None:
        original(self, buffer, clipped_sum, c, sigma)
        if self._process_index > 0:
            buffer += NoiseSource().gaussian(len(buffer), std=c * sigma)

    patch.setattr(Releaser, "_fill", fill)


def shuffled_epochs(patch: Patch) -> None:
    def draw(self: PoissonSampler, number: int) -> np.ndarray:
        per_epoch = round(1 / self.sample_rate)
        order = np.random.default_rng(number // per_epoch).permutation(self.num_examples)
        return np.sort(np.array_split(order, per_epoch)[number % per_epoch])

    patch.setattr(PoissonSampler, "draw", draw)


def batches_evened_out(patch: Patch) -> None:
    """Slices padded to one length with the draw's first records, as accelerate's even_batches does."""

    def evened(self: PoissonSampler) -> Any:
        for _ in range(self.num_batches):
            number, self._next = self._next, self._next + 1
            drawn = self.draw(number).tolist()
            missing = -len(drawn) % self.num_processes
            yield Draw((drawn + drawn[:missing])[self.process_index :: self.num_processes], number)

    patch.setattr(PoissonSampler, "__iter__", evened)


def last_micro_batch_dropped(patch: Patch) -> None:
    original = microbatch.split

    def split(lengths: Any, max_examples: int, *bounds: Any) -> list[list[int]]:
        return [g for g in original(lengths, max_examples, *bounds) if len(g) == max_examples]

    patch.setattr(microbatch, "split", split)


def divided_by_the_tokens_of_the_batch(patch: Patch) -> None:
    """Trainer's `num_items_in_batch`: an example's weight depends on the lengths of the others."""

    original = losses.mean_over_targets

    def mean_over_targets(rows: torch.Tensor, labels: torch.Tensor, *args: Any) -> torch.Tensor:
        own = (labels != losses.IGNORED).sum(1).clamp_min(1)
        return original(rows, labels, *args) * own / (labels != losses.IGNORED).sum().clamp_min(1)

    patch.setattr(losses, "mean_over_targets", mean_over_targets)


def not_a_number_let_through(patch: Patch) -> None:
    patch.setattr(capture.fx, "without_examples", lambda uses, keep: uses)
    patch.setattr(stacks.Joined, "without_examples", lambda block, keep: block)


def empty_draws_skipped(patch: Patch) -> None:
    original = trainer.DPTrainerMixin.training_step

    def step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        if not inputs[microbatch.MICRO_BATCHES]:
            return torch.zeros(())
        return original(self, model, inputs, num_items_in_batch)

    patch.setattr(trainer.DPTrainerMixin, "training_step", step)


def charged_after_the_release(patch: Patch) -> None:
    original, late = Releaser.__call__, Ledger.charge
    patch.setattr(Ledger, "charge", lambda self, step_number=None: self.num_steps)

    def call(self: Releaser, *args: Any, **kwargs: Any) -> torch.Tensor:
        noisy = original(self, *args, **kwargs)
        late(self._ledger)
        return noisy

    patch.setattr(Releaser, "__call__", call)


def every_other_step_charged(patch: Patch) -> None:
    original, count = Ledger.charge, iter(range(10**6))
    patch.setattr(Ledger, "charge", lambda self: original(self) if next(count) % 2 else self.num_steps)


def epsilon_three_percent_too_small(patch: Patch) -> None:
    original = epsilon._pld_epsilon
    epsilon._spent.cache_clear()
    patch.setattr(epsilon, "_pld_epsilon", lambda *a, **k: 0.97 * original(*a, **k))


def noise_divided_by_the_processes(patch: Patch) -> None:
    """Each of 16 processes draws its part from one seed, and their mean is taken as if they were independent."""
    original = NoiseSource.gaussian
    patch.setattr(NoiseSource, "gaussian", lambda self, n, *, std, device=None: original(self, n, std=std / 16))


def noise_from_seed_42(patch: Patch) -> None:
    patch.setattr(opening, "NoiseSource", lambda key=None: NoiseSource(key=42))
