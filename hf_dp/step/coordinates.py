"""Trained parameters in shards (FSDP2) -> which coordinates of the whole sum this process holds, and how it gets them.

The whole sum has a coordinate for each trained number, in the order of the model's parameters, and then those of noised
metrics. A shard is some rows of its parameter, so its coordinates follow one another. Each parameter's clipped sum is
formed whole, and reduced and scattered at once, so that no process holds more than a bucket of them besides its shards.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

BUCKET = 1 << 25  # numbers that are reduced together (128 MiB), unless one parameter has more
# its name from torch 2.13 on, and before
reduce_scatter: Callable[..., object] = vars(dist).get("reduce_scatter_single") or dist.reduce_scatter_tensor


class Coordinates(NamedTuple):
    """Of this process's part of a sum.

    Attributes:
        own: its coordinates in the whole, in the order of the part.
        total: how many the whole has.
        shared: how many of the last ones every process has a part of, which are still to be added up.
        copies: how many processes hold the same shards.
    """

    own: tuple[range, ...]
    total: int
    shared: int
    copies: int

    def added_up(self, of_shards: Tensor) -> Tensor:
        """The sum over all shards of a number, the same on every process; every process calls it."""
        if dist.get_world_size() > 1:
            dist.all_reduce(of_shards)
        return of_shards / self.copies


class _Place(NamedTuple):
    """A parameter in shards: its shape, the rows of a shard (padded), and those that are this process's."""

    name: str
    shape: torch.Size
    rows: int
    own: range

    @property
    def width(self) -> int:
        return math.prod(self.shape[1:])


class Shards:
    """The layout of parameters that all lie in shards.

    Args:
        parameters: by name, all of them along their first dimension on one mesh (see `sharding.problems`).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        some = cast(DTensor, next(iter(parameters.values())))
        mesh, along = some.device_mesh, next(i for i, p in enumerate(some.placements) if isinstance(p, Shard))
        self._group, self._num, self._index = mesh.get_group(along), mesh.size(along), mesh.get_local_rank(along)
        self._others = [mesh.get_group(i) for i, p in enumerate(some.placements) if isinstance(p, Replicate)]
        self._copies = mesh.size() // self._num
        self._places = [self._place(name, p) for name, p in parameters.items()]

    def _place(self, name: str, p: nn.Parameter) -> _Place:
        rows = -(-p.shape[0] // self._num)
        start, stop = (min(n * rows, p.shape[0]) for n in (self._index, self._index + 1))
        assert len(local(p)) == stop - start, f"{name} is not sharded in equal parts of its first dimension"
        return _Place(name, p.shape, rows, range(start, stop))

    def coordinates(self, extra: int) -> Coordinates:
        """Those of this process; `extra` more at the end are every process's."""
        own, first = [], 0
        for place in self._places:
            own.append(range(first + place.own.start * place.width, first + place.own.stop * place.width))
            first += place.shape.numel()
        return Coordinates((*own, range(first, first + extra)), first + extra, extra, self._copies)

    def add_reduced(self, add: Callable[[str, Tensor], None], into: Mapping[str, Tensor], device: torch.device) -> None:
        """into += this process's shards of the sum over all processes. Every process calls it as often as the others.

        Args:
            add: (name, whole) adds what this process has of a parameter to a tensor of its whole shape.
            into: name -> this process's rows, float32.
            device: where the sums are formed.
        """
        for bucket in self._buckets():
            sizes = [place.rows * place.width for place in bucket]
            sums = torch.zeros(self._num, sum(sizes), device=device)
            for place, part in zip(bucket, sums.split(sizes, 1), strict=True):
                whole = torch.zeros(self._num * place.rows, *place.shape[1:], device=device)
                add(place.name, whole[: place.shape[0]])
                part.copy_(whole.view(self._num, -1))
            own = self._scattered(sums)
            for place, part in zip(bucket, own.split(sizes), strict=True):
                into[place.name].view(-1).add_(part[: len(place.own) * place.width])

    def _scattered(self, sums: Tensor) -> Tensor:
        """[shards, n] -> this process's row of the sum over all processes, [n]."""
        own = torch.empty_like(sums[0])
        if self._num > 1:
            reduce_scatter(own, sums.view(-1), group=self._group)
        else:
            own.copy_(sums[0])
        for group in self._others:
            dist.all_reduce(own, group=group)
        return own

    def _buckets(self) -> Iterator[list[_Place]]:
        bucket: list[_Place] = []
        for place in self._places:
            if bucket and sum(p.shape.numel() for p in (*bucket, place)) > BUCKET:
                yield bucket
                bucket = []
            bucket.append(place)
        yield bucket


def local(p: Tensor) -> Tensor:
    """This process's part of a parameter in shards; any other whole."""
    return p.to_local() if isinstance(p, DTensor) else p


def as_gradient(part: Tensor, p: nn.Parameter) -> Tensor:
    """What `p.grad` may be, of this process's part of it."""
    part = part.to(local(p).device, p.dtype)
    if not isinstance(p, DTensor):
        return part
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
