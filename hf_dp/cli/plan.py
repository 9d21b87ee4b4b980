"""Sizes and a target -> the plan: noise, steps, epsilon, each with its rule. Imports no torch and answers within seconds."""

from pathlib import Path
from typing import Annotated

import typer


def plan(
    num_examples: Annotated[int, typer.Option(help="N, the records of the training set.")],
    expected_batch_size: Annotated[int, typer.Option(help="B, the mean logical batch over all processes.")],
    epochs: Annotated[float | None, typer.Option(help="Passes over the data; or give --max-steps.")] = None,
    max_steps: Annotated[int, typer.Option(help="Steps, in place of epochs.")] = -1,
    target_epsilon: Annotated[float | None, typer.Option(help="Calibrate the noise to this epsilon.")] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="Or give sigma, and learn its epsilon.")] = None,
    target_delta: Annotated[float | None, typer.Option(help="Default: 1 / N**1.1, rounded down.")] = None,
    log_loss_up_to: Annotated[float | None, typer.Option(help="Release loss, up to this, and batch size too.")] = None,
    clip_norm: Annotated[float, typer.Option(help="C; it scales the noise and changes no epsilon.")] = 1.0,
    plot: Annotated[Path | None, typer.Option(help="Draw epsilon against steps into this picture.")] = None,
) -> None:
    """Says what noise a target epsilon needs, or what epsilon a noise gives, before any data or model is there."""
    from hf_dp import accounting
    from hf_dp.cli.tables import print_derivation
    from hf_dp.config import PrivacyConfig
    from hf_dp.errors import ConfigError

    if (epochs is None) == (max_steps <= 0):
        raise ConfigError("give exactly one of --epochs and --max-steps")
    privacy = PrivacyConfig(
        target_epsilon=target_epsilon,
        noise_multiplier=noise_multiplier,
        target_delta=target_delta,
        expected_batch_size=expected_batch_size,
        clip_norm=clip_norm,
        log_loss_up_to=log_loss_up_to,
    )
    mechanism = accounting.plan(privacy, num_examples, num_train_epochs=epochs or 0.0, max_steps=max_steps)
    print_derivation(
        accounting.derivation(privacy, mechanism, num_train_epochs=epochs or 0.0, max_steps=max_steps), mechanism
    )
    if plot is not None:
        from hf_dp.plots import draw_epsilon

        draw_epsilon(mechanism, plot)
        print(f"Epsilon against steps: {plot}")
