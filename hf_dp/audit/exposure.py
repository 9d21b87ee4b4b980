"""A model's losses on planted secrets and on others like them -> exposure: how early each secret comes in the list of
guesses.

Carlini et al. 2019 (The Secret Sharer), definition 2: exposure = log2 |R| - log2 rank, where the rank is that of the
secret's loss among the losses of all R secrets that it might have been. Here R consists of the secret and n random
others, so exposure is at most log2(n + 1) bits. A model that never saw the secret gives log2 e = 1.44 bits on average.
"""

import numpy as np
from scipy import stats

from hf_dp.audit.scores import Floats
from hf_dp.errors import AuditError

CHANCE = float(np.log2(np.e))  # mean exposure, in bits, of secrets that were never seen
LEVEL = 0.01


def exposures(secret_losses: Floats, other_losses: Floats) -> Floats:
    """Exposure of each secret in bits, [k].

    Args:
        secret_losses: the model's loss on each secret, [k].
        other_losses: its losses on n others for each secret, [k, n]. Ties count against the secret.

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
    """Whether the exposure is so large that unseen secrets would reach it with a probability of at most 1 %.

    The rank of an unseen secret is uniform, and minus the logarithm of a uniform number is exponential. So the sum over
    secrets is a Gamma variable, or smaller, as ranks are whole numbers.
    """
    return bool(stats.gamma.sf(found.sum() * np.log(2), len(found)) <= LEVEL)
