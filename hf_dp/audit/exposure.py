"""A model's losses on planted secrets and on others like them -> exposure: how far up the list of guesses each secret
stands.

Carlini et al. 2019 (The Secret Sharer), definition 2: exposure = log2 |R| - log2 rank, with the rank of a secret's loss
among those of all R it might have been. Here R is the secret and n others drawn at random, so that it is at most log2(n
+ 1) bits; a model that never saw the secret gives log2 e = 1.44 bits in the mean.
"""

import numpy as np
from scipy import stats

from hf_dp.audit.scores import Floats
from hf_dp.errors import AuditError

CHANCE = float(np.log2(np.e))  # mean exposure of secrets that were never seen
LEVEL = 0.01


def exposures(secret_losses: Floats, other_losses: Floats) -> Floats:
    """Exposure of each secret in bits, [k].

    Args:
        secret_losses: the model's loss on each secret, [k].
        other_losses: its losses on n others for each, [k, n]. Ties count against the secret.

    Raises:
        AuditError: other shapes, no others, or losses that are not finite.
    """
    if secret_losses.ndim != 1 or other_losses.ndim != 2 or len(secret_losses) != len(other_losses):
        raise AuditError(f"expected losses [k] and [k, n], got {secret_losses.shape} and {other_losses.shape}")
    if not other_losses.size or not (np.isfinite(secret_losses).all() and np.isfinite(other_losses).all()):
        raise AuditError("exposure needs at least one secret, another one to compare it with, and finite losses")
    rank = 1 + (other_losses <= secret_losses[:, None]).sum(1)
    found: Floats = np.log2(other_losses.shape[1] + 1) - np.log2(rank)
    return found


def are_given_away(found: Floats) -> bool:
    """Whether secrets that were never seen would have so much exposure together with a chance of at most 1 %.

    Unseen, a secret's rank is uniform, and minus the logarithm of a uniform number is exponential: the sum is a Gamma
    variable, or less, as ranks are whole.
    """
    return bool(stats.gamma.sf(found.sum() * np.log(2), len(found)) <= LEVEL)
