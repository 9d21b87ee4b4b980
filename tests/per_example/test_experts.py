"""Experts that sort the tokens of a batch: their spelt-out form is the same function, and is what proofs go through."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.integrations import moe

from hf_dp.per_example.batches import MicroBatch
from hf_dp.per_example.head import next_token_losses
from hf_dp.per_example.proof import experts, prove
from tests.support import models as M

SPARSE = {**M.DECODER, "num_hidden_layers": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
HEADS = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "q_lora_rank": 4, "kv_lora_rank": 4}
BUILD: dict[str, Callable[[], nn.Module]] = {
    "gated": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SPARSE, num_local_experts=4)),
    "gated-many": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SPARSE, head_dim=4, num_experts=6)),
    "transposed-with-shifts": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**SPARSE, head_dim=4, num_local_experts=4)),
    "groups-of-experts": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **{**SPARSE, **HEADS, "num_key_value_heads": 4},
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=0,
        )
    ),
    "ungated": lambda: tf.NemotronHForCausalLM(
        tf.NemotronHConfig(**{**SPARSE, "hybrid_override_pattern": "E"}, n_routed_experts=4, n_group=1, topk_group=1)
    ),
}


def experts_of(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if hasattr(m, "_is_expert_parallel"))


def losses(model: nn.Module, batch: Any) -> Tensor:
    return next_token_losses(model, model, {k: v for k, v in batch.items() if k != "labels"}, batch["labels"], 0.0)


def beside_frozen_experts(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = BUILD[name]().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features != M.VOCAB:
            module.weight.requires_grad_(True)
    return model


@pytest.mark.parametrize("name", BUILD)
def test_the_spelt_out_form_is_the_same_function(name: str) -> None:
    torch.manual_seed(0)
    layer = experts_of(M.stirred(BUILD[name]()))
    size = SPARSE["hidden_size"]
    chosen = torch.stack([torch.randperm(layer.num_experts)[:2] for _ in range(11)])
    given = torch.randn(11, size).requires_grad_(), torch.rand(11, 2).requires_grad_()
    results = []
    for form in (moe.grouped_mm_experts_forward, experts.every_expert):
        out = form(layer, given[0], chosen, given[1])
        results.append((out, *torch.autograd.grad(out.square().sum(), given)))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, 1e-4, 1e-6)  # in float32, which alone the sorting form takes


@pytest.mark.parametrize("name", ["gated", "gated-many", "transposed-with-shifts"])
def test_adapters_beside_experts_are_proved(name: str) -> None:
    model = beside_frozen_experts(name)
    batches = [MicroBatch(M.token_batch(), 3) for _ in range(2)]
    assert prove(model, losses, batches).reasons == ()
    assert moe.ALL_EXPERTS_FUNCTIONS["grouped_mm"] is moe.grouped_mm_experts_forward


@pytest.mark.parametrize("coupled", [True, False])
def test_experts_of_somebodys_own_are_followed_as_they_are(coupled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = experts.every_expert(self, hidden, index, weights)
        return out - out.mean(0) if coupled else out

    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS._local_mapping, "grouped_mm", mine)
    model = beside_frozen_experts("gated")
    assert prove(model, losses, [MicroBatch(M.token_batch(), 3) for _ in range(2)]).independent is not coupled
    assert moe.ALL_EXPERTS_FUNCTIONS["grouped_mm"] is mine
