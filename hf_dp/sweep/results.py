"""What a sweep found, as its JSON files have it, and a picture of it. All of it is private: no epsilon covers it."""

from pathlib import Path
from typing import TypedDict

from hf_dp.pictures import Line, Panel, save_figure

NOTE = "PRIVATE: not covered by the model's epsilon, do not publish"
COLOURS = 10  # matplotlib's C0 to C9; further combinations have the same ones, dashed


class Measured(TypedDict):
    """What one training of the sweep measured.

    `score` is the validation loss, None where it is not finite. `curve` holds (step, epsilon of so many steps of this
    trial alone, validation loss). `noise_multiplier` is the gradient's sigma.
    """

    score: float | None
    metrics: dict[str, float | None]
    curve: list[tuple[int, float, float | None]]
    epsilon: float
    num_steps: int
    noise_multiplier: float


class TrialResult(Measured):
    """trial.json: `combination` maps the grid's keys to the values that the trial had."""

    combination: dict[str, object]


class SweepResult(TypedDict):
    """sweep.json: all trials. `selected` is the index of the one whose model was kept."""

    note: str
    delta: float
    epsilon_selected: float
    epsilon_all_published: float
    selected: int
    trials: list[TrialResult]


def of_all(trials: int) -> str:
    """The words before the epsilon of so many trials together."""
    return f"of all {trials} trials composed" if trials > 1 else "of the one trial by itself"


def plot_trials(sweep: SweepResult, path: Path) -> None:
    """Validation loss against epsilon spent: a line for each trial, a colour for each combination.

    Raises:
        ConfigError: the picture cannot be written.
    """
    colours: dict[str, int] = {}
    lines, chosen = [], []
    for number, trial in enumerate(sweep["trials"]):
        label = ", ".join(f"{key.partition('.')[2]} {value}" for key, value in trial["combination"].items())
        is_new, colour = label not in colours, colours.setdefault(label, len(colours))
        points = [(epsilon, loss) for _, epsilon, loss in trial["curve"] if loss is not None]
        selected = number == sweep["selected"]
        style = "-" if colour < COLOURS else "--"
        line = Line(points, label if is_new else None, f"C{colour % COLOURS}", "o", style, 2.5 if selected else 1.0)
        lines.append(line)
        if selected and points:
            chosen = [Line(points[-1:], "selected", line.color, "*", style="")]
    total, together = sweep["epsilon_selected"], sweep["epsilon_all_published"]
    panel = Panel(
        [*lines, *chosen],
        x=f"epsilon spent by the trial alone, at delta {sweep['delta']:g}",
        y="validation loss",
        title=f"{NOTE}\nepsilon of the selected model {total:.4g}, selection included; "
        f"{of_all(len(sweep['trials']))} {together:.4g}",
        legend="below",
    )
    save_figure(path, [panel], width=8.0, height=4.8)
