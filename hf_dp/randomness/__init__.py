"""The operating system's entropy goes in; keys, random streams, noise and fresh states of generators come out."""

from hf_dp.randomness.chacha import require_cryptography
from hf_dp.randomness.forked_rng import fork_forward_rng
from hf_dp.randomness.grid import STD, Grid, grid_for, integer_sensitivity, sigma_problem
from hf_dp.randomness.noise import NoiseSource
from hf_dp.randomness.streams import ChaChaKey, Key, Role, checked_key, fresh_key, keyed_stream

__all__ = [
    "STD",
    "ChaChaKey",
    "Grid",
    "Key",
    "NoiseSource",
    "Role",
    "checked_key",
    "fork_forward_rng",
    "fresh_key",
    "grid_for",
    "integer_sensitivity",
    "keyed_stream",
    "require_cryptography",
    "sigma_problem",
]
