"""A recipe -> the inventory of what it would train, the self-check and the plan. Trains nothing, leaves nothing on
disk.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hf_dp.mechanism import Mechanism
    from hf_dp.sampling import Owners


def check(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, as many as you like.")] = None,
) -> None:
    """Shows every trainable parameter with its rule, checks the rules on made-up records, and prints the plan."""
    from hf_dp.cli.libraries import quiet
    from hf_dp.cli.tables import print_inventory
    from hf_dp.ledger import budget
    from hf_dp.recipe import columns_in_words, data_files, read, task, warnings
    from hf_dp.sampling import owners_in
    from hf_dp.training import print_plan_of

    quiet()
    asked = read(recipe, overrides or [])
    with tempfile.TemporaryDirectory() as folder:
        trainer = task.build(asked, output_dir=folder)
        rows = trainer.inventory()
        report = trainer.self_check()
    column, owned = asked.privacy.unit_column, None
    for which in ("train", "validation"):
        records = data_files.load(asked.data, which)
        if which == "train" and records is not None and column is not None:
            owned = owners_in(records, column) if column in records.column_names else None  # none of a split document
        if records is not None:
            print(f"data.{which}: {len(records):,} records of {columns_in_words(records)}")
            for warning in warnings(records, column) if which == "train" else ():
                print(f"WARNING (shown here alone): {warning}.")
    print_inventory(rows)
    mechanism = trainer.mechanism
    assert mechanism is not None  # a recipe always has a training set
    print_plan_of(trainer, "The plan")
    if owned is not None and asked.privacy.target_epsilon is not None:
        _print_ways(mechanism, owned)
    print(
        f"Self-check passed: a batch is the sum of its examples to {report['difference']:.1e} (rounding allows "
        f"{report['tolerance']:.0e}); removing one moves the clipped sum by {report['sensitivity']:.4f} x C, at most 1."
    )
    if asked.privacy.budget_file is not None:
        print(f"{budget.try_plan(Path(asked.privacy.budget_file), mechanism.segments())}.")
    print("Nothing was trained, nothing was written.")


def _print_ways(mechanism: "Mechanism", owned: "Owners") -> None:
    import numpy as np

    from hf_dp import accounting
    from hf_dp.tables import print_table

    if owned.in_lists:
        ways = accounting.ways_to_keep(mechanism, lambda bound: len(owned.kept(bound)))
    else:
        ways = accounting.ways_to_draw(mechanism, np.bincount(owned.of_pairs).tolist())
    rows = [
        (w.setting, f"{w.expected_batch_size:,.0f}", f"{w.kept:,}", f"{w.sigma:.3g}", f"{w.noise:.3g}") for w in ways
    ]
    heads = ("way", "B", "records used", "sigma", "noise on the mean, in C")
    print_table("Ways to draw (shown here alone): equal epsilon, steps, records a step", heads, rows)
