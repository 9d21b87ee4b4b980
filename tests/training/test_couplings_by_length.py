"""Models in which the other examples of a batch would change an example's own pass: each is trained as if it were
alone.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn
from transformers.utils import ModelOutput

from tests.support import exact, reference, runs
from tests.support import models as M

CLIP, SWITCH, COUNT = 0.1, 8, 6
STRONG = {"initializer_range": 0.3}  # weights so large that positions and experts matter


def phi3_longrope() -> nn.Module:
    """Rows of more than SWITCH tokens are turned by other frequencies than shorter ones."""
    factors = {"short_factor": [1.0, 1.0], "long_factor": [1.0, 16.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": SWITCH, **factors}
    settings = {"original_max_position_embeddings": SWITCH, "rope_parameters": rope, "num_key_value_heads": 4}
    return M.with_lora(lambda: M.phi3(**settings, **STRONG))


def nllb_moe() -> nn.Module:
    """Experts that take 3 tokens each, and pass over the others."""
    size = {"vocab_size": M.VOCAB, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    experts = {"num_experts": 4, "expert_capacity": 3, "encoder_sparse_step": 1, "decoder_sparse_step": 1}
    off = "dropout attention_dropout activation_dropout moe_token_dropout encoder_layerdrop decoder_layerdrop".split()
    marks = {"pad_token_id": 0, "decoder_start_token_id": 2}
    size["max_position_embeddings"] = 64
    config = tf.NllbMoeConfig(**size, **heads, **experts, **marks, **dict.fromkeys(off, 0.0), init_std=0.3)
    build = lambda: tf.NllbMoeForConditionalGeneration(config)  # noqa: E731
    return M.with_lora(build, target_modules=["q_proj", "v_proj"], task_type="SEQ_2_SEQ_LM")


def rows(lengths: list[int]) -> list[dict[str, Any]]:
    drawn = [torch.randint(3, M.VOCAB, (length,)).tolist() for length in lengths]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids[:]} for ids in drawn]


def gradients(model: nn.Module, records: list[dict[str, Any]], together: bool = False) -> list[dict[str, Tensor]]:
    """Of each record's own loss, in float64: each record alone, or in one batch with the others."""
    model = copy.deepcopy(model).double().train()
    parameters = reference.trainable(model)
    found = []
    for i, record in enumerate(records):
        batch = runs.collate(records if together else [record])
        labels = batch["labels"].clone()
        if together:
            labels[torch.arange(len(records)) != i] = -100
        loss = model(**{**batch, "labels": labels}, **shifted(model, batch["labels"])).loss
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        found.append(
            {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), grads, strict=True)}
        )
    return found


def shifted(model: nn.Module, labels: Tensor) -> dict[str, Tensor]:
    if not model.config.is_encoder_decoder:
        return {}
    start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
    return {"decoder_input_ids": torch.cat([start, labels[:, :-1].clamp_min(0)], 1)}


def clipped(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    scales = [min(1.0, CLIP / float(reference.norm(g))) for g in found]
    return {name: sum(s * g[name] for s, g in zip(scales, found, strict=True)) for name in found[0]}


LENGTHS = {
    "frequencies that change with the longest row": (phi3_longrope, [5, SWITCH, SWITCH + 1, 13, 6, 16]),
    "experts with room for a few tokens of a batch": (nllb_moe, [12, 5, 14, 9, 13, 7]),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_each_example_is_trained_as_if_it_were_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    build, lengths = LENGTHS[name]
    model, records = build(), rows(lengths)
    slow = clipped(gradients(model, records))
    in_one_batch = clipped(gradients(model, records, together=True))
    assert reference.relative_difference(in_one_batch, slow) > 0.01  # the examples would change one another

    privacy = {**runs.NOISELESS, "expected_batch_size": len(records), "clip_norm": CLIP}
    data = {"train_dataset": records, "remove_unused_columns": False, "per_device_train_batch_size": len(records)}
    trainer = runs.trainer(tmp_path, model, privacy, **data)
    sums = runs.record_sums(monkeypatch)
    trainer.train()
    parts = sums[0].split([p.numel() for p in reference.trainable(model).values()])
    fast = {n: s.view(g.shape) for s, (n, g) in zip(parts, slow.items(), strict=True)}
    assert reference.relative_difference(fast, slow) < 1e-4  # float32
    assert trainer.alone_because


class Pieces(nn.Module):
    """A classifier of texts in pieces of 16 tokens: trained layers meet all first pieces, then all second ones."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear, self.norm = nn.Embedding(M.VOCAB, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> ModelOutput:
        there = attention_mask.unsqueeze(-1)
        sums = [piece.sum(1) for piece in (self.table(input_ids) * there).split(16, 1)]
        used = [piece.any(1) for piece in there.split(16, 1)]
        found = self.norm(self.linear(torch.cat(sums)).tanh()) * torch.cat(used)
        return ModelOutput(logits=found.view(len(sums), len(input_ids), -1).sum(0))


def test_texts_that_are_cut_in_pieces_only_where_they_are_long_are_exact(tmp_path: Path) -> None:
    """The made-up records are of one piece, so that nothing was shown of the rows of several."""
    torch.manual_seed(0)
    texts = [torch.randint(3, M.VOCAB, (n,)).tolist() for n in (40, 5, 33, 16, 20, 7)]
    records = [{"input_ids": t, "attention_mask": [1] * len(t), "labels": len(t) % 8} for t in texts]

    def asked(model: nn.Module, one: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(one["input_ids"], one["attention_mask"]).logits, one["labels"])

    of_logits = lambda outputs, labels: F.cross_entropy(outputs.logits, labels)  # noqa: E731
    trainer = exact.exact(tmp_path, Pieces(), records, asked, compute_loss_func=of_logits)
    assert trainer.alone_because == ""
