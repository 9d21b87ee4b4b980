"""What a run leaves in its folder, without the run; and what verification finds wrong in one."""

from pathlib import Path

from hf_dp.accounting.selection import Selection
from hf_dp.audit.report import Counts
from hf_dp.card import writing as card
from hf_dp.card.verification import verify
from hf_dp.ledger.ledger import LEDGER_NAME, Ledger, LedgerHeader
from hf_dp.mechanism import SHARED, UNIT, Mechanism, relation_of, unit_of
from hf_dp.step.opening import begin_segment

N, STEPS, DELTA = 1000, 12, 1e-4


def model_folder(
    folder: Path,
    *,
    sigma: float = 1.0,
    debug: bool = False,
    steps: int = STEPS,
    loss_bound: float | None = None,
    public_eval: bool = True,
    noise: str = "gaussian",
    audit: Counts | None = None,
    selection: Selection | None = None,
    owned: int | None = None,
) -> Path:
    """What a run leaves: ledger, privacy.json and card, by the code that a run uses; `owned` is the contribution bound
    of a run on records with lists of owners.
    """
    unit = UNIT if owned is None else unit_of("users", SHARED, owned)
    mechanism = Mechanism(
        num_examples=N,
        expected_batch_size=50,
        num_steps=STEPS,
        noise_multiplier=sigma,
        clip_norm=0.1,
        delta=DELTA,
        target_epsilon=4.0 if sigma else None,
        debug=debug,
        loss_bound=loss_bound,
        noise=noise,
        unit=unit,
        relation=relation_of(unit),
        contribution_bound=owned,
    )
    folder.mkdir(parents=True, exist_ok=True)
    header = LedgerHeader(N, mechanism.unit, mechanism.relation, DELTA, None, debug)
    with Ledger.open(folder / LEDGER_NAME, header) as ledger:
        begin_segment(ledger, mechanism.at(0))
        ledger.plan(mechanism.segments())
        for _ in range(steps):
            ledger.charge()
        record = card.privacy_record(
            mechanism, ledger.record(), libraries={"hf_dp": "0"}, declared={"public_eval": public_eval}, audit=audit
        )
    card.write_card(folder, record if selection is None else card.with_selection(record, selection))
    return folder


def failures(folder: Path) -> str:
    return "; ".join(f"{c.name}: {c.found}" for c in verify(folder) if not c.holds)
