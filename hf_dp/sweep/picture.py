"""What the trials of a sweep showed -> a picture of validation loss against epsilon spent, a line a trial, a colour a combination."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOTE = "PRIVATE: not covered by the model's epsilon, do not publish"


def draw(sweep: Mapping[str, Any], path: Path) -> None:
    """Writes the picture of what `outcome` wrote as sweep.json."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    keys = list(dict.fromkeys(name for trial in sweep["trials"] for name in trial["combination"]))
    seen: dict[tuple[Any, ...], str] = {}
    figure, axes = pyplot.subplots(figsize=(8.0, 4.8), layout="constrained")
    colours = matplotlib.colormaps["tab20" if len(sweep["trials"]) > 10 else "tab10"]
    for number, trial in enumerate(sweep["trials"]):
        chosen = tuple(str(trial["combination"][key]) for key in keys)
        points = [(epsilon, loss) for _, epsilon, loss in trial["curve"] if loss is not None]
        label = ", ".join(f"{key.partition('.')[2]} {value}" for key, value in zip(keys, chosen, strict=True))
        is_new = chosen not in seen
        colour = seen.setdefault(chosen, colours(len(seen) % colours.N))  # type: ignore[arg-type]
        selected = number == sweep["selected"]
        style: dict[str, Any] = {"linewidth": 2.5, "zorder": 3} if selected else {"linewidth": 1.0}
        axes.plot(
            *zip(*points, strict=True), color=colour, marker="o", markersize=3, label=label if is_new else None, **style
        )
        if selected and points:
            star: dict[str, Any] = {"marker": "*", "markersize": 14, "linestyle": "", "zorder": 4}
            axes.plot(*points[-1], color=colour, markeredgecolor="black", label="selected", **star)
    axes.set(
        xlim=(0, None),
        xlabel=f"epsilon spent by the trial alone, at delta {sweep['delta']:g}",
        ylabel="validation loss",
    )
    axes.set_title(
        f"{NOTE}\nepsilon of the selected model {sweep['epsilon_selected']:.4g}, selection included; of all {len(sweep['trials'])} "
        f"trials composed {sweep['epsilon_all_published']:.4g}",
        fontsize=10,
    )
    labelled = sorted(zip(*axes.get_legend_handles_labels(), strict=True), key=lambda pair: pair[1] == "selected")
    figure.legend(*zip(*labelled, strict=True), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
