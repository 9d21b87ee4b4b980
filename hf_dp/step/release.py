"""Each process's part of a clipped sum -> the noisy sum, on every process: the one exit for everything private.

The order of a release is its guarantee:

1. Public things (arguments, the ledger's settings, the draw's number) are checked. An error here costs nothing.
2. The step is charged, on disk.
3. Only now is the sum looked at. That a sum is not finite tells something about the data, so the draw must be charged
   before anybody can see the training stop for it.
4. Noise is added. Only then does anything leave the process.
"""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from hf_dp.errors import HfDpError, ReleaseError
from hf_dp.ledger import Ledger
from hf_dp.mechanism import DISCRETE
from hf_dp.randomness import NoiseSource
from hf_dp.step.coordinates import Coordinates

EXACT = 1 << 24  # float32 holds whole numbers up to here exactly


class Releaser:
    """Releases sums under the Gaussian mechanism: `releaser(clipped_sum, sensitivity=C, noise_multiplier=sigma)`.

    Process 0 charges the ledger and adds the whole noise, N(0, (sigma C)² I), to its part. One `all_reduce(SUM)` on
    every process follows. So the total noise does not depend on the number of processes, and all processes hold the
    same bits. A sum of whole numbers (int64) is in steps of `randomness.grid`; it gets N_Z(0, S²) in each coordinate
    instead, where S steps are sigma C.

    The same `all_reduce` carries three more numbers. The draw's number and its square show whether all W processes are
    at one draw: with tags t_w, W sum(t_w²) = (sum t_w)² only if all t_w are equal. The third is a mark of failure: a
    process that cannot go on still takes part, with zeros, so that all processes stop at this step and none waits for
    another.

    Args:
        ledger: open, with the settings of the steps begun. On process 0; None elsewhere.
        noise: on process 0; None elsewhere, but of shards, where every process has one of the same key.
        process_index: this process, from 0.
        num_processes: how many take part.

    Raises:
        ReleaseError: process 0 without ledger or noise.
    """

    def __init__(
        self, ledger: Ledger | None, noise: NoiseSource | None, *, process_index: int = 0, num_processes: int = 1
    ) -> None:
        if not 0 <= process_index < num_processes:
            raise ReleaseError(f"expected a process_index from 0 to {num_processes - 1}, got {process_index}")
        if process_index == 0 and (ledger is None or noise is None):
            raise ReleaseError("process 0 charges and adds the noise: it needs a ledger and a noise source")
        self._ledger = ledger
        self._noise = noise
        self._process_index = process_index
        self._num_processes = num_processes
        self._last_draw = -1

    @torch.no_grad()
    def __call__(
        self, clipped_sum: Tensor, *, sensitivity: float, noise_multiplier: float, draw_number: int | None = None
    ) -> Tensor:
        """The sum of all processes' `clipped_sum` plus N(0, (sensitivity x noise_multiplier)² I).

        Args:
            clipped_sum: this process's part, [P]: float32, or int64 if the ledger's noise is "discrete". Zeros for an
                empty slice. It is left as it was.
            sensitivity: the most, in Euclidean norm, that one privacy unit can move the sum of all parts.
            noise_multiplier: sigma. 0 adds nothing, and is charged as such: epsilon is infinite.
            draw_number: number of the draw behind the sum, above every earlier one; None counts the calls.

        Returns:
            [P] of the same type, new memory, the same on every process. No two calls have noise in common.

        Raises:
            ReleaseError: an argument is out of range; the ledger has other settings; the draw was released before; the
                processes are at different draws; another process failed. Not charged if process 0 sees it before
                charging.
            ReleaseError: the sum is not finite, which is a fault of the per-example stage. Charged; nothing left the
                process.
            LedgerError: the charge could not be written. Nothing left the process.
        """
        number = self._last_draw + 1 if draw_number is None else draw_number
        size = clipped_sum.numel()
        buffer = clipped_sum.new_zeros(size + 3)
        failure: Exception | None = None
        try:
            self._check(clipped_sum, sensitivity, noise_multiplier, number)
            self._fill(buffer[:size], clipped_sum, sensitivity, noise_multiplier)
        except Exception as error:  # of any kind: the other processes are told before it is raised
            failure = error
            buffer.zero_()
        self._reduce_marked(buffer, number, failure)
        return buffer[:size]

    @torch.no_grad()
    def of_shards(
        self,
        own_sum: Tensor,
        coordinates: Coordinates,
        *,
        sensitivity: float,
        noise_multiplier: float,
        draw_number: int | None = None,
    ) -> Tensor:
        """As a call, where each process holds shards of the sum over all processes: its shards of the noisy sum.

        Each process adds the noise of its coordinates, from a source with the key of all others. Process 0 has charged
        before: the `all_reduce`, which carries the coordinates that all processes hold too, comes first.

        Args:
            own_sum: this process's shards, float32, and its part of the shared coordinates. It is left as it was.
            coordinates: of `own_sum` in the whole.
            sensitivity, noise_multiplier, draw_number: as in a call.

        Raises:
            ReleaseError, LedgerError: as in a call.
        """
        number = self._last_draw + 1 if draw_number is None else draw_number
        shared = coordinates.shared
        buffer, failure = own_sum.new_zeros(shared + 3), None
        try:
            if self._noise is None or own_sum.dtype != torch.float32:
                raise ReleaseError("a release of shards needs a noise source on every process, and a float32 sum")
            self._check(own_sum, sensitivity, noise_multiplier, number)
            self._charge_and_look(own_sum)
            buffer[:shared] = own_sum[len(own_sum) - shared :]
        except Exception as error:  # of any kind: the other processes are told before it is raised
            failure = error
            buffer.zero_()
        self._reduce_marked(buffer, number, failure)
        assert self._noise is not None
        std, own = sensitivity * noise_multiplier, coordinates.own
        noise = self._noise.gaussian_at(own, coordinates.total, std=std, device=own_sum.device)
        return torch.cat((own_sum[: len(own_sum) - shared], buffer[:shared])) + noise

    def abandon(self, clipped_sum: Tensor, *, tell: bool = True) -> None:
        """Gives up this step, and charges it on process 0: that any process fails tells something about the draw.

        Args:
            clipped_sum: gives the shape of the release.
            tell: take part in the step's `all_reduce`, with nothing but the mark of failure, so that all processes stop
                here.
        """
        try:
            if self._ledger is not None:
                self._ledger.charge()
        finally:
            if tell:
                buffer = clipped_sum.new_zeros(len(clipped_sum) + 3)
                buffer[-1] = 1.0
                self._reduce(buffer)

    def _reduce_marked(self, buffer: Tensor, number: int, failure: Exception | None) -> None:
        """Adds `buffer` up over all processes, with the three marks in its last places; raises what they tell."""
        tag = number % _modulus(self._num_processes)
        buffer[-3:] = torch.tensor([tag, tag * tag, failure is not None])
        self._reduce(buffer)
        if failure is not None:
            raise failure
        self._check_together(tag, *buffer[-3:].tolist())

    def _reduce(self, buffer: Tensor) -> None:
        """The one collective operation of a step.

        Raises:
            ReleaseError: another process has ended, or did not come within the time-out.
        """
        if self._num_processes == 1 or self._num_processes != _world_size():
            return
        try:
            dist.all_reduce(buffer)
        except RuntimeError as error:
            raise ReleaseError(
                f"process {self._process_index} of {self._num_processes} lost another one in this step: it has ended, "
                "or did not come within the time-out (ddp_timeout); see its messages. The step is charged, nothing "
                "was released. Mend what ended it and go on with resume_from_checkpoint=True, on as many processes as "
                f"you like ({error})"
            ) from error

    def _fill(self, buffer: Tensor, clipped_sum: Tensor, sensitivity: float, noise_multiplier: float) -> None:
        """Charges on process 0; then adds this process's part, and on process 0 the noise, to `buffer`."""
        std = sensitivity * noise_multiplier
        self._charge_and_look(clipped_sum)
        buffer += clipped_sum
        if self._process_index == 0 and std > 0:
            assert self._noise is not None
            if buffer.dtype == torch.int64:
                buffer += self._noise.discrete(len(buffer), device=buffer.device)
            else:
                buffer += self._noise.gaussian(len(buffer), std=std, device=buffer.device)

    def _charge_and_look(self, clipped_sum: Tensor) -> None:
        """Charges on process 0; then an error if the sum is not finite."""
        if self._process_index == 0:
            assert self._ledger is not None
            self._ledger.charge()
        if not bool(clipped_sum.isfinite().all()):
            raise ReleaseError(
                "the clipped sum is not finite, although examples that are not count as zero: a fault of the "
                "per-example stage. The step is charged, nothing was released; report it"
            )

    def _check(self, clipped_sum: Tensor, sensitivity: float, noise_multiplier: float, number: int) -> None:
        wrong = [*_wrong_arguments(clipped_sum, sensitivity, noise_multiplier), *self._wrong_state(number)]
        if not wrong and self._ledger is not None:
            current = self._ledger.current
            charged = current and (current.joint_noise_multiplier, current.sensitivity)
            if charged != (noise_multiplier, sensitivity):
                wrong.append(
                    f"the ledger would charge (sigma, C) = {charged}, the release has "
                    f"{(noise_multiplier, sensitivity)}: begin a segment"
                )
            if current and (current.noise == DISCRETE) != (clipped_sum.dtype == torch.int64):
                wrong.append(f"the ledger would charge noise {current.noise!r}, the sum is {clipped_sum.dtype}")
        if wrong:
            raise ReleaseError("nothing was charged or released: " + "; ".join(wrong))
        self._last_draw = number

    def _wrong_state(self, number: int) -> Iterator[str]:
        if number <= self._last_draw:
            yield (
                f"expected a draw after number {self._last_draw}, got {number}: two releases of one draw cost more "
                "than two charges say"
            )
        if self._num_processes != _world_size():
            yield f"expected {self._num_processes} processes in torch.distributed, found {_world_size()}"

    def _check_together(self, tag: int, tags: float, squares: float, failures: float) -> None:
        if failures:
            raise ReleaseError(
                f"{int(failures)} of {self._num_processes} processes could not release this step; see their messages"
            )
        if (tags, squares) != (self._num_processes * tag, self._num_processes * tag * tag):
            raise ReleaseError(
                "the processes are at different draws, so their parts don't belong together; they must all have read "
                "the same batches"
            )


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _wrong_arguments(clipped_sum: Tensor, sensitivity: float, noise_multiplier: float) -> Iterator[str]:
    if clipped_sum.dim() != 1 or clipped_sum.dtype not in (torch.float32, torch.int64):
        yield f"expected a flat float32 or int64 sum, got {clipped_sum.dtype} {list(clipped_sum.shape)}"
    if not (math.isfinite(sensitivity) and sensitivity > 0):
        yield f"expected a finite sensitivity above 0, got {sensitivity}"
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        yield f"expected a finite noise_multiplier, 0 or more, got {noise_multiplier}"


def _modulus(num_processes: int) -> int:
    """The modulus of the draw's number in the `all_reduce`: the largest power of two m whose sums are exact in float32.

    That is num_processes x (m - 1)² <= 2**24: m is 4096 for one process, and 2 for 2**24 processes.
    """
    if num_processes > EXACT:
        raise HfDpError(f"expected at most {EXACT} processes, got {num_processes}")
    return 1 << int(math.log2(EXACT // num_processes) / 2)
