"""A budget file -> a new one with a total, or a table of the runs that use it. Imports no torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hf_dp.ledger import Budget


def budget(
    file: Annotated[Path, typer.Argument(help="The budget file; PrivacyConfig(budget_file=...) uses it.")],
    target_epsilon: Annotated[float | None, typer.Option(help="Create it: the total of all runs together.")] = None,
    target_delta: Annotated[float | None, typer.Option(help="Create it: delta of the total, below 1 / N.")] = None,
    any_data: Annotated[
        bool, typer.Option("--any-data", help="Let runs on other forms of the data use it too.")
    ] = False,
    settle: Annotated[
        Path | None, typer.Option(help="Output folder of a run that will not be resumed: count what it claims.")
    ] = None,
) -> None:
    """Creates a privacy budget for several runs on the same data, or shows how much of it is spent and reserved."""
    from hf_dp.errors import ConfigError
    from hf_dp.ledger import LEDGER_NAME, Ledger, read_ledger
    from hf_dp.ledger import budget as budgets

    if (target_epsilon is None) != (target_delta is None):
        raise ConfigError("a new budget needs both --target-epsilon and --target-delta; to show one give neither")
    if target_epsilon is not None and target_delta is not None:
        budgets.create(file, target_epsilon, target_delta, any_data=any_data)
    elif any_data:
        budgets.allow_any_data(file)
    if settle is not None:
        ledger = settle / LEDGER_NAME
        with Ledger.open(
            ledger, read_ledger(ledger).header
        ) as opened:  # refused while it is trained, or older than a checkpoint
            record = opened.record()
            budgets.settle(file, settle, record.segments, record.plans)
    _show(file, budgets.read(file))


def _show(file: Path, found: "Budget") -> None:
    from hf_dp.accounting import round_up, spent
    from hf_dp.tables import print_table

    delta = found.target_delta
    rows = [
        (
            run.folder,
            "ended" if run.ended else "reserved",
            ", ".join(
                f"{s.num_steps:,} at q {s.sample_rate:.4g}, sigma {s.joint_noise_multiplier:.4g}" for s in run.segments
            ),
            f"{round_up(spent(run.segments, delta).epsilon):.5g}",
        )
        for run in found.runs
    ]
    title = f"{file}: epsilon {found.target_epsilon:g} at delta {delta:g} in all"
    print_table(title, ("run", "", "steps", "epsilon alone"), rows)
    together = round_up(spent(found.segments(), delta).epsilon)
    print(f"Together: epsilon {together:.5g} of {found.target_epsilon:g}.")
