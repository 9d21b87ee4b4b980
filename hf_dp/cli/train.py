"""A recipe -> a private model with its card in the output folder: the whole run."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hf_dp.recipe import Recipe
    from hf_dp.training import DPTrainer


def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, as many as you like.")] = None,
) -> None:
    """Trains a recipe's model with differential privacy and writes its card."""
    from hf_dp.cli.folders import no_empty_folder
    from hf_dp.cli.libraries import quiet
    from hf_dp.recipe import read

    quiet()
    asked = read(recipe, overrides or [])
    with no_empty_folder(asked.output_dir):
        _run(asked)


def _run(asked: "Recipe") -> None:
    from hf_dp.cli.tables import print_metrics
    from hf_dp.errors import LedgerError
    from hf_dp.ledger import LEDGER_NAME, has_steps
    from hf_dp.recipe import task
    from hf_dp.training import MetricsFile

    resume = asked.training.get("resume_from_checkpoint")
    if not resume and has_steps(asked.output_dir / LEDGER_NAME):
        raise LedgerError(
            f"{asked.output_dir} holds the ledger of another training. Choose another folder "
            "(training.output_dir=FOLDER), or resume that run (training.resume_from_checkpoint=true); what was spent "
            "on the same data adds up either way"
        )
    trainer = task.build(asked, callbacks=[MetricsFile()])
    before = task.evaluate(trainer)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        _print_interrupted(trainer, asked)
        raise
    trainer.save_model()
    after = task.evaluate(trainer)
    trainer.write_card()  # again, with the results
    if trainer.is_world_process_zero():
        if after:
            print_metrics(before, after)
        _print_end(trainer, asked)
        task.tell_class_names(trainer, asked)


def _print_interrupted(trainer: "DPTrainer", asked: "Recipe") -> None:
    """Prints what is charged, and how to go on."""
    from hf_dp.ledger import has_checkpoint

    steps = trainer.privacy_spent().num_steps
    if not trainer.is_world_process_zero() or not steps:
        return
    how = (
        "resume with training.resume_from_checkpoint=true"
        if has_checkpoint(asked.output_dir)
        else "there is no checkpoint to resume from (training.save_strategy=steps writes some): start anew in another "
        "folder, and what was spent here adds to it"
    )
    print(f"\nInterrupted: {steps:,} steps are charged in {asked.output_dir}; {how}.", file=sys.stderr)


def _print_end(trainer: "DPTrainer", asked: "Recipe") -> None:
    """Prints what was spent, and where the files are."""
    from hf_dp.card import PRIVACY_JSON

    spent, folder = trainer.privacy_spent(), asked.output_dir
    if trainer.mechanism and trainer.mechanism.is_private:
        print(f"epsilon {spent.epsilon:.4g} at delta {spent.delta:g}, after {spent.num_steps} noisy steps.")
    else:
        print(f"NOT PRIVATE: epsilon is infinite, after {spent.num_steps} steps.")
    if trainer.eval_dataset is not None and not asked.privacy.public_eval:
        print(
            "The numbers on the validation set are not covered by it\n"
            "(privacy.public_eval=true declares that set public)."
        )
    print(f"Model: {folder}\nCard: {folder / 'README.md'}\nRecord: {folder / PRIVACY_JSON}")
