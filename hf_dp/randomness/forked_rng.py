"""Code that draws from the process's global generators -> the same code under fresh secret states, put back afterwards.

Dropout masks, augmentations and masked tokens come from the global generators. `args.seed`, which is public, sets them,
and they hand out their numbers in the order of a batch: if one record is removed, all records after it get other masks,
and the sum moves by several clip norms instead of one. If the states are secret instead, and independent of each other,
the masks of the other records keep their distribution, and the guarantee holds for the mixture over masks. Putting the
global states back also hides how many numbers were drawn, which would tell the size of the batch.
"""

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import numpy as np

from hf_dp.errors import HfDpError
from hf_dp.randomness.streams import Role, fresh_key, stream

if TYPE_CHECKING:
    import torch

WORDS = 624  # 32-bit words in the state of a Mersenne Twister


@contextmanager
def fork_forward_rng(devices: Iterable["torch.device | str"] = (), *, seed: int | None = None) -> Iterator[None]:
    """Runs its body under fresh states of torch's (CPU and `devices`), numpy's and Python's global generators.

    The states come from 128 bits of the operating system's entropy, or, in debugging alone, from `seed`. All generators
    stand afterwards where they stood before, after an exception too.
    """
    import torch

    key = stream(fresh_key() if seed is None else seed, Role.FORWARD, 0)
    others = [device for device in map(torch.device, devices) if device.type != "cpu"]
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with ExitStack() as restored:
        restored.callback(np.random.set_state, numpy_state)
        restored.callback(random.setstate, python_state)
        restored.enter_context(torch.random.fork_rng(devices=[], device_type="cpu"))
        for device in others:
            restored.enter_context(torch.random.fork_rng(devices=[device], device_type=device.type))
            state = torch.Generator(device).manual_seed(int(key.integers(1 << 63))).get_state()
            torch.get_device_module(device.type).set_rng_state(state, device)
        torch.set_rng_state(_cpu_state(_words(key)))
        np.random.seed(_words(key))
        random.seed(int(key.integers(1 << 63)) << 64 | int(key.integers(1 << 63)))
        yield


def _words(key: np.random.Generator) -> "np.ndarray[tuple[int], np.dtype[np.uint32]]":
    return key.integers(1 << 32, size=WORDS, dtype=np.uint32)


def _cpu_state(words: "np.ndarray[tuple[int], np.dtype[np.uint32]]") -> "torch.Tensor":
    """A state of torch's CPU generator with all 624 words secret: `manual_seed` would keep 32 bits of a seed.

    Raises:
        HfDpError: torch lays its state out in another way than since its first releases.
    """
    import torch

    state = (
        torch.Generator().manual_seed(0).get_state()
    )  # seed, (left, seeded), next, 624 words of 8 bytes, cached normals
    if state.numel() != 5056:
        raise HfDpError(f"torch {torch.__version__}: expected a CPU generator state of 5056 bytes, got {state.numel()}")
    state.view(torch.int64)[3 : 3 + WORDS] = torch.from_numpy(words.astype(np.int64))
    return state
