"""One private run while it lasts: ledger, keys and the exit, opened when training starts and closed when it ends."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from hf_dp import accounting, card, durable
from hf_dp.audit import Counts, audit_record
from hf_dp.errors import AuditError, BudgetError, ConfigError, HfDpError, LedgerError, ReleaseError
from hf_dp.ledger import (
    COMPLETE,
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
from hf_dp.randomness import STD, ChaChaKey, Key, NoiseSource, fresh_key
from hf_dp.step.release import Releaser


class PrivacySpent(NamedTuple):
    """(epsilon, delta) of a training that has taken `num_steps` noisy steps, those of earlier sessions and those lost in crashes included.

    Epsilon is that of the plan from the first step on, however early the training ends (`accounting.claimed`).
    """

    epsilon: float
    delta: float
    num_steps: int


class PrivateRun:
    """The private half of a training: what was charged, the key of the draws, and `release`.

    Only process 0 holds the ledger, the noise and the file; the others know the segments at the start and count along.

    Attributes:
        sampling_key: 128 secret bits, the same on all processes, new at every `open`.
        exhausted: one more step would exceed the target epsilon.
        level: the settings of the step under way.
    """

    def __init__(
        self,
        mechanism: Mechanism,
        folder: Path,
        process_index: int,
        num_processes: int,
        budget_file: str | None = None,
    ) -> None:
        self.mechanism = mechanism
        self.folder = folder
        self.sampling_key: Key = 0
        self._process, self._processes = process_index, num_processes
        self._ledger: Ledger | None = None
        self._releaser: Releaser | None = None
        self._before: tuple[Segment, ...] = ()
        self._plans: tuple[tuple[Segment, ...], ...] = ()  # those of earlier sessions under which a step was taken
        self._plan: tuple[Segment, ...] = ()  # all steps of this session's, those before included
        self.level = mechanism.at(0)
        self._first_step = self._first_draw = 0  # of this session, the number of the step and of the draw that it took
        self._taken: list[Segment] = []
        self._allowed = 0
        self._seed: int | None = None
        self._opened_before = False
        self._budget_file = None if budget_file is None else Path(budget_file).expanduser().absolute()
        self._made: list[Path] = []

    # ---- opening and closing ---------------------------------------------------------------------------------------

    def open(self, dataset: Any, checkpoint: Path | None, *, seed: int | None, epoch_length: int = 1) -> None:
        """Opens or continues the ledger on process 0, shares key and segments, and sees what the budget still allows.

        Args:
            dataset: the training set; its keyed fingerprint must be the ledger's.
            checkpoint: what training resumes from, or None.
            seed: for tests alone; marks the ledger as not private.
            epoch_length: draws of an epoch. A Trainer that resumes within one passes over the draws before, unread.

        Raises:
            LedgerError: on every process, whatever goes wrong on process 0.
            ConfigError: the target epsilon is spent, or the processes were given different plans or data; a BudgetError: the budget
                file does not hold the plan.

        Whatever ends it before it returns, an interrupt too, leaves no lock and no new ledger.
        """
        try:
            self._open(dataset, checkpoint, seed, epoch_length)
        except BaseException:
            self._withdraw()
            raise

    def _open(self, dataset: Any, checkpoint: Path | None, seed: int | None, epoch_length: int) -> None:
        self._seed, self._made = seed, []
        self._first_step = max(0, step_of(checkpoint)) if checkpoint else 0
        self._first_draw = self._first_step % epoch_length
        self._taken = []
        self._shared(lambda: self._refuse_another_training(checkpoint))
        key = self._shared(lambda: key_of(self.folder))
        found = under_key(dataset, key)
        self._refuse_differences(found)
        self._shared(lambda: self._open_ledger(found, checkpoint))
        self.level = self.at(self._first_draw)
        self._before, self._plans = self._shared(self._found)
        self.sampling_key = self._shared(lambda: self._key(fresh_key() if seed is None else seed))
        noise = NoiseSource(key=self._key(fresh_key() if seed is None else seed + 1)) if self._process == 0 else None
        self._releaser = Releaser(self._ledger, noise, process_index=self._process, num_processes=self._processes)
        self._allowed = self._affordable()
        self._opened_before = True
        if self._allowed == 0:
            spent = self.spent()
            raise ConfigError(
                f"the budget is spent: epsilon {spent.epsilon:.4g} after {spent.num_steps} steps, target "
                f"{self.mechanism.target_epsilon}; raise target_epsilon, or start anew in another output_dir"
            )
        if self._budget_file is not None:
            most = min(self._allowed, max(1, self.mechanism.num_steps - self._first_step))
            self._allowed = self._shared(lambda: self._reserve(dataset, most))
        upcoming = self._upcoming()
        self._plan = united((*self._before, *upcoming))
        self._shared(lambda: self._ledger.plan(upcoming) if self._ledger else None)

    def close(self) -> None:
        """Closes the ledger; what was spent can still be asked. A part reserved in the budget file stays reserved."""
        if self._ledger is not None:
            self._ledger.close()

    def _withdraw(self) -> None:
        """Closes the ledger, and takes away what this opening has made, where nothing is charged there."""
        if self._ledger is not None and self.folder / LEDGER_NAME in self._made and not self._ledger.num_steps:
            self._opened_before = False
            for made in self._made:  # while it is locked
                made.unlink(missing_ok=True)
        self.close()

    def settle(self) -> None:
        """Training has ended: gives back to the budget file what was reserved and is not claimed. On process 0."""
        if self._budget_file is None or self._ledger is None:
            return
        try:
            record = self._ledger.record()
            budgets.settle(self._budget_file, self.folder, record.segments, record.plans)
        except HfDpError as error:  # too much stays counted, and a finished training is worth more than that
            print(
                f"The budget still counts this run's whole plan ({error}). Later: "
                f"hf-dp budget {self._budget_file} --settle {self.folder}",
                file=sys.stderr,
            )

    def _reserve(self, dataset: Any, num_steps: int) -> int:
        """On process 0: the steps that the budget grants to this session."""
        assert self._budget_file is not None
        assert self._ledger is not None
        m, is_new = self.mechanism, self.folder / LEDGER_NAME in self._made and not self._before
        if not m.is_private:
            raise BudgetError(
                "a run without noise, or with a debug_seed, has an infinite epsilon, which no budget holds: leave budget_file "
                "out where the data are public"
            )
        budgets.read(self._budget_file)  # before a key is made beside it
        about = budgets.BudgetSubject.run(m, fingerprint(dataset, self._budget_file.resolve().parent))
        asked = m.segments(self._first_step, num_steps)
        return budgets.reserve(self._budget_file, self.folder, about, charged=self._before, asked=asked, is_new=is_new)

    def _refuse_another_training(self, checkpoint: Path | None) -> None:
        """On process 0, before any file is made here."""
        path = self.folder / LEDGER_NAME
        self._made = [p for p in (path, self.folder / KEY_NAME) if not p.exists()]
        if checkpoint is None and not self._opened_before and has_steps(path):
            raise LedgerError(
                f"{path} holds what another training in this folder spent. Resume it (resume_from_checkpoint=True), or choose "
                "another output_dir; what was spent on the same data adds up either way"
            )
        if path.exists() and self._budget_file is None and (self.folder / budgets.TOKEN_NAME).exists():
            raise BudgetError(
                f"the run in {self.folder} uses a budget, which would not see its further steps: give budget_file"
            )

    def _refuse_differences(self, data_fingerprint: str) -> None:
        """The noise of process 0 fits what the others clip, and their slices are one draw, only if plan and data are the same."""
        if self._processes == 1:
            return
        everybodys: list[Any] = [None] * self._processes
        dist.all_gather_object(everybodys, (asdict(self.mechanism), data_fingerprint))
        (plan, data), wrong = everybodys[0], []
        for number, (other, others_data) in enumerate(everybodys):
            wrong += [
                f"{name} is {other[name]} on process {number}, {plan[name]} on 0"
                for name in plan
                if other[name] != plan[name]
            ]
            wrong += (
                [f"the records of process {number} are not those of 0, in their order"] if others_data != data else []
            )
        if wrong:
            raise ConfigError(
                f"all processes need one plan and the same data; {'; '.join(wrong)}. Give all of them the same recipe and files"
            )

    def _open_ledger(self, data_fingerprint: str, checkpoint: Path | None) -> None:
        """On process 0: a new ledger, the one that the checkpoint's run wrote, or this run's own from an earlier train()."""
        if self._process != 0:
            return
        m, path = self.mechanism, self.folder / LEDGER_NAME
        header = LedgerHeader(
            num_examples=m.num_examples,
            unit=m.unit,
            relation=m.relation,
            delta=m.delta,
            data_fingerprint=data_fingerprint,
            debug=m.debug,
        )
        if checkpoint is not None:
            refuse_rollback(path, checkpoint)
        self._ledger = Ledger.open(path, header)
        self._begin(self._first_draw)

    def _key(self, secret: int) -> Key:
        """For the generator that the mechanism names."""
        return secret if self.mechanism.generator == "philox" else ChaChaKey(secret)

    def _found(self) -> tuple[tuple[Segment, ...], tuple[tuple[Segment, ...], ...]]:
        """On process 0: what was charged before this session, and under which plans."""
        assert self._ledger is not None
        record = self._ledger.record()
        return record.segments, record.plans

    def _upcoming(self) -> tuple[Segment, ...]:
        """What this session plans to take."""
        left = max(0, self.mechanism.num_steps - self._first_step)
        return self.mechanism.segments(self._first_step, min(self._allowed, left))

    def _affordable(self) -> int:
        """The steps that the target leaves; none where a plan that was begun before exceeds it."""
        m = self.mechanism
        if m.target_epsilon is None:
            return m.num_steps
        if accounting.spent(accounting.claimed(self._before, self._plans, m.delta), m.delta).epsilon > m.target_epsilon:
            return 0
        upcoming = m.segments(self._first_step, m.num_steps)
        return accounting.affordable_steps(self._before, upcoming, target_epsilon=m.target_epsilon, delta=m.delta)

    def _shared(self, on_process_0: Any) -> Any:
        """The value that process 0 computes, on every process; its error, on every process too."""
        outcome: list[Any] = [None, None]
        if self._process == 0:
            try:
                outcome[0] = on_process_0()
            except HfDpError as error:
                outcome[1] = error
        if self._processes > 1:
            outcome[0] = None if self._process == 0 and outcome[1] is not None else outcome[0]
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    # ---- while it runs ---------------------------------------------------------------------------------------------

    def at(self, draw_number: int) -> StepSettings:
        """The settings of the step that takes this draw of this session: draws and steps are counted alike."""
        return self.mechanism.at(self._first_step + draw_number - self._first_draw)

    def release(self, clipped_sum: Tensor, draw_number: int) -> Tensor:
        """The one exit of a step: charged, noised, reduced; float32 [P]. `clipped_sum` is this process's part, flat, float32 or int64.

        Raises:
            ReleaseError: not the draw that `told_to_all` was given, a step beyond the last, or as `Releaser`.
        """
        assert self._releaser is not None, "release before open"
        self._refuse_beyond()
        try:
            noisy = self._releaser(
                clipped_sum,
                sensitivity=self.level.sensitivity,
                noise_multiplier=self.level.joint_noise_multiplier,
                draw_number=draw_number,
            )
        finally:
            self._taken.append(self.level.steps(1))  # charged, whatever came after
        # what follows the noise is post-processing, in whatever arithmetic
        return (noisy.double() * (self.mechanism.noise_std / STD)).float() if self.mechanism.is_discrete else noisy

    @contextmanager
    def told_to_all(self, own_sum: Tensor, draw_number: int, *, waiting_in_release: bool = True) -> Iterator[None]:
        """Around a process's work on its part of a step, at its `level`: where it fails, the step is charged and the others learn it.

        Args:
            own_sum: of the shape of what will be released.
            draw_number: of the draw that the step takes.
            waiting_in_release: the others go on to `release`. Not so where weights are sharded: there they wait for ours, and
                learn by our end.
        """
        assert self._releaser is not None, "a step before open"
        self._refuse_beyond()
        try:
            self._begin(draw_number)
            yield
        except BaseException as error:
            self._taken.append(self.level.steps(1))  # abandon charges it
            self._releaser.abandon(
                own_sum, tell=waiting_in_release and isinstance(error, Exception)
            )  # an interrupt waits for nobody
            raise

    def _begin(self, draw_number: int) -> None:
        """The ledger's segment, and `level`, are those of this draw from here on."""
        if self.mechanism.levels and draw_number != self._first_draw + len(self._taken):
            raise ReleaseError(
                f"expected draw {self._first_draw + len(self._taken)} for the next step of the schedule, got {draw_number}: draws must "
                "come in their order, none left out"
            )
        self.level = m = self.at(draw_number)
        if self._ledger is not None:
            begin = self._ledger.begin
            begin(m.sample_rate, m.joint_noise_multiplier, m.clip_norm, m.expected_batch_size, m.noise, m.loss_bound)

    @property
    def exhausted(self) -> bool:
        """Whether one more step would exceed the target epsilon."""
        return len(self._taken) >= self._allowed

    def _refuse_beyond(self) -> None:
        """Whoever goes on after the last step that was planned or can be afforded."""
        if self.exhausted:
            raise ReleaseError(
                f"all {self._allowed} steps of this training are taken, and one more would exceed its target or its plan: nothing was "
                "charged or released"
            )

    def forward_seed(self) -> int | None:
        """None: the forward pass draws its dropout from the operating system. A number only in debugging."""
        return None if self._seed is None else self._seed + 1000 * (len(self._taken) + 1) + self._process

    def spent(self) -> PrivacySpent:
        """What is claimed of this folder's training, and how many steps were charged, this session's included."""
        charged = self._charged()
        claimed = accounting.claimed(charged, self._begun_plans(), self.mechanism.delta)
        return PrivacySpent(self._epsilon(claimed), self.mechanism.delta, sum(s.num_steps for s in charged))

    def epsilon_of_steps_taken(self) -> float:
        """Epsilon of what was charged by itself: it holds only for a number of steps that was fixed beforehand."""
        return self._epsilon(self._charged())

    def _epsilon(self, segments: tuple[Segment, ...]) -> float:
        infinite = self.mechanism.debug and any(s.num_steps for s in segments)
        return float("inf") if infinite else accounting.spent(segments, self.mechanism.delta).epsilon

    def _charged(self) -> tuple[Segment, ...]:
        """As the ledger has it; without one, counted along."""
        return (*self._before, *self._taken) if self._ledger is None else self._ledger.segments()

    def _begun_plans(self) -> tuple[tuple[Segment, ...], ...]:
        return (*self._plans, self._plan) if self._taken else self._plans

    # ---- what is left behind ---------------------------------------------------------------------------------------

    def seal_checkpoint(self, folder: Path) -> None:
        """Puts the ledger's copy and the completion marker into a checkpoint that Trainer has finished writing."""
        if self._ledger is not None:
            self._ledger.copy_to(folder)
            durable.replace(folder / COMPLETE, json.dumps({"ledger_head": self._ledger.head}).encode())

    def audited(self, counts: Counts | None) -> dict[str, object]:
        """What an audit's counts mean for all that was charged.

        Raises:
            AuditError: there are none.
        """
        if counts is None:
            raise AuditError("nothing was audited: give DPTrainer audit=AuditConfig(), and train")
        spent = self.spent()
        claimed = accounting.claimed(self._charged(), self._begun_plans(), spent.delta)
        return audit_record(counts, claimed, spent.delta, spent.epsilon).stated()

    def write_card(self, folder: Path, *, public_eval: bool, audit: Counts | None = None) -> None:
        """README.md's privacy section and privacy.json, from what was charged. On process 0; before any step, nothing."""
        if self._ledger is None:
            return
        declared = {"public_eval": public_eval}
        record = card.privacy_record(
            self.mechanism, self._ledger.record(), libraries=card.library_versions(), declared=declared, audit=audit
        )
        card.write_card(folder, record)
