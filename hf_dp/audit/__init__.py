"""Scores of what a run gave away go in; a lower bound on its epsilon comes out."""

from hf_dp.audit.exposure import CHANCE, are_given_away, exposures
from hf_dp.audit.membership import FEWEST_MODELS, Attack, Coins, ceilings, is_refuted, lira_scores, measured
from hf_dp.audit.membership_picture import plot_attacks
from hf_dp.audit.report import AuditRecord, Counts, audit_record, computed_again, counted, has_power, power
from hf_dp.audit.scores import Floats, log_likelihood_ratio

__all__ = [
    "CHANCE",
    "FEWEST_MODELS",
    "Attack",
    "AuditRecord",
    "Coins",
    "Counts",
    "Floats",
    "are_given_away",
    "audit_record",
    "ceilings",
    "computed_again",
    "counted",
    "exposures",
    "has_power",
    "is_refuted",
    "lira_scores",
    "log_likelihood_ratio",
    "measured",
    "plot_attacks",
    "power",
]
