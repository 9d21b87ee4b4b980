"""One private run while it lasts, from `PrivateRun.open` to `close`: its charges, and the one exit of a step."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from torch import Tensor

from hf_dp.errors import HfDpError, ReleaseError
from hf_dp.ledger import LedgerRecord, seal
from hf_dp.ledger import budget as budgets
from hf_dp.mechanism import Mechanism, Segment, StepSettings
from hf_dp.randomness import STD
from hf_dp.step.coordinates import Coordinates
from hf_dp.step.opening import Opened, Place, Session, begin_segment, open_session
from hf_dp.step.release import Releaser
from hf_dp.step.spending import PrivacySpent, Spending


class PrivateRun:
    """The private half of a training session: what was charged, the key of the draws, and `release`.

    Made by `PrivateRun.open`. Only process 0 holds the ledger, the noise and the file; the others learn at the start
    what was charged, and count along.

    Attributes:
        mechanism: of the training.
        place: the output folder, and the processes that take part.
        sampling_key: 128 secret bits, the same on all processes, new in every session.
        level: the settings of the step under way.
    """

    def __init__(self, mechanism: Mechanism, place: Place, opened: Opened, seed: int | None = None) -> None:
        self.mechanism, self.place = mechanism, place
        self.sampling_key = opened.sampling_key
        self._opened, self._seed = opened, seed
        self._ledger = opened.ledger
        self._releaser = Releaser(
            opened.ledger, opened.noise, process_index=place.process_index, num_processes=place.num_processes
        )
        self._taken: list[Segment] = []  # one for each step of this session
        self.level = self.at(opened.first_draw)

    @classmethod
    def open(cls, mechanism: Mechanism, place: Place, session: Session) -> "PrivateRun":
        """Opens or continues the ledger on process 0, shares key and segments, and sees what the budget still allows.

        If anything ends it early, an interrupt included, neither a lock nor a new ledger is left behind.

        Raises:
            LedgerError: on every process, whatever goes wrong on process 0.
            ConfigError: the target epsilon is spent, or the processes were given different plans or data.
            BudgetError: the budget file does not hold the plan.
        """
        return cls(mechanism, place, open_session(mechanism, place, session), session.seed)

    def close(self) -> None:
        """Closes the ledger; what was spent can still be asked. A part reserved in the budget file stays reserved."""
        if self._ledger is not None:
            self._ledger.close()

    def settle(self) -> None:
        """After the training: gives back to the budget file what was reserved and is not claimed. On process 0."""
        file, folder = self.place.budget_file, self.place.folder
        if file is None or self._ledger is None:
            return
        try:
            record = self._ledger.record()
            budgets.settle(file, folder, record.segments, record.plans)
        except (
            HfDpError
        ) as error:  # the budget then counts too much; a finished training must not end in an error for that
            print(
                f"The budget still counts this run's whole plan ({error}). Later: hf-dp budget {file} --settle "
                f"{folder}",
                file=sys.stderr,
            )

    # ---- a step ----------------------------------------------------------------------------------------------------

    def at(self, draw_number: int) -> StepSettings:
        """The settings of the step that takes this draw of the session."""
        return self.mechanism.at(self._opened.first_step + draw_number - self._opened.first_draw)

    def release(self, clipped_sum: Tensor, draw_number: int, coordinates: Coordinates | None = None) -> Tensor:
        """The one exit of a step: charged, noised, reduced; float32 [P].

        Args:
            clipped_sum: this process's part, flat, [P], float32 or int64.
            draw_number: the draw that `told_to_all` was given.
            coordinates: of the process's shards, if the sum lies in shards. What is released then are its shards.

        Raises:
            ReleaseError: a step beyond the last; or as `Releaser`.
        """
        self._refuse_beyond()
        try:
            whole = self._releaser
            noisy = (whole if coordinates is None else partial(whole.of_shards, coordinates=coordinates))(
                clipped_sum,
                sensitivity=self.level.sensitivity,
                noise_multiplier=self.level.joint_noise_multiplier,
                draw_number=draw_number,
            )
        finally:
            self._taken.append(self.level.steps(1))  # charged, even if the release failed
        if not self.mechanism.is_discrete:
            return noisy
        return (noisy.double() * (self.mechanism.noise_std / STD)).float()  # post-processing, so rounding is harmless

    @contextmanager
    def told_to_all(self, own_sum: Tensor, draw_number: int, *, waiting_in_release: bool = True) -> Iterator[None]:
        """Around a process's part of a step: if it fails, the step is charged and the other processes are told.

        Args:
            own_sum: has the shape of what will be released.
            draw_number: the draw that the step takes; `level` becomes that of the draw.
            waiting_in_release: the other processes wait in `release`. False if weights are sharded: then they wait for
                this process's shards, and notice its end by themselves.
        """
        self._refuse_beyond()
        try:
            self._begin(draw_number)
            yield
        except BaseException as error:
            self._taken.append(self.level.steps(1))  # `abandon` charges it
            tell = waiting_in_release and isinstance(error, Exception)  # an interrupt must not wait for other processes
            self._releaser.abandon(own_sum, tell=tell)
            raise

    def _begin(self, draw_number: int) -> None:
        """Sets `level`, and the ledger's segment, to those of this draw."""
        expected = self._opened.first_draw + len(self._taken)
        if self.mechanism.levels and draw_number != expected:
            raise ReleaseError(
                f"expected draw {expected} for the next step of the schedule, got {draw_number}: draws must come in "
                "their order, none left out"
            )
        self.level = self.at(draw_number)
        if self._ledger is not None:
            begin_segment(self._ledger, self.level)

    @property
    def exhausted(self) -> bool:
        """Whether one more step would exceed the target epsilon or the plan."""
        return len(self._taken) >= self._opened.allowed

    def _refuse_beyond(self) -> None:
        if self.exhausted:
            raise ReleaseError(
                f"all {self._opened.allowed} steps of this training are taken, and one more would exceed its target or "
                "its plan: nothing was charged or released"
            )

    def forward_seed(self) -> int | None:
        """The seed of a step's dropout masks in debugging; else None, and masks come from the operating system."""
        return None if self._seed is None else self._seed + 1000 * (len(self._taken) + 1) + self.place.process_index

    # ---- what was spent --------------------------------------------------------------------------------------------

    def spending(self) -> Spending:
        """All steps charged in this folder, this session's included: from the ledger, or without one as counted."""
        before = self._opened.spending
        charged = (*before.charged, *self._taken) if self._ledger is None else self._ledger.segments()
        plans = (*before.plans, self._opened.plan) if self._taken else before.plans
        return Spending(self.mechanism, charged, plans)

    def spent(self) -> PrivacySpent:
        """What is claimed of this folder's training, and how many steps were charged."""
        return self.spending().total()

    def record(self) -> LedgerRecord | None:
        """Everything that the ledger says; None on all processes but 0."""
        return None if self._ledger is None else self._ledger.record()

    def seal_checkpoint(self, folder: Path) -> None:
        """On process 0: adds the ledger's copy and the completion marker to a checkpoint that Trainer has written."""
        if self._ledger is not None:
            self._ledger.copy_to(folder)
            seal(folder, self._ledger.head)
