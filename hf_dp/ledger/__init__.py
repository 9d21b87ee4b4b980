"""Steps go in before they are released; a record that only grows comes out, and a budget across runs."""

from hf_dp.ledger import budget
from hf_dp.ledger.budget import Budget
from hf_dp.ledger.fingerprints import KEY_NAME, fingerprint, key_of, under_key
from hf_dp.ledger.format import ExecutedSegment, LedgerHeader, LedgerRecord
from hf_dp.ledger.ledger import LEDGER_NAME, Ledger, read_ledger, refuse_rollback

__all__ = [
    "KEY_NAME",
    "LEDGER_NAME",
    "Budget",
    "ExecutedSegment",
    "Ledger",
    "LedgerHeader",
    "LedgerRecord",
    "budget",
    "fingerprint",
    "key_of",
    "read_ledger",
    "refuse_rollback",
    "under_key",
]
