"""The inventory lists every trainable parameter once, with its use and form, and names all that have none."""

import pytest
import torch
from torch import Tensor, nn

from hf_dp.errors import UnsupportedParameterError
from hf_dp.per_example import losses
from hf_dp.per_example.batches import MicroBatch
from hf_dp.per_example.inventory import take_inventory
from tests.support import models as M


def lm_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return losses.causal_lm(model(input_ids=batch["input_ids"]), batch["labels"])


def test_every_trainable_parameter_has_one_row_with_its_use_and_form() -> None:
    model = M.gpt2()
    rows = take_inventory(model, MicroBatch(M.token_batch(), 3), lm_loss)
    assert [r.parameter for r in rows] == [n for n, p in model.named_parameters() if p.requires_grad]
    found = {r.parameter: (r.shape, r.operations, r.rule) for r in rows}
    assert found["transformer.wte.weight"] == (
        (M.VOCAB, 16),
        "embedding, linear",
        "factored (Gram norm, book-keeping) + factored (rows of a table)",
    )
    assert found["transformer.h.0.attn.c_attn.weight"][1] == "addmm"
    assert found["transformer.h.0.ln_1.weight"] == ((16,), "layer_norm", "per-example gradients")


def test_frozen_parameters_have_no_row() -> None:
    rows = take_inventory(M.with_lora(M.llama), MicroBatch(M.token_batch(), 3), lm_loss)
    assert rows
    assert all("lora_" in r.parameter for r in rows)


def test_a_parameter_that_the_batch_does_not_use_is_listed_as_such() -> None:
    model = M.gpt2()
    model.unused = nn.Parameter(torch.zeros(3))
    row = next(r for r in take_inventory(model, MicroBatch(M.token_batch(), 3), lm_loss) if r.parameter == "unused")
    assert (row.operations, row.rule) == ("-", "not used by this batch")


class _TwoWithout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fine, self.centre, self.bound = (
            nn.Linear(4, 4),
            nn.Parameter(torch.ones(2, 4)),
            nn.Parameter(torch.ones(4)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(torch.fmin(self.fine(x), self.bound), self.centre)


def test_all_parameters_without_a_rule_are_named_at_once_with_the_remedy() -> None:
    x = torch.randn(3, 5, 4)
    with pytest.raises(UnsupportedParameterError) as caught:
        take_inventory(
            _TwoWithout(), MicroBatch({"x": x, "labels": x}, len(x)), lambda m, b: m(b["x"]).square().sum((1, 2))
        )
    message = str(caught.value)
    assert "bound (used by fmin); centre (used by cdist)" in message
    assert "fine" not in message
    assert "freeze it, or set per_device_train_batch_size=1" in message


def test_taking_it_leaves_model_and_generator_as_they_were() -> None:
    model, batch = M.gpt2(), MicroBatch(M.token_batch(), 3)
    state = torch.get_rng_state()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    take_inventory(model, MicroBatch(batch, len(batch["labels"])), lm_loss)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
