"""A secret key, a role and numbers -> a random stream that nothing else shares; fresh keys from the operating system.

The generator is Philox4x64-10 (Salmon et al. 2011) with a 128-bit key and a 256-bit counter of four words. Roles and
numbers stand in the upper words, so that two streams of one key can never run into each other: word 0 counts the blocks
of a stream. (Philox with counters t and t + 1 alone would give the same numbers four places apart.) Philox passes every
statistical test, but is no cipher: it was not made to keep the rest of its output secret from who has seen a part. A
`ChaChaKey` takes ChaCha20 instead.
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
    """128 bits from the operating system's entropy. Never from a seed, and never to be written anywhere."""
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
    """The stream of (key, role, number, block), from the generator that the key is for."""
    return (
        ChaCha20Stream(key.secret, role, number, block)
        if isinstance(key, ChaChaKey)
        else stream(key, role, number, block)
    )


def stream(key: int, role: Role, number: int, block: int = 0) -> np.random.Generator:
    """Philox's stream of (key, role, number, block), at its start. Stateless: the same four give the same stream.

    Each stream has 2**66 words of 64 bits before it would meet the next `block`. `number` and `block` are below 2**64.
    """
    counter = np.array([0, block, number, role], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
