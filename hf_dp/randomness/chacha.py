"""A secret key and an address -> a stream of random words from ChaCha20, and uniform and normal numbers made of them.

ChaCha20 (Bernstein 2008; RFC 8439) is a cipher: as far as is known, somebody who has seen any part of its output but
not the key cannot tell the rest from chance. The implementation is OpenSSL's, through the library `cryptography`, an
optional dependency.

The 256-bit key is the SHA-256 of the 128 secret bits. The 96-bit nonce is the stream's address: role (8 bits), number
(48) and block (40). So two addresses share no output, and each stream has 2**35 words of 64 bits.
"""

import hashlib
from types import ModuleType
from typing import Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hf_dp.errors import ConfigError

WORDS = 1 << 35  # in one stream; then the cipher's 32-bit counter would start again
INSTALL = "pip install 'hf_dp[chacha20]'"


class Cipher(Protocol):
    """An encryptor of `cryptography`."""

    def update(self, data: bytes) -> bytes:
        """The data, encrypted with the next part of the key stream."""


class ChaCha20Stream:
    """The stream of (key, role, number, block), from its start. Methods are named as those of `numpy.random.Generator`.

    Raises:
        ConfigError: `cryptography` is not installed, or a number or block does not fit into its bits of the nonce.
    """

    def __init__(self, key: int, role: int, number: int, block: int = 0) -> None:
        ciphers = require_cryptography()
        try:
            nonce = role.to_bytes(1, "little") + number.to_bytes(6, "little") + block.to_bytes(5, "little")
        except OverflowError as error:
            raise ConfigError("a ChaCha20 stream's number is below 2**48, its block below 2**40") from error
        secret = hashlib.sha256(b"hf_dp ChaCha20" + key.to_bytes(16, "little")).digest()
        start = bytes(4)  # the cipher's own counter
        self._cipher: Cipher = ciphers.Cipher(ciphers.algorithms.ChaCha20(secret, start + nonce), mode=None).encryptor()
        self._left = WORDS

    def words(self, count: int) -> NDArray[np.uint64]:
        """The next `count` words of 64 random bits."""
        if count > self._left:
            raise ConfigError(f"a ChaCha20 stream has {self._left} words left, asked for {count}: take another block")
        self._left -= count
        return np.frombuffer(self._cipher.update(bytes(8 * count)), dtype="<u8")

    def random(self, size: int) -> NDArray[np.float64]:
        """Uniforms in [0, 1), multiples of 2**-53, one a word."""
        return (self.words(size) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def standard_normal(self, *, dtype: DTypeLike, out: NDArray[np.float32]) -> None:
        """Fills `out` with N(0, 1): Box and Muller (1958) in float64, rounded to `dtype`; values up to 9.4.

        Two normals take two words: r = sqrt(-2 log u) with a u in (0, 1] of 64 bits, and an angle of 53 bits.
        """
        pairs = -(-len(out) // 2)
        radius = np.sqrt(-2.0 * np.log((self.words(pairs).astype(np.float64) + 1.0) * 2.0**-64))
        angle = 2.0 * np.pi * self.random(pairs)
        out[:pairs] = (radius * np.cos(angle)).astype(dtype)
        out[pairs:] = (radius * np.sin(angle))[: len(out) - pairs].astype(dtype)


def require_cryptography() -> ModuleType:
    """The module `ciphers` of the library `cryptography`.

    Raises:
        ConfigError: the library is not installed; says how to get it.
    """
    try:
        from cryptography.hazmat.primitives import ciphers
    except ImportError as error:
        raise ConfigError(
            f"random bits from ChaCha20 need the library cryptography, which is not installed: {INSTALL}, or choose "
            "noise='gaussian', whose bits come from numpy's Philox"
        ) from error
    return ciphers
