"""Sizes and a target -> the plan with its rules, and what the run costs. Imports torch only where a model is named."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hf_dp.accounting import Derived
    from hf_dp.mechanism import Mechanism


def plan(
    num_examples: Annotated[int, typer.Option(help="N, the records of the training set.")],
    expected_batch_size: Annotated[int, typer.Option(help="B, the mean logical batch over all processes.")],
    epochs: Annotated[float | None, typer.Option(help="Passes over the data; or give --max-steps.")] = None,
    max_steps: Annotated[int, typer.Option(help="Steps, in place of epochs.")] = -1,
    target_epsilon: Annotated[float | None, typer.Option(help="Calibrate the noise to this epsilon.")] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="Or give sigma, and learn its epsilon.")] = None,
    target_delta: Annotated[float | None, typer.Option(help="Default: 1 / N**1.1, rounded down.")] = None,
    log_loss_up_to: Annotated[float | None, typer.Option(help="Release loss, up to this, and batch size too.")] = None,
    noise: Annotated[str, typer.Option(help="gaussian, gaussian-chacha20, or discrete.")] = "gaussian",
    noise_schedule: Annotated[str | None, typer.Option(help="How sigma goes on, such as exponential:0.5.")] = None,
    batch_schedule: Annotated[str | None, typer.Option(help="How B goes on, such as linear:4.")] = None,
    clip_norm: Annotated[float, typer.Option(help="C; it scales the noise and changes no epsilon.")] = 1.0,
    plot: Annotated[Path | None, typer.Option(help="Draw epsilon into this picture (png, svg, pdf).")] = None,
    against: Annotated[str | None, typer.Option(help="Of --plot: steps (default), sigma, batch or delta.")] = None,
    model: Annotated[str | None, typer.Option(help="Say what a run costs: a model's folder or name.")] = None,
    lora_r: Annotated[int | None, typer.Option(help="Cost: LoRA of this rank on all linear layers; else all.")] = None,
    num_processes: Annotated[int | None, typer.Option(help="Cost: processes, one a GPU. Default 1.")] = None,
    per_device_train_batch_size: Annotated[int | None, typer.Option(help="Cost: of a micro-batch. Default 8.")] = None,
    micro_batch_tokens: Annotated[int | None, typer.Option(help="Cost: the most tokens of a micro-batch.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Cost: tokens of an example, padded. Default 256.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Cost: A100, H100 (default), H200 or L40S.")] = None,
) -> None:
    """Says what noise a target epsilon needs, or what epsilon a noise gives, and what a run costs, before it begins."""
    from hf_dp import accounting
    from hf_dp.config import PrivacyConfig
    from hf_dp.errors import ConfigError
    from hf_dp.tables import print_plan, print_table

    if (epochs is None) == (max_steps <= 0):
        raise ConfigError("give exactly one of --epochs and --max-steps")
    if against and not plot:
        raise ConfigError("--against says what a picture is of: add --plot FILE")
    work = {
        "lora_r": lora_r,
        "num_processes": num_processes,
        "per_device_train_batch_size": per_device_train_batch_size,
        "micro_batch_tokens": micro_batch_tokens,
        "max_length": max_length,
    }
    _refuse_work(model, work, gpu)
    privacy = PrivacyConfig(
        target_epsilon=target_epsilon,
        noise_multiplier=noise_multiplier,
        target_delta=target_delta,
        expected_batch_size=expected_batch_size,
        clip_norm=clip_norm,
        log_loss_up_to=log_loss_up_to,
        noise_schedule=noise_schedule,
        batch_schedule=batch_schedule,
        noise=noise,  # type: ignore[arg-type]  # any text; PrivacyConfig says which there are
    )
    mechanism = accounting.plan_mechanism(privacy, num_examples, num_train_epochs=epochs or 0.0, max_steps=max_steps)
    rows = accounting.derivation(privacy, mechanism, num_train_epochs=epochs or 0.0, max_steps=max_steps)
    print_plan("The plan", rows, mechanism)
    if model is not None:
        print_table("What a run costs", ("", "value", "rule"), _cost(mechanism, model, work, gpu))
    if plot is not None:
        _draw(mechanism, plot, against or "steps", epochs)


def _draw(mechanism: "Mechanism", plot: Path, against: str, epochs: float | None) -> None:
    from hf_dp.accounting import plot_epsilon

    plot_epsilon(mechanism, plot, against, epochs)
    print(f"{'Noise at the same epsilon' if against == 'batch' else 'Epsilon'} against {against}: {plot}")


def _refuse_work(model: str | None, work: dict[str, int | None], gpu: str | None) -> None:
    from hf_dp.errors import ConfigError

    given = {f"--{name.replace('_', '-')}": value for name, value in work.items() if value is not None}
    wrong = [f"{name}: expected 1 or more, got {value}" for name, value in given.items() if value < 1]
    if (given or gpu) and model is None:
        names = [*given, *(["--gpu"] if gpu else [])]
        wrong.append(f"{', '.join(names)} only say what a model's run costs: add --model")
    if wrong:
        raise ConfigError("; ".join(wrong))


def _cost(mechanism: "Mechanism", model: str, work: dict[str, int | None], gpu: str | None) -> "list[Derived]":
    from hf_dp.accounting import advice
    from hf_dp.cli.libraries import quiet
    from hf_dp.recipe import gpu_cost, model_shapes, run_cost

    quiet()
    gpu_cost.card_of(gpu)
    shapes = model_shapes.of_name(model, work["lora_r"])
    dealt = run_cost.Work(
        num_processes=work["num_processes"] or 1,
        max_examples=work["per_device_train_batch_size"] or 8,
        max_tokens=work["micro_batch_tokens"],
        length=work["max_length"] or 256,
    )
    warning = advice.warning(mechanism, shapes.trainable)
    if warning:
        print(warning)
    rows = [*advice.loudness_rows(mechanism, shapes.trainable), *run_cost.derivation(mechanism, shapes, dealt)]
    return [*rows, *gpu_cost.derivation(mechanism, shapes, dealt, gpu)]
