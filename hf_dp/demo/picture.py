"""Two fine-tunings -> a picture: held-out loss over steps for both, and the epsilon that the private one had spent by
then.
"""

from pathlib import Path

from hf_dp.demo.compare import Tuned
from hf_dp.pictures import PLAIN, PRIVATE, Line, Panel, save_figure

BASE = "#666666"


def plot_fine_tunings(path: Path, *, plain: Tuned, private: Tuned, target_epsilon: float | None) -> None:
    """Writes the picture: losses above, epsilon below, over the same steps.

    Raises:
        ConfigError: the picture cannot be written.
    """
    last_step = private.losses[-1][0]
    losses = Panel(
        lines=[
            Line([(0, private.losses[0][1]), (last_step, private.losses[0][1])], "base model", color=BASE, style=":"),
            Line(private.losses, "private", color=PRIVATE, marker="o"),
            Line(plain.losses, "non-private", color=PLAIN, marker="s"),
        ],
        x="optimizer step",
        y="held-out loss (nats a character)",
    )
    epsilon = Panel(
        lines=[Line(private.epsilons, "epsilon", color=PRIVATE, marker="o")],
        x="optimizer step",
        y="epsilon spent",
        across=None if target_epsilon is None else (target_epsilon, f"target {target_epsilon:g}"),
        notes=[(f"{private.epsilons[-1][1]:.4g}", private.epsilons[-1])],
    )
    save_figure(path, [losses, epsilon], width=7.2, height=6.0)
