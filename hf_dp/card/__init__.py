"""A mechanism and its ledger go in; privacy.json, the model card and the report come out, and a check of all three."""

from hf_dp.card.description import Described
from hf_dp.card.readme import kept, read_readme
from hf_dp.card.record import Record
from hf_dp.card.registry import REGISTRY, registry_entry
from hf_dp.card.report.page import page
from hf_dp.card.report.training import DESCRIPTIONS
from hf_dp.card.schema import PRIVACY_JSON, read_record
from hf_dp.card.texts import carry_to_texts
from hf_dp.card.verification import verify
from hf_dp.card.what_leaves import CARD_FILES, WEIGHTS, leaving, processing_files
from hf_dp.card.writing import carry_card, library_versions, privacy_record, with_selection, write_card

__all__ = [
    "CARD_FILES",
    "DESCRIPTIONS",
    "PRIVACY_JSON",
    "REGISTRY",
    "WEIGHTS",
    "Described",
    "Record",
    "carry_card",
    "carry_to_texts",
    "kept",
    "leaving",
    "library_versions",
    "page",
    "privacy_record",
    "processing_files",
    "read_readme",
    "read_record",
    "registry_entry",
    "verify",
    "with_selection",
    "write_card",
]
