"""An open run -> the card of its output folder, and what its audit shows: both from the steps that were charged."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_dp import card, durable
from hf_dp.audit import Counts, audit_record
from hf_dp.card import Described
from hf_dp.errors import AuditError
from hf_dp.step import PrivateRun


def write_card(
    run: PrivateRun,
    folder: Path,
    *,
    public_eval: bool,
    audit: Counts | None = None,
    described: Described | None = None,
) -> None:
    """Writes privacy.json and README.md into `folder`. Does nothing on all processes but 0."""
    ledger = run.record()
    if ledger is None:
        return
    declared = {"public_eval": public_eval}
    record = card.privacy_record(
        run.mechanism, ledger, libraries=card.library_versions(), declared=declared, audit=audit
    )
    card.write_card(folder, record, described)


@contextmanager
def keeping_the_users_words(folder: Path, *, mine: bool) -> Iterator[None]:
    """Within, somebody may make a new card; what was written in the old one stays.

    Args:
        folder: of the card.
        mine: whether this process writes it.
    """
    path = folder / "README.md"
    before = card.read_readme(path) if mine else ""
    yield
    if before:
        durable.replace(path, card.kept(before, card.read_readme(path)).encode())


def audit_result(run: PrivateRun, counts: Counts | None) -> dict[str, object]:
    """What an audit's counts mean for all steps charged, in the form of privacy.json.

    Raises:
        AuditError: there are no counts.
    """
    if counts is None:
        raise AuditError("nothing was audited: give DPTrainer audit=AuditConfig(), and train")
    spending = run.spending()
    spent = spending.total()
    return audit_record(counts, spending.claimed(), spent.delta, spent.epsilon).stated()
