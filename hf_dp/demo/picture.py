"""Two fine-tunings -> a picture: what they learn (held-out loss) and what they give away (the planted secrets)."""

from pathlib import Path

from hf_dp.demo.compare import Curve, Tuned
from hf_dp.demo.secrets import CODE_DIGITS, GUESSING
from hf_dp.pictures import PLAIN, PRIVATE, Line, Panel, save_figure

BASE = "#666666"


def plot_fine_tunings(path: Path, *, plain: Tuned, private: Tuned) -> None:
    """Writes the picture: held-out loss above, bits of a secret that are not known below, over the same steps.

    Raises:
        ConfigError: the picture cannot be written.
    """
    last_step, base = private.losses[-1][0], private.losses[0][1]
    epsilon = f"private, epsilon {private.spent.epsilon:.4g}" if private.spent else "private"
    still = Line([(0, base), (last_step, base)], "base model", color=BASE, style=":")
    learnt = Panel(
        lines=[still, *_lines(private.losses, plain.losses, epsilon)],
        x="optimizer step",
        y="held-out loss (nats a character)",
        title="What they learn",
    )
    given_away = Panel(
        lines=_lines(private.measured, plain.measured, epsilon),
        x="optimizer step",
        y="bits of a secret not known",
        title="What they give away",
        across=(GUESSING, f"{CODE_DIGITS} digits, nothing known"),
    )
    save_figure(path, [learnt, given_away], width=7.2, height=6.4)


def _lines(private: Curve, plain: Curve, name: str) -> list[Line]:
    return [
        Line(private, name, color=PRIVATE, marker="o"),
        Line(plain, "non-private", color=PLAIN, marker="s"),
    ]
