"""A budget file and the plan of a run -> a reservation in the file, or an error: several runs on one data set stay
within a total.

The file is JSON: the total (epsilon, delta) and, for each run that uses it, segments as in a ledger. Before its first
step, a run reserves its whole plan and what its ledger already holds. All reservations, composed as one mechanism at
the total's delta, stay within the total. When training ends, the reservation becomes what the run claims: its plan, if
it took a step, however early it ended. A run that was killed or failed keeps its reservation until it is resumed, or
until `settle` says that it will not be.

Composition is adaptive in what later runs do with the results of earlier ones: learning rate, model and starting
weights may depend on them. Noise, sample rate and number of steps may not: numerical composition holds for plans that
are chosen without looking at what earlier runs released. If a result decides how much is spent next, the total does not
hold.

A run is identified by a token beside its ledger, and by its folder: the copy of a folder counts as another run. An
older copy of the budget file that is put back lacks what was spent since then; nothing can detect that.
"""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from hf_dp import durable
from hf_dp.accounting import affordable_steps, delta_problems, round_up, spent, target_problems
from hf_dp.errors import BudgetError
from hf_dp.ledger.budget_file import TOKEN_NAME, Budget, BudgetEntry, BudgetSubject, encoded, locked, read
from hf_dp.mechanism import Segment, first_steps

__all__ = ["TOKEN_NAME", "BudgetSubject", "allow_any_data", "create", "read", "reserve", "settle", "try_plan"]


def create(path: Path, target_epsilon: float, target_delta: float, *, any_data: bool = False) -> None:
    """Creates a budget at `path`.

    Raises:
        BudgetError: numbers out of range; there is a file already; or the file can't be written.
    """
    wrong = [*target_problems(target_epsilon), *delta_problems(target_delta)]
    if wrong:
        raise BudgetError(f"{path}: {'; '.join(wrong)}")
    try:
        made = durable.create(path, encoded(Budget(float(target_epsilon), float(target_delta), any_data)))
    except OSError as error:
        raise BudgetError(f"{path} can't be written ({error.strerror}): choose a folder that exists") from error
    if not made:
        raise BudgetError(f"{path} exists already: a total is not changed. `hf-dp budget {path}` shows it")


def allow_any_data(path: Path) -> None:
    """Lets runs on records in any form use the budget from now on."""
    with locked(path):
        durable.replace(path, encoded(replace(read(path), any_data=True)))


def try_plan(path: Path, planned: Sequence[Segment]) -> str:
    """What the budget would come to with one more run of this plan. It reserves nothing, and does not compare the
    records.

    Raises:
        BudgetError: the plan would exceed the total, or there is no budget.
    """
    path = path.resolve()
    budget = read(path)
    others = budget.segments()
    if not _fits(budget, [*others, *planned]):
        raise BudgetError(_too_much(path, budget, others, planned))
    together = round_up(spent([*others, *planned], budget.target_delta).epsilon)
    return (
        f"The budget {path} has room for this plan: {len(budget.runs)} runs and this one would come to epsilon "
        f"{together:.5g} of {budget.target_epsilon:g} at delta {budget.target_delta:g}"
    )


def reserve(
    path: Path,
    folder: Path,
    subject: BudgetSubject,
    *,
    charged: Sequence[Segment],
    asked: Sequence[Segment],
    is_new: bool,
) -> int:
    """Reserves the steps `asked` beside what the run's ledger has `charged`, in place of the run's earlier reservation.

    A run that is resumed after it was killed gets as many of them as fit, because the steps that it lost are charged
    again.

    Args:
        path: the budget file.
        folder: the run's output folder, where its ledger lies.
        subject: what the run is about.
        charged: everything in the ledger so far.
        asked: the most that this session may take; at least one step.
        is_new: the ledger was just created for this run, so a token in the folder belongs to an earlier one.

    Returns:
        The number of steps granted.

    Raises:
        BudgetError: all runs together would exceed the total; other data, unit or relation; a run without a guarantee;
            a total delta that is not below 1 / N; a ledger with fewer steps than the budget knows of; or no budget
            there.
    """
    path, folder = path.resolve(), folder.resolve()
    with locked(path):
        budget = read(path)
        known = None if is_new else budget.known(folder)
        wrong = [*_mismatches(budget, subject), *_rolled_back(known, charged)]
        if wrong:
            raise BudgetError(f"this run can't use the budget {path}: {'; '.join(wrong)}")
        others = [*budget.segments(but=known), *charged]
        granted = _steps(asked) if _fits(budget, [*others, *asked]) else 0
        if known is not None and not known.ended and not granted:
            granted = _steps_that_fit(budget, others, asked)
        if granted:
            token = known.token if known is not None else secrets.token_hex(16)
            durable.replace(folder / TOKEN_NAME, token.encode())  # first: a kill in between is a run that is not known
            earlier = known.segments if known is not None and charged else ()  # a claim already, whatever comes now
            segments = _costliest(budget, known, [*charged, *first_steps(asked, granted)], earlier)
            run = BudgetEntry(token, str(folder), False, _steps(charged), segments)
            durable.replace(
                path, encoded(replace(budget, subject=budget.subject or subject).after(run, instead_of=known))
            )
            return granted
    raise BudgetError(_too_much(path, budget, others, asked))


