"""A number of coordinates and a standard deviation -> fresh noise under a secret key: Gaussian in float32, or discrete.

With Philox, normals come from numpy's ziggurat (Marsaglia and Tsang 2000): float32, 23 random bits within each of 256
layers, values up to 8.2 standard deviations. With ChaCha20 they come from Box-Muller in float64, rounded to float32;
on a CUDA device they are made there (`on_device`).
The privacy analysis of both assumes exact arithmetic: no claim is made against attacks on floating-point noise (Mironov
2012), as for any floating-point noise without a proof against them. `NoiseSource.discrete` draws whole numbers instead,
and has such a proof (see `grid` and `discrete`).
"""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from hf_dp.errors import ConfigError, HfDpError
from hf_dp.randomness.chacha import ChaCha20Stream
from hf_dp.randomness.discrete import discrete_gaussian
from hf_dp.randomness.streams import ChaChaKey, Key, Role, checked_key, keyed_stream

if TYPE_CHECKING:  # importing torch takes seconds, and who only reads ledgers draws no noise
    import torch
    from torch import Tensor

BLOCK = 1 << 18  # normals of one stream: a block has its own, so that threads do not change the result
SMALLEST_STD, LARGEST_STD = 1e-30, 1e30  # beyond them float32 would round the noise to nothing or to infinity


