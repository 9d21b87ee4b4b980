"""Steps charged, and the plans they were taken under -> the (epsilon, delta) that is claimed of a training."""

from pathlib import Path
from typing import NamedTuple

from hf_dp import accounting
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.mechanism import Mechanism, Segment


class PrivacySpent(NamedTuple):
    """(epsilon, delta) of a training after `num_steps` noisy steps.

    The steps of earlier sessions count, and those lost in crashes. From the first step on, epsilon is that of the whole
    plan, however early the training ends (see `accounting.claimed`).
    """

    epsilon: float
    delta: float
    num_steps: int


class Spending(NamedTuple):
    """What a training has spent.

    Attributes:
        mechanism: of the training; gives delta, and says whether it is a debugging run, whose epsilon is infinite.
        charged: all steps charged so far.
        plans: each plan under which at least one step was taken.
    """

    mechanism: Mechanism
    charged: tuple[Segment, ...]
    plans: tuple[tuple[Segment, ...], ...]

    @classmethod
    def noted(cls, mechanism: Mechanism, folder: Path) -> "Spending":
        """What the ledger in `folder` says; nothing where there is none.

        Raises:
            LedgerError: the ledger is damaged.
        """
        path = folder / LEDGER_NAME
        if not path.exists():
            return cls(mechanism, (), ())
        record = read_ledger(path)
        return cls(mechanism, record.segments, record.plans)

    def claimed(self) -> tuple[Segment, ...]:
        """The steps whose epsilon is claimed: those of a plan, once a step of it was taken."""
        return accounting.claimed(self.charged, self.plans, self.mechanism.delta)

    def total(self) -> PrivacySpent:
        """The claim, and how many steps were charged."""
        num_steps = sum(segment.num_steps for segment in self.charged)
        return PrivacySpent(self._epsilon(self.claimed()), self.mechanism.delta, num_steps)

    def epsilon_of_steps_taken(self) -> float:
        """Epsilon of the steps charged and no others: valid only where their number was fixed beforehand."""
        return self._epsilon(self.charged)

    def _epsilon(self, segments: tuple[Segment, ...]) -> float:
        infinite = self.mechanism.debug and any(segment.num_steps for segment in segments)
        return float("inf") if infinite else accounting.spent(segments, self.mechanism.delta).epsilon