def settle(path: Path, folder: Path, charged: Sequence[Segment], plans: Sequence[Sequence[Segment]] = ()) -> None:
    """Ends the reservation of the run in `folder`: its entry becomes the costliest of what it charged and of its plans.

    Raises:
        BudgetError: the budget knows no such run, or more steps than its ledger has.
    """
    path, folder = path.resolve(), folder.resolve()
    with locked(path):
        budget = read(path)
        known = budget.known(folder)
        if known is None:
            raise BudgetError(f"{path} knows of no run in {folder}: `hf-dp budget {path}` shows those that it knows")
        wrong = [*_rolled_back(known, charged)]
        if wrong:
            raise BudgetError(f"{folder} can't be settled with the budget {path}: {'; '.join(wrong)}")
        run = BudgetEntry(known.token, str(folder), True, _steps(charged), _costliest(budget, known, charged, *plans))
        durable.replace(path, encoded(budget.after(run, instead_of=known)))


# ---- what may be ---------------------------------------------------------------------------------------------------


def _mismatches(budget: Budget, subject: BudgetSubject) -> Iterator[str]:
    if budget.target_delta >= 1 / subject.num_examples:
        yield (
            f"its delta is {budget.target_delta:g}, and must be below 1 / N = {1 / subject.num_examples:.3g}: "
            "create one with a smaller delta"
        )
    first = budget.subject
    if first is None:
        return
    if (subject.unit, subject.relation) != (first.unit, first.relation):
        yield f"it counts one {first.unit} under {first.relation}, the run one {subject.unit} under {subject.relation}"
    if subject.data != first.data and not budget.any_data:
        yield (
            f"its first run had other training records ({first.num_examples:,} of them; this run has "
            f"{subject.num_examples:,}), or the same in another form or order (another tokenizer, another length), or "
            "the key beside the budget file is lost. Where the same people are in both, their costs add up: let both "
            "use it with `hf-dp budget FILE --any-data`. Give a budget of its own only to data about other people"
        )


def _rolled_back(known: BudgetEntry | None, charged: Sequence[Segment]) -> Iterator[str]:
    if known is not None and _steps(charged) < known.charged:
        yield (
            f"its ledger has {_steps(charged):,} steps, and the budget knows of {known.charged:,}: put the newest "
            "ledger back"
        )


def _fits(budget: Budget, segments: Sequence[Segment]) -> bool:
    return spent(segments, budget.target_delta).epsilon <= budget.target_epsilon


def _costliest(budget: Budget, known: BudgetEntry | None, *runs: Sequence[Segment]) -> tuple[Segment, ...]:
    """The one of `runs` (what this run may come to) with which all runs together cost most."""
    found = list(dict.fromkeys(_merged(segments) for segments in runs))
    found = [a for a in found if not any(a != b and _is_within(a, b) for b in found)]
    others = budget.segments(but=known)
    if len(found) == 1:
        return found[0]
    return max(found, key=lambda segments: spent([*others, *segments], budget.target_delta).epsilon)


def _is_within(few: Sequence[Segment], many: Sequence[Segment]) -> bool:
    """Whether `many` has at least as many steps of each kind as `few`."""
    counts = {s._replace(num_steps=0): s.num_steps for s in many}
    return all(s.num_steps <= counts.get(s._replace(num_steps=0), 0) for s in few)


def _steps_that_fit(budget: Budget, others: Sequence[Segment], asked: Sequence[Segment]) -> int:
    """How many of the steps `asked` fit into the budget beside the others."""
    return affordable_steps(others, asked, target_epsilon=budget.target_epsilon, delta=budget.target_delta)


def _too_much(path: Path, budget: Budget, others: Sequence[Segment], asked: Sequence[Segment]) -> str:
    """The error message: what is spent, what is asked, what is left, and what would fit."""
    total, delta, fits = budget.target_epsilon, budget.target_delta, _steps_that_fit(budget, others, asked)
    before, alone, after = (spent(s, delta).epsilon for s in (others, asked, [*others, *asked]))
    remedy = (
        f"There is room for {fits:,} such steps of the {_steps(asked):,}: lower num_train_epochs or max_steps to them, "
        "or raise the noise"
        if fits
        else "There is room for no such step: raise the noise"
    )
    if alone > total:
        remedy += f", or plan the run for the budget's delta (privacy.target_delta={delta:g})"
    elif not fits:
        remedy += ", or wait until a run that is under way ends"
    open_runs = sum(not run.ended for run in budget.runs)
    return (
        f"the budget {path} does not hold this run. Of epsilon {total:g} at delta {delta:g}, {before:.4g} is spent or "
        f"reserved by {len(budget.runs)} runs ({open_runs} of them not ended); this one asks {alone:.4g} by itself, "
        f"and together they would come to {after:.4g}. {remedy}. `hf-dp budget {path}` shows all. Nothing was trained"
    )


def _steps(segments: Sequence[Segment]) -> int:
    return sum(s.num_steps for s in segments)


def _merged(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """One segment for each (q, sigma, noise); none without steps."""
    counts: dict[Segment, int] = {}
    for s in segments:
        kind = s._replace(num_steps=0)
        counts[kind] = counts.get(kind, 0) + s.num_steps
    return tuple(kind._replace(num_steps=steps) for kind, steps in counts.items() if steps)