class NoiseSource:
    """Independent Gaussian noise, from a new stream at every call.

    Guarantee: no two calls of one source, and no two sources, share a stream; no seed of torch, numpy or Python has any
    influence. The key is never shown or pickled. A forked copy of the process refuses to draw, because it would repeat
    its parent's noise.

    Args:
        key: 128 secret bits, for Philox, or a `ChaChaKey`. None draws bits for Philox from the operating system. A
            fixed key is for tests: its noise protects nothing.

    Raises:
        ConfigError: not a 128-bit whole number.
    """

    def __init__(self, *, key: Key | None = None) -> None:
        self._key = checked_key(key)
        self._numbers = itertools.count()
        self._process = os.getpid()

    def gaussian(self, numel: int, *, std: float, device: "torch.device | str | None" = None) -> "Tensor":
        """N(0, std² I), float32, [numel], on `device`; zeros for std = 0.

        The noise is drawn on the CPU, in threads, and copied; with a `ChaChaKey`, it is made on a CUDA device itself.
        Its values depend on the key and on the number of the call, not on the number of threads, nor on the device but
        for float32's last bit (see `on_device`).

        Raises:
            ConfigError: std negative, not finite, or beyond float32; numel negative.
            HfDpError: in a forked copy of the process that made the source; or as `on_device.gaussian`.
        """
        _check(numel, std)
        import torch

        from hf_dp.randomness import on_device

        number = self._next_number()
        if std == 0:
            return torch.zeros(numel, dtype=torch.float32, device=device)
        there = torch.device("cpu" if device is None else device)
        if isinstance(self._key, ChaChaKey) and there.type in on_device.DEVICES:
            made = on_device.gaussian(self._key.secret, Role.NOISE, number, numel, BLOCK, there)
            return made.mul_(float(np.float32(std)))
        values = np.empty(numel, dtype=np.float32)

        def fill(block: int) -> None:
            part = values[block * BLOCK : (block + 1) * BLOCK]
            keyed_stream(self._key, Role.NOISE, number, block).standard_normal(dtype=np.float32, out=part)
            part *= np.float32(std)

        _for_each(range(-(-numel // BLOCK)), fill)
        return torch.from_numpy(values).to(device)

    def gaussian_at(
        self, coordinates: Sequence[range], numel: int, *, std: float, device: "torch.device | str | None" = None
    ) -> "Tensor":
        """What `gaussian(numel, ...)` would give at these coordinates, one range after the other, float32.

        It is the call of a number as well. So sources with one key, each with coordinates of its own, together give one
        N(0, std² I), however many they are; and two of them give the same at the same coordinate.

        Raises:
            ConfigError, HfDpError: as `gaussian`; or a coordinate is not below numel, or a range has another step.
        """
        _check(numel, std)
        if any(r.step != 1 or (r and not 0 <= r.start < r.stop <= numel) for r in coordinates):
            raise ConfigError(f"noise at coordinates needs ranges within range({numel}), got {coordinates}")
        import torch

        from hf_dp.randomness import on_device

        number, there = self._next_number(), torch.device("cpu" if device is None else device)
        values = torch.zeros(sum(map(len, coordinates)), dtype=torch.float32, device=there)

        def fill(block: int) -> None:
            length = min(BLOCK, numel - block * BLOCK)
            if isinstance(self._key, ChaChaKey) and there.type in on_device.DEVICES:
                made = on_device.gaussian_block(self._key.secret, Role.NOISE, number, block, length, there)
            else:
                drawn = np.empty(length, dtype=np.float32)
                keyed_stream(self._key, Role.NOISE, number, block).standard_normal(dtype=np.float32, out=drawn)
                made = torch.from_numpy(drawn)
            for place, inside in pieces[block]:
                values[place.start : place.stop] = (made[inside.start : inside.stop] * float(np.float32(std))).to(there)

        pieces = _by_block(coordinates)
        if std > 0:
            _for_each(pieces, fill)
        return values

    def discrete(self, numel: int, *, device: "torch.device | str | None" = None) -> "Tensor":
        """N_Z(0, S²) in each of `numel` coordinates, S = `grid.STD`, int64, on `device`. Drawn on the CPU, in threads.

        Raises:
            ConfigError: the key is not a `ChaChaKey`.
            HfDpError: in a forked copy of the process that made the source.
        """
        import torch

        number = self._next_number()
        values = np.empty(numel, dtype=np.int64)

        def fill(block: int) -> None:
            stream = keyed_stream(self._key, Role.NOISE, number, block)
            if not isinstance(stream, ChaCha20Stream):
                raise ConfigError("discrete noise takes its random bits from ChaCha20: give a ChaChaKey")
            part = values[block * BLOCK : (block + 1) * BLOCK]
            part[:] = discrete_gaussian(stream.words, len(part))

        _for_each(range(-(-numel // BLOCK)), fill)
        return torch.from_numpy(values).to(device)

    def _next_number(self) -> int:
        if os.getpid() != self._process:
            raise HfDpError(
                "this noise source belongs to the parent process, whose noise it would repeat: make one here"
            )
        return next(self._numbers)

    def __repr__(self) -> str:
        return "NoiseSource(key=<secret>)"

    def __reduce__(self) -> str:
        raise HfDpError("a NoiseSource holds a secret key and is not pickled or copied: make one where it is used")


def _check(numel: int, std: float) -> None:
    if numel < 0 or not (std == 0 or (math.isfinite(std) and SMALLEST_STD <= std <= LARGEST_STD)):
        raise ConfigError(
            f"noise needs numel >= 0 and std 0 or from {SMALLEST_STD} to {LARGEST_STD} (got numel={numel}, std={std})"
        )


def _by_block(coordinates: Iterable[range]) -> dict[int, list[tuple[range, range]]]:
    """Block -> its pieces that are wanted: (places in the result, places in the block)."""
    pieces: dict[int, list[tuple[range, range]]] = {}
    done = 0
    for wanted in coordinates:
        for block in range(wanted.start // BLOCK, -(-wanted.stop // BLOCK) if wanted else 0):
            start, stop = max(wanted.start, block * BLOCK), min(wanted.stop, (block + 1) * BLOCK)
            place = range(done + start - wanted.start, done + stop - wanted.start)
            pieces.setdefault(block, []).append((place, range(start - block * BLOCK, stop - block * BLOCK)))
        done += len(wanted)
    return pieces


def _for_each(blocks: Iterable[int], fill: Callable[[int], None]) -> None:
    import torch

    blocks = list(blocks)
    with ThreadPoolExecutor(max(1, min(len(blocks), torch.get_num_threads()))) as pool:
        list(pool.map(fill, blocks))
