"""A secret key, a role and two numbers -> a random stream of its own; fresh keys from the operating system.

The generator is Philox4x64-10 (Salmon et al. 2011), with a 128-bit key and a 256-bit counter of four words. Role,
number and block stand in the upper three words, so that two streams of one key never overlap; word 0 counts the outputs
of a stream. (With the counters t and t + 1 alone, the second stream would be the first one shifted by four numbers.)
Philox passes every statistical test, but it is no cipher: nobody has shown that the rest of its output stays secret
from somebody who has seen a part of it. A `ChaChaKey` takes ChaCha20 instead, which is one.
"""

import secrets
from enum import IntEnum
from typing import NamedTuple, TypeAlias

import numpy as np

from hf_dp.errors import ConfigError
from hf_dp.randomness.chacha import ChaCha20Stream

KEY_BITS = 128


class Role(IntEnum):
    """What a stream is for. Streams of different roles are disjoint even under one key, as in debugging."""

    SAMPLING = 1
    NOISE = 2
    FORWARD = 3
    CANARIES = 4


class ChaChaKey(NamedTuple):
    """128 secret bits whose streams come from ChaCha20; a plain number's come from Philox."""

    secret: int

    def __repr__(self) -> str:
        return "ChaChaKey(<secret>)"


Key: TypeAlias = int | ChaChaKey


def fresh_key() -> int:
    """128 bits from the operating system's entropy. They come from no seed, and must never be written anywhere."""
    return secrets.randbits(KEY_BITS)


def checked_key(key: Key | None) -> Key:
    """`key` itself, or a fresh one for None.

    Raises:
        ConfigError: not a whole number of at most 128 bits. The message does not show it.
    """
    if key is None:
        return fresh_key()
    secret = key.secret if isinstance(key, ChaChaKey) else key
    if isinstance(secret, bool) or not isinstance(secret, int) or not 0 <= secret < 1 << KEY_BITS:
        raise ConfigError(f"a key is a whole number from 0 to 2**{KEY_BITS} - 1; leave it out to have one drawn")
    return key


def keyed_stream(key: Key, role: Role, number: int, block: int = 0) -> np.random.Generator | ChaCha20Stream:
    """The stream of (key, role, number, block): ChaCha20 for a `ChaChaKey`, Philox for a plain number."""
    return (
        ChaCha20Stream(key.secret, role, number, block)
        if isinstance(key, ChaChaKey)
        else stream(key, role, number, block)
    )


def stream(key: int, role: Role, number: int, block: int = 0) -> np.random.Generator:
    """Philox's stream of (key, role, number, block), at its start. The same four arguments give the same stream.

    Each stream has 2**66 words of 64 bits before it would meet the next `block`. `number` and `block` are below 2**64.
    """
    counter = np.array([0, block, number, role], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
