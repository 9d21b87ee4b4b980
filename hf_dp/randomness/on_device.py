"""A ChaCha20 key and an address -> N(0, 1) made where a sum lies, by torch's operations, with nothing to copy there.

The words are those of `chacha.ChaCha20Stream`, bit by bit, at the same addresses, for many streams at once. Normals are
made of them by the same formula in float64. log, cos and sin may differ in a last bit between devices, and so may a
normal, once in many. Bits stand in int32, whose sums wrap, since torch has few operations on unsigned numbers.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from hf_dp.errors import HfDpError
from hf_dp.randomness.chacha import ChaCha20Stream

DEVICES = "cuda", "meta"  # with float64; on CPUs OpenSSL is faster
AT_ONCE = 8  # streams: launches against memory, about 150 MB with blocks of 2**18 normals
TURNS = 16, 12, 8, 7  # of a quarter round, in bits
LOW = 0xFFFFFFFF


def words(key: int, role: int, number: int, streams: range, blocks: int, device: torch.device | str) -> Tensor:
    """The cipher's first `blocks` blocks in each stream (key, role, number, block), int32 [streams, blocks, 16]."""
    secret = hashlib.sha256(b"hf_dp ChaCha20" + key.to_bytes(16, "little")).digest()
    fixed = np.frombuffer(b"expand 32-byte k" + secret, dtype="<i4").reshape(3, 4, 1)
    own = torch.tensor(fixed.copy(), device=device)
    shape = len(streams), blocks
    block = torch.arange(streams.start, streams.stop, dtype=torch.int64, device=device)[:, None].expand(shape)
    counter = torch.arange(blocks, dtype=torch.int64, device=device).expand(shape)
    low = torch.full(shape, role | (number & 0xFFFFFF) << 8, dtype=torch.int64, device=device)
    middle = (number >> 24) | (block & 0xFF) << 24
    last = torch.stack([w.reshape(-1) for w in (counter, low, middle, block >> 8)]).to(torch.int32)
    start = *(row.expand(4, last.shape[1]) for row in own), last
    rows = list(start)
    for _ in range(10):
        _round(rows)
        rows[1:] = [torch.cat((row[by:], row[:by])) for row, by in zip(rows[1:], (1, 2, 3), strict=True)]
        _round(rows)
        rows[1:] = [torch.cat((row[by:], row[:by])) for row, by in zip(rows[1:], (3, 2, 1), strict=True)]
    made = torch.cat([row + first for row, first in zip(rows, start, strict=True)]).t().contiguous().view(*shape, 16)
    own.zero_()  # the key
    return made


def _round(rows: list[Tensor]) -> None:
    """Four quarter rounds side by side (RFC 8439, section 2.1), on rows a, b, c, d, int32 [4, blocks]."""
    for (into, plus, turned), by in zip(((0, 1, 3), (2, 3, 1), (0, 1, 3), (2, 3, 1)), TURNS, strict=True):
        rows[into] = rows[into] + rows[plus]
        mixed = rows[turned] ^ rows[into]
        rows[turned] = (mixed << by) | ((mixed >> (32 - by)) & ((1 << by) - 1))


def standard_normal(key: int, role: int, number: int, streams: range, length: int, device: torch.device) -> Tensor:
    """The first `length` normals of each stream, float32 [streams, length]; as `ChaCha20Stream.standard_normal`."""
    pairs = -(-length // 2)
    bits = words(key, role, number, streams, -(-pairs // 4), device).reshape(len(streams), -1)[:, : 4 * pairs]
    low, high = (bits.reshape(len(streams), 2, pairs, 2).to(torch.int64) & LOW).unbind(-1)
    radius = torch.sqrt(-2.0 * torch.log((high[:, 0].double() * 2.0**32 + low[:, 0].double() + 1.0) * 2.0**-64))
    angle = 2.0 * torch.pi * (((high[:, 1] << 21) | (low[:, 1] >> 11)).double() * 2.0**-53)
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)[:, :length].to(torch.float32)


def gaussian(key: int, role: int, number: int, numel: int, block: int, device: torch.device) -> Tensor:
    """N(0, 1), float32 [numel] on `device`: `block` normals of each of the streams 0, 1, ...

    Raises:
        HfDpError: what the device makes of a public key is not what the CPU makes of it.
    """
    _check(device)
    made, whole = torch.empty(numel, dtype=torch.float32, device=device), numel // block
    for first in range(0, whole, AT_ONCE):
        streams = range(first, min(first + AT_ONCE, whole))
        part = made[first * block : streams.stop * block]
        part.view(len(streams), block).copy_(standard_normal(key, role, number, streams, block, device))
    if rest := numel - whole * block:
        made[whole * block :] = standard_normal(key, role, number, range(whole, whole + 1), rest, device)[0]
    return made


def gaussian_block(key: int, role: int, number: int, block: int, length: int, device: torch.device) -> Tensor:
    """The first `length` normals of one stream, float32 [length]; raises as `gaussian`."""
    _check(device)
    return standard_normal(key, role, number, range(block, block + 1), length, device)[0]


_checked: set[torch.device] = set()


def _check(device: torch.device) -> None:
    """Compares the device with the CPU, once: a public key's words bit by bit, its normals to float32's last bits."""
    if device in _checked or device.type == "meta":
        return
    address, count = (1, 2, 3 << 30, 5 << 20), 1 << 12
    made = words(*address[:3], range(address[3], address[3] + 1), count // 8, device).flatten().cpu().numpy()
    normal = standard_normal(*address[:3], range(address[3], address[3] + 1), count, device)[0].cpu().numpy()
    expected = np.empty(count, dtype=np.float32)
    ChaCha20Stream(*address).standard_normal(dtype=np.float32, out=expected)
    same = np.array_equal(made.view("<u8"), ChaCha20Stream(*address).words(count))
    if not same or not np.allclose(normal, expected, rtol=1e-6, atol=1e-6):  # 8 units of float32's last place
        raise HfDpError(
            f"ChaCha20 on {device} does not give what it gives on the CPU, so its noise can't be trusted: set "
            "noise='gaussian', which is drawn on the CPU, and report it with the versions of torch and the driver"
        )
    _checked.add(device)
