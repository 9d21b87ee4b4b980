"""A mechanism and its ledger go in; privacy.json, the model card and the report come out, and a check of all three."""

from hf_dp.card.record import PRIVACY_JSON, library_versions, privacy_record, with_selection, write_card
from hf_dp.card.report.page import page
from hf_dp.card.report.training import DESCRIPTIONS
from hf_dp.card.verification import read_record, schema_problems, verify

__all__ = [
    "DESCRIPTIONS",
    "PRIVACY_JSON",
    "library_versions",
    "page",
    "privacy_record",
    "read_record",
    "schema_problems",
    "verify",
    "with_selection",
    "write_card",
]
