"""Models in which the other examples of a batch would change an example's own pass: each is trained as if it were
alone.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn
from transformers.utils import ModelOutput

import hf_dp
from hf_dp.per_example import MicroBatch
from hf_dp.training.passes import COUPLED
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


def beside_each_other(x: Tensor, layer: nn.Module) -> Tensor:
    """[B, T, d] as rows: example by example in short batches, position by position in long ones."""
    if x.shape[1] <= 16:
        return layer(x.reshape(-1, x.shape[-1])).view_as(x)
    return layer(x.transpose(0, 1).reshape(-1, x.shape[-1])).view(*x.shape[:2][::-1], -1).transpose(0, 1)


def positions_first(x: Tensor, layer: nn.Module) -> Tensor:
    """Position by position in long batches: [T, B, d], which passes for [B, T, d] where B = T."""
    return layer(x) if x.shape[1] <= 16 else layer(x.transpose(0, 1)).transpose(0, 1)


def otherwise_if_long(x: Tensor, layer: nn.Module) -> Tensor:
    """A short example is treated as a long one where it is padded to the length of a long one."""
    return layer(x) if x.shape[1] <= 16 else layer(2 * x)


def mixed_if_long(x: Tensor, layer: nn.Module) -> Tensor:
    """Long batches are normalised over their examples."""
    return layer(x) if x.shape[1] <= 16 else layer(x - x.mean(0, keepdim=True))


def mixed_if_many(x: Tensor, layer: nn.Module) -> Tensor:
    """Batches of many examples are normalised over them."""
    return layer(x) if len(x) <= 4 else layer(x - x.mean(0, keepdim=True))


class BySwitch(nn.Module):
    """A classifier whose one linear layer is used in another way for batches of some sizes."""

    def __init__(self, use: Callable[[Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        self.table, self.linear, self.use = nn.Embedding(M.VOCAB, 8), nn.Linear(8, 8), use

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> ModelOutput:
        there = attention_mask.unsqueeze(-1)
        return ModelOutput(logits=(self.use(self.table(input_ids) * there, self.linear).tanh() * there).sum(1))


WAYS = [beside_each_other, positions_first, otherwise_if_long, mixed_if_long]


@pytest.mark.parametrize("use", WAYS, ids=lambda use: use.__name__)
def test_what_a_model_does_to_long_records_alone_is_exact(use: Any, tmp_path: Path) -> None:
    """Made-up records of the first checks have 5 to 9 tokens; longer ones are compared when the first are met."""
    torch.manual_seed(0)
    texts = [torch.randint(3, M.VOCAB, (n,)).tolist() for n in (*[18] * 15, 5, 40, 7)]  # a pass with B = T = 18
    records = [{"input_ids": t, "attention_mask": [1] * len(t), "labels": i % 8} for i, t in enumerate(texts)]

    def asked(model: nn.Module, one: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(one["input_ids"], one["attention_mask"]).logits, one["labels"])

    of_logits = lambda outputs, labels: F.cross_entropy(outputs.logits, labels)  # noqa: E731
    k = {"compute_loss_func": of_logits, "per_device_train_batch_size": 18}
    trainer = exact.exact(tmp_path, BySwitch(use), records, asked, **k)
    assert trainer.alone_because == ""
    assert [may_share(trainer, n, 2) for n in (12, 31)] == [True, False]


def may_share(trainer: hf_dp.DPTrainer, length: int, size: int) -> bool:
    texts = torch.zeros(size, length, dtype=torch.long)
    batch = MicroBatch({"input_ids": texts, "attention_mask": texts, "labels": texts[:, 0]}, size)
    compared = trainer.private_step.passes.compared
    assert compared is not None
    return compared(batch)


def mixed_between(x: Tensor, layer: nn.Module) -> Tensor:
    """Batches of some lengths are normalised over their examples; shorter and longer ones are not."""
    return layer(x - x.mean(0, keepdim=True)) if 20 <= x.shape[1] <= 25 else layer(x)


def otherwise_between(x: Tensor, layer: nn.Module) -> Tensor:
    """An example is treated otherwise where it is padded to one of some lengths."""
    return layer((2 if 20 <= x.shape[1] <= 25 else 1) * x)


def another_bias_between(x: Tensor, layer: nn.Module) -> Tensor:
    """At some lengths the layer takes the other of two buffers."""
    return layer(x + (layer.here if 20 <= x.shape[1] <= 25 else layer.there))


def shifted_between(x: Tensor, layer: nn.Module) -> Tensor:
    """At some lengths each example is given what belongs to its neighbour."""
    return layer(x.roll(1 if 20 <= x.shape[1] <= 25 else 0, 0))


def shifted_by_two_between(x: Tensor, layer: nn.Module) -> Tensor:
    """At some lengths each example is given what belongs to the second one after it."""
    return layer(x.roll(2 if 20 <= x.shape[1] <= 25 else 0, 0))


def mixed_for_some_number(x: Tensor, layer: nn.Module) -> Tensor:
    """Three examples are apart, and many are; five are not."""
    return layer(x - x.mean(0, keepdim=True)) if len(x) == 5 else layer(x)


def mixed_for_some_number_of_some_length(x: Tensor, layer: nn.Module) -> Tensor:
    """Neither as many examples of other lengths are mixed, nor fewer or more of these lengths."""
    return layer(x - x.mean(0, keepdim=True)) if len(x) == 5 and 20 <= x.shape[1] <= 25 else layer(x)


def mixed_if_large(x: Tensor, layer: nn.Module) -> Tensor:
    """What counts is how many numbers all examples have together."""
    return layer(x - x.mean(0, keepdim=True)) if x.numel() > 8 * 100 else layer(x)


BETWEEN = [
    mixed_between,
    otherwise_between,
    another_bias_between,
    shifted_between,
    shifted_by_two_between,
    mixed_for_some_number,
    mixed_for_some_number_of_some_length,
    mixed_if_large,
]


@pytest.mark.parametrize("use", BETWEEN, ids=lambda use: use.__name__)
def test_what_a_model_does_at_some_sizes_alone_is_exact(use: Any, tmp_path: Path) -> None:
    """Neither made-up records of 16 and 32 tokens show it, nor three or eight examples of up to 9."""
    torch.manual_seed(0)
    texts = [torch.randint(3, M.VOCAB, (n,)).tolist() for n in (22, 5, 23, 9, 7)]
    records = [{"input_ids": t, "attention_mask": [1] * len(t), "labels": i % 8} for i, t in enumerate(texts)]
    model = BySwitch(use)
    model.linear.register_buffer("here", torch.ones(8))
    model.linear.register_buffer("there", torch.zeros(8))

    def asked(model: nn.Module, one: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(one["input_ids"], one["attention_mask"]).logits, one["labels"])

    of_logits = lambda outputs, labels: F.cross_entropy(outputs.logits, labels)  # noqa: E731
    k = {"compute_loss_func": of_logits, "per_device_train_batch_size": 8}
    trainer = exact.exact(tmp_path, model, records, asked, **k)
    assert trainer.alone_because == ""
    assert not may_share(trainer, 22, 5)
    assert may_share(trainer, 12, 4)


def test_what_a_model_does_to_many_examples_alone_is_exact(tmp_path: Path) -> None:
    """The first checks take three examples a pass; as many as a pass may hold are compared beside them."""
    torch.manual_seed(0)
    texts = [torch.randint(3, M.VOCAB, (n,)).tolist() for n in (9, 5, 7, 9, 6, 8)]
    records = [{"input_ids": t, "attention_mask": [1] * len(t), "labels": i % 8} for i, t in enumerate(texts)]

    def asked(model: nn.Module, one: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(one["input_ids"], one["attention_mask"]).logits, one["labels"])

    of_logits = lambda outputs, labels: F.cross_entropy(outputs.logits, labels)  # noqa: E731
    for size, reason in ((4, ""), (6, COUPLED)):
        k = {"compute_loss_func": of_logits, "per_device_train_batch_size": size}
        trainer = exact.exact(tmp_path / str(size), BySwitch(mixed_if_many), records, asked, **k)
        assert trainer.alone_because == reason


def test_a_loop_gives_records_of_a_length_that_couples_a_pass_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, lengths = BySwitch(mixed_if_long).double(), (5, 24, 18, 9)
    data = [(torch.randint(3, M.VOCAB, (n,)), n % 8) for n in lengths]

    def collate(records: list[tuple[Tensor, int]]) -> tuple[Tensor, ...]:
        ids = nn.utils.rnn.pad_sequence([record[0] for record in records], batch_first=True)
        return ids, torch.tensor([record[1] for record in records])

    def example_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0], (batch[0] > 0).long()).logits, batch[1], reduction="none")

    plain = {"noise_multiplier": 1.0, "target_delta": 1e-3}
    privacy = hf_dp.PrivacyConfig(**plain, expected_batch_size=len(data), clip_norm=CLIP)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    mechanism = hf_dp.plan(privacy, len(data), num_train_epochs=1)
    loop = hf_dp.PrivateLoop(model, optimizer, example_losses, mechanism, tmp_path)
    parameters = reference.trainable(model)
    slow = [torch.autograd.grad(example_losses(model, collate([one])).sum(), list(parameters.values())) for one in data]
    by_hand = clipped([dict(zip(parameters, found, strict=True)) for found in slow])
    sums = runs.record_sums(monkeypatch)
    for draw in loop.draws(data, collate=collate):
        assert max(batch.size for batch in draw) > 1
        loop.backward(draw)
        optimizer.step()
    parts = sums[0].split([p.numel() for p in parameters.values()])
    fast = {name: part.view(p.shape) for part, (name, p) in zip(parts, parameters.items(), strict=True)}
    assert loop.alone_because == ""
    assert reference.relative_difference(fast, by_hand) < 1e-4  # a sum in float32


def test_attention_that_a_short_record_changes_for_good_is_each_records_own(tmp_path: Path) -> None:
    """BigBird takes full attention from its first short text on; each record meets the model as it was given."""
    torch.manual_seed(0)
    size = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    blocks = {"vocab_size": M.VOCAB, "block_size": 4, "num_random_blocks": 1, "max_position_embeddings": 64}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    config = tf.BigBirdConfig(**size, **blocks, **off, **STRONG)
    model = tf.BigBirdForSequenceClassification(config).double()
    records = [{**record, "labels": i % 2} for i, record in enumerate(rows([40, 5, 48]))]

    each = [exact.by_hand(copy.deepcopy(model), [record], exact.own) for record in records]
    slow = {name: sum(found[name] for found in each) for name in each[0]}
    trainer, sums = exact.summed(tmp_path, model, records)
    assert "independent" in trainer.alone_because
    assert model.bert.attention_type == "block_sparse"
    assert reference.relative_difference(sums, slow) < 1e-4  # a sum in float32
