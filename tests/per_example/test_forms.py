"""Sizes that coincide with the number of examples: no gradient is taken for another one's."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hf_dp.errors import CaptureError, UnsupportedOptionError, UnsupportedParameterError
from hf_dp.per_example import losses
from hf_dp.per_example.batches import MicroBatch
from hf_dp.per_example.capture import per_example_factors
from hf_dp.per_example.compiled import CompiledBlocks
from hf_dp.per_example.forms import Forms
from hf_dp.per_example.inventory import take_inventory
from hf_dp.per_example.one_at_a_time import each_alone, tied_members
from tests.support import engine, reference
from tests.support import models as M

EXACT = 2e-6  # as in test_per_example
Batch = dict[str, Tensor]
Losses = Callable[[nn.Module, Batch], Tensor]


class _Layers(nn.Module):
    """Trained layers on x [B, 8, 4], whose values meet those that `function` makes of sizes alone."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.scale = nn.Embedding(16, 2), nn.Parameter(torch.randn(4))
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.conv, self.prompt = nn.Conv1d(4, 4, 3, stride=2), nn.Parameter(torch.randn(4))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _distances(length: int) -> Tensor:
    at = torch.arange(length)
    return (at[:, None] - at).abs()


def _biased(m: nn.Module, x: Tensor) -> Tensor:
    """Two heads, with a learned bias of distances, [T, T, heads]."""
    q = x.unflatten(-1, (2, -1)).transpose(1, 2)
    scores = q @ q.transpose(2, 3) + m.table(_distances(x.shape[1])).permute(2, 0, 1)[None]
    return (scores.softmax(-1) @ q).transpose(1, 2).flatten(2)


def _waves(rows: int, width: int) -> Tensor:
    return torch.sin(torch.arange(rows * width, dtype=torch.float64)).view(rows, width)


def _by_head(m: nn.Module, x: Tensor) -> Tensor:
    """Slopes [heads, T], through a trained scale, for two heads."""
    slopes = (_waves(2, 4) * m.scale).sum(-1)
    return m.linear(x) * slopes[None, None].repeat_interleave(2, -1)


# name -> what the layers do, and a number of examples that is also T, heads, d, ... or divides it
CASES = {
    "distances-as-long-as-the-batch": (_biased, 8),
    "distances-after-a-convolution": (lambda m, x: _biased(m, m.conv(x.transpose(1, 2)).transpose(1, 2)), 3),
    "position-table-through-a-linear-map": (lambda m, x: x + m.linear(_waves(8, 4)), 4),
    "position-table-scaled": (lambda m, x: m.linear(x + _waves(8, 4) * m.scale), 4),
    "position-table-normalised": (lambda m, x: x * m.norm(_waves(8, 4)), 8),
    "position-table-in-parts": (lambda m, x: x + m.linear(_waves(64, 4).view(8, 8, 4)).sum(1), 8),
    "heads": (_by_head, 2),
    "hidden-size": (lambda m, x: x @ m.linear(torch.eye(4, dtype=x.dtype)), 4),
    "hidden-size-times-the-examples": (lambda m, x: x @ m.linear(torch.eye(4, dtype=x.dtype)), 2),
    "positions-repeated": (lambda m, x: x * m.prompt.expand(8, 4) + m.scale.repeat(8, 1), 8),
    "flattened-examples": (lambda m, x: m.linear((2 * x).flatten(0, 1)).view_as(x), 4),
    "one-position-of-many": (lambda m, x: m.norm(m.linear(x[:, 0])) + m.scale, 8),
}


def _square(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["x"]).square().flatten(1).sum(1)


def _tokens(model: nn.Module, batch: Batch) -> Tensor:
    outputs = model(**{k: v for k, v in batch.items() if k != "labels"})
    return losses.aligned_tokens(outputs, batch["labels"])


def _case(name: str) -> tuple[nn.Module, Batch, Losses]:
    torch.manual_seed(0)
    if name == "t5":
        return M.t5().double(), M.pair_batch(7, 7), _tokens
    function, size = CASES[name]
    x = torch.randn(size, 8, 4, dtype=torch.float64)
    return _Layers(function).double(), {"x": x, "labels": x}, _square


