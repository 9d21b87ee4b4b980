"""Steps go in before they are released; an append-only record of them comes out, and a budget for several runs."""

from hf_dp.ledger import budget
from hf_dp.ledger.budget_file import Budget
from hf_dp.ledger.checkpoints import checkpoint_to_resume, has_checkpoint, seal, step_of
from hf_dp.ledger.fingerprints import KEY_NAME, fingerprint, key_of, under_key
from hf_dp.ledger.format import ExecutedSegment, LedgerHeader, LedgerRecord
from hf_dp.ledger.ledger import Ledger, has_steps, read_ledger, refuse_rollback
from hf_dp.ledger.witness import LEDGER_NAME

__all__ = [
    "KEY_NAME",
    "LEDGER_NAME",
    "Budget",
    "ExecutedSegment",
    "Ledger",
    "LedgerHeader",
    "LedgerRecord",
    "budget",
    "checkpoint_to_resume",
    "fingerprint",
    "has_checkpoint",
    "has_steps",
    "key_of",
    "read_ledger",
    "refuse_rollback",
    "seal",
    "step_of",
    "under_key",
]
