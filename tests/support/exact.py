"""A step of a trainer beside the same sum by hand: the loss asked for, by autograd, one example at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_dp import DPTrainer, PrivacyConfig
from tests.support import reference, runs

CLIP = 0.1
OF_THE_TRAINER = ("compute_loss_func", "class_weights", "eval_dataset", "check_records")
Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]
Collate = Callable[[list[dict[str, Any]]], dict[str, Tensor]]


def own(model: nn.Module, one: dict[str, Tensor]) -> Tensor:
    return model(**one).loss


def collate(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Right padding of rows of tokens, with -100 for labels; what is of one shape is stacked."""
    batch = {}
    for name in features[0]:
        values = [torch.as_tensor(f[name]) for f in features]
        if values[0].dim() == 1 and not values[0].is_floating_point():
            filler, longest = -100 if name == "labels" else 0, max(map(len, values))
            values = [F.pad(v, (0, longest - len(v)), value=filler) for v in values]
        batch[name] = torch.stack(values)
    return batch


def summed(folder: Path, model: nn.Module, rows: Any, **k: Any) -> tuple[DPTrainer, dict[str, Tensor]]:
    """A trainer after one step at q = 1, and the clipped sum that it was about to release, by parameter."""
    trainer_class = k.pop("trainer_class", DPTrainer)
    own_settings = {n: k.pop(n) for n in list(k) if n in OF_THE_TRAINER}
    privacy = PrivacyConfig(**runs.NOISELESS, expected_batch_size=len(rows), clip_norm=CLIP)
    settings = {"train_dataset": rows, "data_collator": k.pop("data_collator", collate), "privacy": privacy}
    args = runs.arguments(
        folder, **{"per_device_train_batch_size": k.pop("size", 3), "remove_unused_columns": False, **k}
    )
    trainer = trainer_class(model, args, **settings, **own_settings)
    with pytest.MonkeyPatch.context() as patch:
        sums = runs.record_sums(patch)
        trainer.train()
    parts = sums[0].split([p.numel() for p in reference.trainable(model).values()])
    return trainer, {n: s.view(p.shape) for (n, p), s in zip(reference.trainable(model).items(), parts, strict=True)}


def by_hand(model: nn.Module, rows: Any, loss: Loss, collator: Collate = collate) -> dict[str, Tensor]:
    """The sum of clipped gradients, by autograd, one example at a time."""
    model.train()
    parameters = reference.trainable(model)
    slow = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in rows:
        found = torch.autograd.grad(loss(model, collator([row])).sum(), list(parameters.values()), allow_unused=True)
        gradient = {n: g for n, g in zip(parameters, found, strict=True) if g is not None}
        factor = min(1.0, CLIP / max(float(reference.norm(gradient)), 1e-30))
        for name, g in gradient.items():
            slow[name] += factor * g
    return slow


def exact(folder: Path, model: nn.Module, rows: Any, loss: Loss = own, **k: Any) -> DPTrainer:
    """The trainer after a step whose sum was that of `loss`, one example at a time."""
    slow = by_hand(model, rows, loss, k.get("data_collator", collate))
    trainer, sums = summed(folder, model, rows, **k)
    assert any(g.abs().max() > 0 for g in slow.values())
    assert reference.relative_difference(sums, slow) < 1e-4  # float32
    return trainer
