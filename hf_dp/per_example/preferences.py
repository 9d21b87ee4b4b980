"""Log-probabilities of two answers, under the model and under a reference -> one loss a pair, [U].

Each loss is a function of its pair alone, in the form in which trl trains it; where no source is given, see trl's
documentation of `DPOConfig.loss_type`. Legend: U pairs; a log-ratio is log p(answer) - log p_reference(answer).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_dp.per_example.losses import IGNORED, predictable, shifted


class Pairs(NamedTuple):
    """What the losses of preferences compare, [U] each.

    Attributes:
        chosen: log-ratios of the answers that are preferred.
        rejected: log-ratios of the others.
        chosen_length: numbers of tokens of the answers that are preferred, 1 or more.
        rejected_length: numbers of tokens of the others.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor


class Preference(NamedTuple):
    """The settings of the losses, as trl names them.

    Attributes:
        beta: how far the model may move away from the reference; the smaller, the farther.
        label_smoothing: the probability that a pair is labelled the wrong way round.
        tau: the temperature of `discopop`.
        divergence: the f-divergence, one of `DIVERGENCES` (Wang et al. 2023, "Beyond reverse KL").
        alpha: the coefficient of the alpha-divergence.
    """

    beta: float
    label_smoothing: float = 0.0
    tau: float = 0.05
    divergence: str = "reverse_kl"
    alpha: float = 1.0


PairLoss = Callable[[Pairs, Preference], Tensor]


def answer_log_probabilities(means: Tensor, labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Mean cross entropies over each row's targets, [R], and labels, [R, T] -> log p of each row's answer, [R]."""
    return -means * (shifted(predictable(labels, attention_mask)) != IGNORED).sum(1)


def weighted_loss(pairs: Pairs, names: Sequence[str], weights: Sequence[float], settings: Preference) -> Tensor:
    """The sum of the named losses, each times its weight, [U].

    Raises:
        KeyError: a loss, or a divergence, that is not known here; or a loss of each answer by itself (all but
            `OF_THE_DIFFERENCE`) under another divergence than the reverse KL, for which it has no meaning.
    """
    if settings.divergence != "reverse_kl" and not set(names) <= OF_THE_DIFFERENCE:
        raise KeyError(settings.divergence)
    total = torch.zeros_like(pairs.chosen)
    for name, weight in zip(names, weights, strict=True):
        total = total + weight * PAIR_LOSSES[name](pairs, settings)
    return total


def _reverse_kl(ratios: Tensor, alpha: float) -> Tensor:
    return ratios


def _forward_kl(ratios: Tensor, alpha: float) -> Tensor:
    return 1 - torch.exp(-ratios)


def _jensen_shannon(ratios: Tensor, alpha: float) -> Tensor:
    return math.log(2) + F.logsigmoid(ratios)


def _alpha_divergence(ratios: Tensor, alpha: float) -> Tensor:
    if abs(alpha - 1.0) < 1e-6:
        return ratios
    return (torch.exp((ratios * (alpha - 1.0)).clamp(max=80.0)) - 1.0) / (alpha - 1.0)


# f-divergence -> (log-ratio, alpha) -> f' of the ratio
DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js_divergence": _jensen_shannon,
    "alpha_divergence": _alpha_divergence,
}


def _scores(p: Pairs, s: Preference) -> tuple[Tensor, Tensor]:
    score = DIVERGENCES[s.divergence]
    return score(p.chosen, s.alpha), score(p.rejected, s.alpha)


def _margin(p: Pairs, s: Preference) -> Tensor:
    """Beta times the difference of the scores."""
    chosen, rejected = _scores(p, s)
    return s.beta * (chosen - rejected)


def _mean_margin(p: Pairs, s: Preference) -> Tensor:
    """The difference of the scores by token."""
    chosen, rejected = _scores(p, s)
    return chosen / p.chosen_length - rejected / p.rejected_length


def _sigmoid(p: Pairs, s: Preference) -> Tensor:
    """DPO (Rafailov et al. 2023, equation 7)."""
    return -F.logsigmoid(_margin(p, s))


def _sigmoid_norm(p: Pairs, s: Preference) -> Tensor:
    return -F.logsigmoid(s.beta * _mean_margin(p, s))


def _hinge(p: Pairs, s: Preference) -> Tensor:
    """SLiC (Zhao et al. 2023), on log-ratios."""
    return torch.relu(1 - _margin(p, s))


def _ipo(p: Pairs, s: Preference) -> Tensor:
    """IPO (Azar et al. 2023, equation 17), by token."""
    return (_mean_margin(p, s) - 1 / (2 * s.beta)).square()


def _exo_pair(p: Pairs, s: Preference) -> Tensor:
    """EXO (Ji et al. 2024, equation 16)."""
    margin, epsilon = _margin(p, s), s.label_smoothing
    won, lost = F.logsigmoid(margin), F.logsigmoid(-margin)
    return won.exp() * (won - math.log1p(-epsilon)) + lost.exp() * (lost - math.log(epsilon))


def _nca_pair(p: Pairs, s: Preference) -> Tensor:
    """NCA (Chen et al. 2024)."""
    chosen, rejected = s.beta * p.chosen, s.beta * p.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _robust(p: Pairs, s: Preference) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024)."""
    margin, flipped = _margin(p, s), s.label_smoothing
    return (flipped * F.logsigmoid(-margin) - (1 - flipped) * F.logsigmoid(margin)) / (1 - 2 * flipped)


def _bco_pair(p: Pairs, s: Preference) -> Tensor:
    return -F.logsigmoid(s.beta * p.chosen) - F.logsigmoid(-s.beta * p.rejected)


def _sppo_hard(p: Pairs, s: Preference) -> Tensor:
    """SPPO (Wu et al. 2024, equation 4.7), where the winner always wins."""
    return (p.chosen - 0.5 / s.beta).square() + (p.rejected + 0.5 / s.beta).square()


def _apo_zero(p: Pairs, s: Preference) -> Tensor:
    """APO (D'Oosterlinck et al. 2024, equation 7)."""
    return torch.sigmoid(-s.beta * p.chosen) + torch.sigmoid(s.beta * p.rejected)


def _apo_down(p: Pairs, s: Preference) -> Tensor:
    """APO (D'Oosterlinck et al. 2024, equation 8)."""
    return torch.sigmoid(s.beta * p.chosen) + torch.sigmoid(-s.beta * (p.chosen - p.rejected))


def _discopop(p: Pairs, s: Preference) -> Tensor:
    """DiscoPOP (Lu et al. 2024, equation 5)."""
    margin = _margin(p, s)
    share = torch.sigmoid(margin / s.tau)
    return -F.logsigmoid(margin) * (1 - share) + torch.exp(-margin) * share


PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid_norm,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
}


# Losses of the difference of two scores, where the normaliser that an f-divergence leaves behind cancels.
OF_THE_DIFFERENCE = frozenset("sigmoid sigmoid_norm hinge ipo exo_pair robust discopop".split())


def reward_loss(scores: Tensor, margins: Tensor | None, centred: float) -> Tensor:
    """Scores [U, 2], of the chosen and of the rejected answer -> the loss of Bradley and Terry, [U].

    Args:
        scores: of a reward model.
        margins: by which the chosen one must lead, [U], or None.
        centred: the weight of the squared sum of both scores, which keeps rewards near zero.
    """
    chosen, rejected = scores.unbind(1)
    lead = chosen - rejected if margins is None else chosen - rejected - margins
    return -F.logsigmoid(lead) + centred * (chosen + rejected).square()
