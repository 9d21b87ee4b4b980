"""Combinations and a distribution of their number -> a sweep, begun or resumed, up to its selected model."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hf_dp.errors import ConfigError
from hf_dp.ledger import key_of, under_key
from hf_dp.recipe import data_files, task
from hf_dp.sampling import groups_by
from hf_dp.sweep import folder as folders
from hf_dp.sweep import trial as trials
from hf_dp.sweep.grid import Combination
from hf_dp.sweep.outcome import conclude
from hf_dp.sweep.plan import Plan, plan_sweep
from hf_dp.sweep.results import SweepResult
from hf_dp.training import check_options

Tell = Callable[[int, int, int], None]


class Asked(NamedTuple):
    """What the user asked for. `texts` are the recipe and options as given; resuming needs the same ones."""

    combinations: Sequence[Combination]
    distribution: str
    mean: float
    texts: Mapping[str, object]

    @property
    def folder(self) -> Path:
        """The folder of the sweep."""
        return self.combinations[0].recipe.output_dir


def planned(asked: Asked) -> Plan:
    """The plan, after trying everything that can fail before the first run. Leaves nothing on disk.

    Raises:
        HfDpError: what is wrong.
    """
    base = asked.combinations[0].recipe
    records = data_files.load(base.data, "train")
    assert records is not None  # a recipe always names it
    if base.privacy.contribution_bound is not None:
        raise ConfigError(
            "a sweep accounts by Rényi divergences, which are not known of drawing several records of a unit: leave "
            "privacy.contribution_bound out (records of several owners, which need it, cannot be swept)"
        )
    groups = groups_by(records, base.privacy.unit_column)
    found = plan_sweep(
        asked.combinations, len(records) if groups is None else groups.num_groups, asked.distribution, asked.mean
    )
    built: list[object] = []
    with tempfile.TemporaryDirectory() as place:
        for combination in asked.combinations:
            trial = trials.as_trial(combination.recipe, found.target_of_one, Path(place))
            check_options(task.training_arguments(trial), public_eval=trial.privacy.public_eval)
            shape = (trial.lora, trial.peft, trial.data, trial.training.get("optim"), trial.privacy.noise)
            if shape not in built:  # what makes another model, or another way through it
                built.append(shape)
                task.build(trial)
    return found


def begun(asked: Asked, found: Plan) -> folders.State:
    """Starts a planned sweep in its folder, which must be unused: picks its trials at random."""
    asked.folder.mkdir(parents=True, exist_ok=True)
    with folders.locked(asked.folder):
        folders.refuse_used(asked.folder)
        return folders.begin(asked.folder, asked.texts, found, len(asked.combinations), _fingerprint(asked))


def run(asked: Asked, state: folders.State, tell: Tell) -> SweepResult | None:
    """Runs the remaining trials, then selects; returns what sweep.json holds, or None where the number of trials is 0.

    Args:
        asked: what was asked for.
        state: what was decided at random.
        tell: called with (number of the trial, steps taken, steps planned). Nobody is told how many trials there will
            be.

    Raises:
        HfDpError: whatever stops a training.
        ConfigError: the records are not those with which the sweep was begun.
    """
    folder = asked.folder
    with folders.locked(folder):
        if _fingerprint(asked) != state.data:
            raise ConfigError(
                f"{folder}: the training or validation records are not those that the sweep was begun with"
            )
        folders.set_aside(folder)
        for number in range(len(folders.finished(folder)), len(state.chosen)):
            chosen = asked.combinations[state.chosen[number]]
            trial = trials.as_trial(chosen.recipe, state.plan.target_of_one, folder / "running")
            result = trials.run(trial, state.plan.selection.mechanisms, lambda *steps, n=number + 1: tell(n, *steps))
            folders.finish(folder, {"combination": dict(chosen.values), **result})
            done = folders.finished(folder)
            for index, (place, _) in enumerate(done):
                if index != folders.best(done):
                    folders.prune(place)
        return conclude(folder, state)


def _fingerprint(asked: Asked) -> str:
    """Fingerprint of training and validation records, under the folder's key."""
    key, data = key_of(asked.folder), asked.combinations[0].recipe.data
    records = [data_files.load(data, which) for which in ("train", "validation")]
    return " ".join(under_key(part, key) for part in records if part is not None)
