"""Memory that nothing has written: a pass over one example finds zeros in it, not what others left there."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hf_dp.per_example.capture import per_example_factors
from hf_dp.per_example.new_memory import zeros_in_new_memory

N = 50_000  # numbers: more than an allocator has lying about
WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "empty": lambda x: torch.empty(N),
    "empty_like": lambda x: torch.empty_like(x.expand(N)),
    "empty_strided": lambda x: torch.empty_strided((N,), (1,)),
    "empty_permuted": lambda x: torch.empty_permuted((N, 1), (0, 1)),
    "new_empty": lambda x: x.new_empty(N),
    "new_empty_strided": lambda x: x.new_empty_strided((N,), (1,)),
    "new": lambda x: x.new(N),
    "new of a size": lambda x: x.new(torch.Size([N])),
    "resize_": lambda x: torch.zeros(1).resize_(N),
    "resize_as_": lambda x: torch.zeros(1).resize_as_(x.expand(N)),
}


def leave_numbers() -> None:
    """Frees memory that holds other numbers than zero."""
    kept = [torch.full((N,), float("inf")) for _ in range(4)]
    del kept


@pytest.mark.parametrize("way", WAYS)
def test_new_memory_holds_zeros(way: str) -> None:
    x = torch.ones(1)
    with zeros_in_new_memory():
        for _ in range(3):
            leave_numbers()
            assert not WAYS[way](x).any()


def test_what_was_written_stays() -> None:
    with zeros_in_new_memory():
        assert torch.ones(3).resize_(5).tolist() == [1, 1, 1, 0, 0]
        assert torch.ones(5).resize_(3).tolist() == [1, 1, 1]
        assert torch.ones(2).new([1.0, 2.0]).tolist() == [1, 2]
        assert torch.ones(2).new(torch.tensor([3.0])).tolist() == [3]
        assert torch.empty(2, requires_grad=True).requires_grad


class Careless(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + torch.empty(N)[:1] * 0


def test_a_pass_over_one_example_reads_nothing_that_another_left() -> None:
    model, x = Careless(2, 1), torch.ones(1, 2)
    for _ in range(3):
        leave_numbers()
        factors, losses = per_example_factors(model, lambda: model(x)[:, 0], 1)
        assert losses.isfinite().all()
        assert torch.equal(factors["weight"][0].gradient, x.unsqueeze(0))
