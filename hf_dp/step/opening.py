"""A mechanism, an output folder and a training set -> an opened session: ledger, keys, and the steps it may take.

Only process 0 touches the files. What it finds there, or the error that stops it, then becomes known to all processes.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import torch.distributed as dist

from hf_dp import accounting
from hf_dp.errors import BudgetError, ConfigError, HfDpError, LedgerError
from hf_dp.ledger import (
    KEY_NAME,
    LEDGER_NAME,
    Ledger,
    LedgerHeader,
    fingerprint,
    has_steps,
    key_of,
    refuse_rollback,
    step_of,
    under_key,
)
from hf_dp.ledger import budget as budgets
from hf_dp.mechanism import Mechanism, Segment, StepSettings, united
from hf_dp.randomness import ChaChaKey, Key, NoiseSource, fresh_key
from hf_dp.sampling import Records
from hf_dp.step.spending import Spending

Segments = tuple[Segment, ...]
T = TypeVar("T")


class Place:
    """Where a run keeps its ledger, and which processes take part.

    Args:
        folder: the output folder.
        process_index: this process, from 0.
        num_processes: how many processes train together.
        budget_file: the budget that the run draws on, if any.
    """

    def __init__(
        self, folder: Path, process_index: int = 0, num_processes: int = 1, budget_file: str | None = None
    ) -> None:
        self.folder = folder
        self.process_index, self.num_processes = process_index, num_processes
        self.budget_file = None if budget_file is None else Path(budget_file).expanduser().absolute()

    def shared(self, on_process_0: Callable[[], T]) -> T:
        """The value that process 0 computes, on every process; if it fails, its error on every process."""
        outcome: tuple[T | None, HfDpError | None] = None, None
        if self.process_index == 0:
            try:
                outcome = on_process_0(), None
            except HfDpError as error:
                outcome = None, error
        if self.num_processes > 1:
            sent = [outcome]
            dist.broadcast_object_list(sent, src=0)
            outcome = sent[0]
        value, failure = outcome
        if failure is not None:
            raise failure
        return cast(T, value)


@dataclass(frozen=True)
class Session:
    """What one call of `train` begins with.

    Attributes:
        dataset: the training set; its keyed fingerprint must be the one in the ledger.
        checkpoint: the checkpoint that training resumes from, or None.
        epoch_length: draws in an epoch. A Trainer that resumes at step s skips the first s % epoch_length draws of its
            loader.
        seed: fixes keys and noise, for tests alone; the ledger is marked as not private.
        continues: an earlier session of this process left its ledger in the folder, so it may be continued without a
            checkpoint.
        in_shards: each process releases shards, and so needs the noise of their coordinates.
    """

    dataset: Records
    checkpoint: Path | None = None
    epoch_length: int = 1
    seed: int | None = None
    continues: bool = False
    in_shards: bool = False


class Opened(NamedTuple):
    """A session that may begin.

    Attributes:
        ledger: open on process 0; None elsewhere.
        noise: on process 0, and on all for shards; None elsewhere.
        sampling_key: 128 secret bits, the same on all processes, new in every session.
        spending: everything charged before this session.
        plan: all steps charged before, and then those that this session plans to take.
        first_step: number of the first step of this session, counted from the start of the training.
        first_draw: number of the draw that this step takes, counted from the start of the session's data loader.
        allowed: how many steps this session may take.
    """

    ledger: Ledger | None
    noise: NoiseSource | None
    sampling_key: Key
    spending: Spending
    plan: Segments
    first_step: int
    first_draw: int
    allowed: int


def open_session(mechanism: Mechanism, place: Place, session: Session) -> Opened:
    """Opens or continues the ledger, shares key and segments, and asks target and budget how many steps they allow.

    If anything ends this early, an interrupt included, the ledger is closed, and files made here are removed.

    Raises:
        LedgerError, ConfigError, BudgetError: see `PrivateRun.open`.
    """
    opening = _Opening(mechanism, place, session)
    try:
        return opening.opened()
    except BaseException:
        opening.withdraw()
        raise


class _Opening:
    """The opening of one session, step by step; it knows what has been made so far, so that this can be taken back."""

    def __init__(self, mechanism: Mechanism, place: Place, session: Session) -> None:
        self.mechanism, self.place, self.session = mechanism, place, session
        self.first_step = max(0, step_of(session.checkpoint)) if session.checkpoint else 0
        self.ledger: Ledger | None = None
        self.made: list[Path] = []

    def opened(self) -> Opened:
        """Public checks first, then files, then the budget; the plan is written last."""
        mechanism, shared = self.mechanism, self.place.shared
        shared(self._refuse_another_training)
        key = shared(lambda: key_of(self.place.folder))
        data_fingerprint = under_key(self.session.dataset, key)
        self._refuse_differences(data_fingerprint)
        shared(lambda: self._open_ledger(data_fingerprint))
        before, plans = shared(self._charged_before)
        spending = Spending(mechanism, before, plans)
        sampling_key, noise = self._keys()
        allowed = self._affordable(spending)
        if allowed == 0:
            spent = spending.total()
            raise ConfigError(
                f"this training is over, and its model needs no more steps: the budget is spent: epsilon "
                f"{spent.epsilon:.4g} after {spent.num_steps} steps, target {mechanism.target_epsilon}; to train "
                "further, raise target_epsilon, or start anew in another output_dir"
            )
        if self.place.budget_file is not None:
            most = min(allowed, max(1, mechanism.num_steps - self.first_step))
            allowed = shared(lambda: self._reserve(before, most))
        upcoming = mechanism.segments(self.first_step, min(allowed, max(0, mechanism.num_steps - self.first_step)))
        shared(lambda: self.ledger.plan(upcoming) if self.ledger else None)
        return Opened(
            self.ledger,
            noise,
            sampling_key,
            spending,
            plan=united((*before, *upcoming)),
            first_step=self.first_step,
            first_draw=self.first_step % self.session.epoch_length,
            allowed=allowed,
        )

    def withdraw(self) -> None:
        """Closes the ledger. Removes what this opening has made, unless a step is charged there."""
        if self.ledger is None:
            return
        if self.place.folder / LEDGER_NAME in self.made and not self.ledger.num_steps:
            for path in self.made:  # while the ledger is still locked
                path.unlink(missing_ok=True)
        self.ledger.close()

    def _refuse_another_training(self) -> None:
        """On process 0, before any file is made."""
        folder = self.place.folder
        path = folder / LEDGER_NAME
        self.made = [p for p in (path, folder / KEY_NAME) if not p.exists()]
        if self.session.checkpoint is None and not self.session.continues and has_steps(path):
            raise LedgerError(
                f"{path} holds what another training in this folder spent. Resume it (resume_from_checkpoint=True), or "
                "choose another output_dir; what was spent on the same data adds up either way"
            )
        if path.exists() and self.place.budget_file is None and (folder / budgets.TOKEN_NAME).exists():
            raise BudgetError(
                f"the run in {folder} uses a budget, which would not see its further steps: give budget_file"
            )

    def _refuse_differences(self, data_fingerprint: str) -> None:
        """All processes must have the same plan and data.

        The noise of process 0 must fit what the others clip, and the slices of all must form one draw.
        """
        if self.place.num_processes == 1:
            return
        everybodys: list[tuple[dict[str, object], str]] = [({}, "")] * self.place.num_processes
        dist.all_gather_object(everybodys, (asdict(self.mechanism), data_fingerprint))
        (plan, data), wrong = everybodys[0], []
        for number, (other, others_data) in enumerate(everybodys):
            wrong += [
                f"{name} is {other[name]} on process {number}, {plan[name]} on 0"
                for name in plan
                if other[name] != plan[name]
            ]
            if others_data != data:
                wrong.append(f"the records of process {number} are not those of 0, in their order")
        if wrong:
            raise ConfigError(
                f"all processes need one plan and the same data; {'; '.join(wrong)}. Give all of them the same recipe "
                "and files"
            )

    def _open_ledger(self, data_fingerprint: str) -> None:
        """On process 0: a new ledger, or the one that the checkpoint's run, or an earlier session, wrote."""
        mechanism, path = self.mechanism, self.place.folder / LEDGER_NAME
        header = LedgerHeader(
            num_examples=mechanism.num_examples,
            unit=mechanism.unit,
            relation=mechanism.relation,
            delta=mechanism.delta,
            data_fingerprint=data_fingerprint,
            debug=mechanism.debug,
        )
        if self.session.checkpoint is not None:
            refuse_rollback(path, self.session.checkpoint)
        self.ledger = Ledger.open(path, header)
        begin_segment(self.ledger, mechanism.at(self.first_step))

    def _charged_before(self) -> tuple[Segments, tuple[Segments, ...]]:
        """On process 0: what was charged before this session, and under which plans."""
        assert self.ledger is not None
        record = self.ledger.record()
        return record.segments, record.plans

    def _keys(self) -> tuple[Key, NoiseSource | None]:
        """The key of the draws, on all processes; the source of the noise, on process 0, or of one key on all."""
        seed = self.session.seed
        sampling_key = self.place.shared(lambda: self._key(fresh_key() if seed is None else seed))
        own = lambda: self._key(fresh_key() if seed is None else seed + 1)  # noqa: E731
        if self.session.in_shards:
            return sampling_key, NoiseSource(key=self.place.shared(own))
        return sampling_key, NoiseSource(key=own()) if self.place.process_index == 0 else None

    def _key(self, secret: int) -> Key:
        """The secret as a key for the generator that the mechanism names."""
        return secret if self.mechanism.generator == "philox" else ChaChaKey(secret)

    def _affordable(self, spending: Spending) -> int:
        """How many steps the target epsilon leaves; none where a plan begun earlier exceeds it."""
        m = self.mechanism
        if m.target_epsilon is None:
            return m.num_steps
        if accounting.spent(spending.claimed(), m.delta).epsilon > m.target_epsilon:
            return 0
        upcoming = m.segments(self.first_step, m.num_steps)
        return accounting.affordable_steps(spending.charged, upcoming, target_epsilon=m.target_epsilon, delta=m.delta)

    def _reserve(self, before: Segments, num_steps: int) -> int:
        """On process 0: how many of these steps the budget file grants to this session."""
        file, folder, m = self.place.budget_file, self.place.folder, self.mechanism
        assert file is not None
        if not m.is_private:
            raise BudgetError(
                "a run without noise, or with a debug_seed, has an infinite epsilon, which no budget holds: leave "
                "budget_file out where the data are public"
            )
        budgets.read(file)  # before a key is made beside it
        subject = budgets.BudgetSubject.run(m, fingerprint(self.session.dataset, file.resolve().parent))
        asked = m.segments(self.first_step, num_steps)
        is_new = folder / LEDGER_NAME in self.made and not before
        return budgets.reserve(file, folder, subject, charged=before, asked=asked, is_new=is_new)


def begin_segment(ledger: Ledger, level: StepSettings) -> None:
    """The steps that follow are charged with the settings of `level`."""
    ledger.begin(
        level.sample_rate,
        level.joint_noise_multiplier,
        level.clip_norm,
        level.expected_batch_size,
        level.noise,
        level.loss_bound,
        **({"records_per_unit": level.records_per_unit} if level.records_per_unit > 1 else {}),
        **({} if level.contribution_bound is None else {"contribution_bound": level.contribution_bound}),
    )
