"""A recipe -> the same run with canaries among its records, and a table of what they show about its epsilon."""

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hf_dp.audit import AuditRecord
    from hf_dp.config import AuditConfig
    from hf_dp.recipe import Recipe
    from hf_dp.step import PrivacySpent

CLAIM = (
    "privacy.target_epsilon",
    "privacy.noise_multiplier",
)  # an override of one of these sets the claim that is audited


def audit(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, as many as you like.")] = None,
    num_canaries: Annotated[int, typer.Option(help="m. Fewer than 300 show little; see the ceiling.")] = 300,
    kind: Annotated[
        str, typer.Option(help="gradient (any model), random-token or new-token (causal LMs).")
    ] = "gradient",
    membership: Annotated[
        int | None, typer.Option(help="In place of canaries: train so many models on halves of the records; see below.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="With --membership: draw true against false positives.")] = None,
) -> None:
    """Measures a lower bound on epsilon: trains the recipe with canaries, at claim 1 unless an override says otherwise.

    First comes a positive control, without noise and on the canaries alone: an audit without power finds nothing in any
    run.

    With --membership 16: LiRA, an attack on the recipe as it stands, at its own epsilon. Sixteen models, and sixteen
    more without noise, are trained on random halves of the records; none is kept.
    """
    from hf_dp.cli.folders import no_empty_folder
    from hf_dp.cli.libraries import quiet
    from hf_dp.config import AuditConfig
    from hf_dp.errors import ConfigError
    from hf_dp.recipe import read

    quiet()
    asked = read(recipe, overrides or [])
    if membership is not None:
        from hf_dp.cli.membership import attack_membership

        attack_membership(asked, membership, plot)
        return
    if plot is not None:
        raise ConfigError("--plot draws what --membership N finds: give both")
    if not any(o.startswith(CLAIM) for o in overrides or []):
        claim = dataclasses.replace(asked.privacy, target_epsilon=1.0, noise_multiplier=None)
        asked = dataclasses.replace(asked, privacy=claim)
    if asked.privacy.target_delta is None:  # the general bound's error grows with m x delta
        asked = dataclasses.replace(asked, privacy=dataclasses.replace(asked.privacy, target_delta=1e-5))
    config = AuditConfig(num_canaries=num_canaries, kind=kind)  # type: ignore[arg-type]
    with no_empty_folder(asked.output_dir):
        _audited(asked, config)


def _audited(asked: "Recipe", config: "AuditConfig") -> None:
    from hf_dp.audit import AuditRecord
    from hf_dp.errors import LedgerError
    from hf_dp.ledger import LEDGER_NAME
    from hf_dp.recipe import task
    from hf_dp.tables import console, print_table

    if (asked.output_dir / LEDGER_NAME).exists():
        raise LedgerError(
            f"{asked.output_dir} holds the ledger of another training: choose another folder "
            "(training.output_dir=FOLDER)"
        )
    control = _control(asked, config)
    trainer = task.build(asked, audit=dataclasses.replace(config, control_auc=control))
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        found = AuditRecord.of(trainer.audit_result())
        print_table("The audit", ("", "value", "meaning"), _rows(found, trainer.privacy_spent()))
        claim = f"the claim of epsilon {trainer.privacy_spent().epsilon:.4g}"
        console().print(f"{_verdict(found)}: {claim}. Card: {asked.output_dir / 'README.md'}")
        if found.refuted:
            raise typer.Exit(1)


def _verdict(found: "AuditRecord") -> str:
    from hf_dp.audit import has_power

    if found.refuted:
        return "[bold red]REFUTED[/]"
    if not has_power(found.control_area_under_curve):
        return "Not refuted, but the audit has no power, so that nothing follows"
    return "Not refuted"


def _control(asked: "Recipe", config: "AuditConfig") -> float:
    """Area under the curve of the same run without noise, on the canaries alone. Its folder is deleted."""
    from hf_dp.audit import AuditRecord
    from hf_dp.recipe import task

    print("Positive control: without noise, on the canaries alone.")
    free = dataclasses.replace(asked.privacy, target_epsilon=None, noise_multiplier=0.0, budget_file=None)
    with tempfile.TemporaryDirectory() as folder:
        training = {**asked.training, "output_dir": folder, "save_strategy": "no", "push_to_hub": False}
        training |= {"eval_strategy": "no", "load_best_model_at_end": False}
        like = dataclasses.replace(asked, privacy=free, training=training)
        trainer = task.build(like, audit=dataclasses.replace(config, control=True))
        trainer.train()
        return AuditRecord.of(trainer.audit_result()).area_under_curve


def _rows(found: "AuditRecord", spent: "PrivacySpent") -> list[tuple[str, str, str]]:
    from hf_dp.audit import power

    shares = ", ".join(f"{v} of {r}" for r, v in found.guesses)
    gaussian = found.epsilon_at_least_if_gaussian, found.ceiling_if_gaussian
    return [
        ("claim", f"{spent.epsilon:.4g}", f"epsilon at delta {spent.delta:g}, after {spent.num_steps} steps"),
        (
            "epsilon at least",
            f"{found.epsilon_at_least:.4g}",
            f"for any mechanism, with {found.confidence:.0%} confidence",
        ),
        ("the same, if Gaussian", f"{gaussian[0]:.4g}", "were the run's trade-off function a Gaussian one"),
        (
            "ceiling",
            f"{found.ceiling:.4g}",
            f"what {found.num_canaries} canaries can show at most; {gaussian[1]:.4g} if Gaussian",
        ),
        ("right guesses", shares, "about the coins of a tenth, three tenths and all of the canaries"),
        ("area under the curve", f"{found.area_under_curve:.3f}", "of the canaries' scores; 0.5 is guessing"),
        ("power", f"{found.control_area_under_curve:.3f}", power(found.control_area_under_curve)),
    ]
