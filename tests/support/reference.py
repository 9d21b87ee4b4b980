"""The slow twin of the per-example engine: one example at a time, by autograd, in float64; nothing of `hf_dp` in it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def example_gradients(model: nn.Module, batch: dict, example_loss) -> list[dict[str, Tensor]]:
    """Each example's gradient of its own loss, by parameter name; `example_loss(model, batch of one)` is a scalar."""
    gradients = []
    for row in range(len(batch["labels"])):
        one = {k: v[row : row + 1] for k, v in batch.items()}
        parameters = trainable(model)
        found = torch.autograd.grad(example_loss(model, one), list(parameters.values()), allow_unused=True)
        gradients.append(
            {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}
        )
    return gradients


def norm(gradient: dict[str, Tensor]) -> Tensor:
    return torch.stack([g.double().square().sum() for g in gradient.values()]).sum().sqrt()


def clipped_sum(model: nn.Module, batch: dict, example_loss, clip_norm: float) -> dict[str, Tensor]:
    """sum_b min(1, C / |g_b|) g_b, in a loop."""
    total = {name: torch.zeros_like(p) for name, p in trainable(model).items()}
    for gradient in example_gradients(model, batch, example_loss):
        factor = min(1.0, clip_norm / max(float(norm(gradient)), 1e-300))
        for name, g in gradient.items():
            total[name] += factor * g
    return total


def causal_lm_loss(model: nn.Module, one: dict) -> Tensor:
    logits = model(**{k: v for k, v in one.items() if k != "labels"}).logits[0]
    labels = one["labels"][0]
    return _mean_cross_entropy(logits[-len(labels) :][:-1], labels[1:])  # virtual tokens stand in front


def token_loss(model: nn.Module, one: dict) -> Tensor:
    logits = model(**{k: v for k, v in one.items() if k != "labels"}).logits[0]
    return _mean_cross_entropy(logits, one["labels"][0])


def classification_loss(model: nn.Module, one: dict) -> Tensor:
    logits = model(**{k: v for k, v in one.items() if k != "labels"}).logits
    return F.cross_entropy(logits, one["labels"])


def _mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    targets = labels != IGNORED
    if not targets.any():
        return 0.0 * logits.sum()
    return F.cross_entropy(logits[targets], labels[targets])


def relative_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    difference = {n: a[n].double() - b[n].double() for n in b}
    return float(norm(difference) / norm(b).clamp_min(1e-300))
