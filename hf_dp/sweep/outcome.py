"""The trials of a sweep that has ended -> the selected model's folder with its card; for the user alone, sweep.json and
sweep.png.
"""

import json
import shutil
from pathlib import Path

from hf_dp import accounting, card, durable
from hf_dp.accounting import selection
from hf_dp.card import Record, read_record
from hf_dp.sweep import folder as folders
from hf_dp.sweep.folder import SELECTED, State
from hf_dp.sweep.results import NOTE, SweepResult, TrialResult, plot_trials

STAYS = ("_*", "log.txt", folders.TRIAL)  # files in the trial's folder that do not belong to the model


def conclude(folder: Path, state: State) -> SweepResult | None:
    """Writes sweep.json and sweep.png, then makes OUT/selected, atomically; returns what sweep.json holds. None without
    trials.

    By then the other models are deleted, and the selected one is in its folder alone.
    """
    trials = folders.finished(folder)
    if not trials:
        return None
    chosen = folders.best(trials)
    found = _for_the_user(folder, state, [result for _, result in trials], chosen)
    durable.replace(folder / "sweep.json", json.dumps(found, indent=1).encode())
    plot_trials(found, folder / "sweep.png")
    place, staged = trials[chosen][0], folder / f"_{SELECTED}"
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(place, staged, ignore=shutil.ignore_patterns(*STAYS))
    record = card.with_selection(Record.of(read_record(staged)), state.plan.selection)
    card.write_card(staged, record, name=SELECTED)
    staged.rename(folder / SELECTED)
    durable.sync_folder(folder)
    folders.prune(place)
    return found


def _for_the_user(folder: Path, state: State, results: list[TrialResult], chosen: int) -> SweepResult:
    charged, delta = folders.charged(folder), state.plan.delta
    return {
        "note": NOTE,
        "delta": delta,
        "epsilon_selected": selection.spent(state.plan.selection, delta),
        "epsilon_all_published": accounting.spent(charged, delta).epsilon,
        "selected": chosen,
        "trials": results,
    }