def _slow(model: nn.Module, batch: Batch, example_losses: Losses) -> dict[str, Tensor]:
    return reference.clipped_sum(model, batch, lambda m, one: example_losses(m, one).sum(), 0.5)


@pytest.mark.parametrize("name", ["t5", *CASES])
@pytest.mark.parametrize("noted", [3, 8])
def test_a_size_that_coincides_changes_no_gradient(name: str, noted: int) -> None:
    """`noted`: on how many public examples the inventory is taken; these numbers coincide with sizes, too."""
    model, batch, example_losses = _case(name)
    public = MicroBatch(batch, len(batch["labels"])).first(noted)
    ours, _ = engine.clipped_sum(model, batch, example_losses, 0.5, engine.passes(model, public, example_losses))
    assert reference.relative_difference(ours, _slow(model, batch, example_losses)) < EXACT


def test_rows_that_cannot_have_the_form_that_was_found_are_an_error() -> None:
    model, batch, example_losses = _case("heads")
    forms = take_inventory(model, MicroBatch(batch, 2).first(3), example_losses).forms
    other = {"x": torch.randn(3, 8, 4, dtype=torch.float64)}
    longer = lambda m, b: example_losses(m, {"x": b["x"].repeat(2, 1, 1)})[:2]  # noqa: E731
    with pytest.raises(CaptureError, match=r"used by \w+ as it was not on public records"):
        per_example_factors(model, lambda: longer(model, batch), 2, forms=forms)
    with pytest.raises(CaptureError, match=r"used by \w+ as it was not on public records"):
        per_example_factors(model, lambda: example_losses(model, other), 3, forms=Forms())


def test_rows_that_are_the_examples_in_one_use_and_not_in_another_are_refused() -> None:
    model = _Layers(lambda m, x: m.linear(x[:, 0]) + m.linear(_waves(6, 4)).sum(0))
    x = torch.randn(3, 8, 4, dtype=torch.float64)
    with pytest.raises(
        UnsupportedParameterError, match=r"linear\.weight \(used by linear, on rows of which it is open"
    ):
        take_inventory(model.double(), MicroBatch({"x": x}, 3), _square)


def test_outputs_that_happen_to_have_as_many_rows_as_examples_do_not_reach_a_users_loss() -> None:
    """The mean of all examples for each of four classes, and as many examples as classes."""
    outputs = lambda size: {"logits": torch.randn(size, 4), "means": torch.randn(4), "cache": None}  # noqa: E731
    four, three = outputs(4), outputs(3)
    tied = tied_members(four, three, 4, 3)
    assert tied == {"logits"}
    assert tied_members(tuple(four.values()), tuple(three.values()), 4, 3) == {"0"}

    def loss(given: Batch, labels: Tensor) -> Tensor:
        assert given.keys() == {"logits"}
        return given["logits"][0, labels].sum()

    labels = torch.tensor([3, 0, 1, 2])
    assert torch.equal(each_alone(loss, four, labels, 4, tied), four["logits"][range(4), labels])
    with pytest.raises(CaptureError, match="expected logits of the model's outputs to have one row for each example"):
        each_alone(loss, three, labels, 4, tied)


class _Blocks(nn.Module):
    """Two blocks, whose linear layers meet two tables of positions, [2, T, d]."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4, bias=False)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x * block(_waves(16, 4).view(2, 8, 4)).sum(0)
        return x


def test_compiled_blocks_take_only_layers_that_the_examples_lead() -> None:
    model, x = _Blocks().double(), torch.randn(3, 8, 4, dtype=torch.float64)
    inventory = take_inventory(model, MicroBatch({"x": x}, 3), _square)
    assert {led for (_, operation, _), led in inventory.forms.items() if operation == "linear"} == {False}
    with pytest.raises(UnsupportedOptionError, match=r"blocks\.0\.0\.weight, blocks\.1\.0\.weight"):
        CompiledBlocks(model, inventory)
