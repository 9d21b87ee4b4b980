"""A recipe, its overrides and `--grid` texts -> every combination of their values, each a whole recipe; or all
mistakes.
"""

import copy
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from hf_dp import recipe as recipes
from hf_dp.config import nearest
from hf_dp.errors import RecipeError
from hf_dp.recipe import Recipe, nested, parse

MOST = 1000  # combinations
PRIVACY = tuple(
    f"privacy.{name}"
    for name in "clip_norm expected_batch_size noise noise_schedule clip_schedule batch_schedule".split()
)
TRAINING = (
    "learning_rate weight_decay num_train_epochs max_steps optim optim_args adam_beta1 adam_beta2 adam_epsilon "
    "lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio seed"
)
# what makes another model; scores of trials that differ in anything else could not be compared, or nothing would differ
SEARCHED = (*PRIVACY, *(f"training.{name}" for name in TRAINING.split()), "data.prompt")
OWN = ("resume_from_checkpoint", "push_to_hub", "load_best_model_at_end")


class Combination(NamedTuple):
    """One value for each key of the grid, and the recipe with these values."""

    values: Mapping[str, object]
    recipe: Recipe


def combinations(path: Path, overrides: Sequence[str], grid: Sequence[str]) -> list[Combination]:
    """All combinations; the last key varies fastest.

    Raises:
        RecipeError: a recipe that cannot be swept over, an invalid key or value, or a combination that is not a valid
            recipe. Names everything wrong at once.
    """
    base = recipes.read(path, overrides)
    sections = nested(path.read_text(encoding="utf-8"), str(path), overrides)
    axes, wrong = _axes(grid)
    wrong += [
        f"--grid {key}: it is also given as an override; drop one"
        for key in axes
        if any(o.partition("=")[0].strip() == key for o in overrides)
    ]
    wrong += _refusals(base)
    count = 1
    for values in axes.values():
        count *= len(values)
    if count > MOST:
        wrong.append(f"--grid: expected at most {MOST:,} combinations, got {count:,}")
    if wrong:
        raise RecipeError("\n".join(f"  - {problem}" for problem in wrong))
    found, problems = [], []
    for chosen in itertools.product(*axes.values()):
        named = dict(zip(axes, chosen, strict=True))
        try:
            found.append(Combination(named, recipes.from_mapping(_with(sections, named), name=path.stem)))
        except RecipeError as error:
            problems += [line for line in str(error).splitlines() if line not in problems]
    if problems:
        raise RecipeError("\n".join(problems))
    return found


def _axes(grid: Sequence[str]) -> tuple[dict[str, list[object]], list[str]]:
    """Key -> its values; and what is wrong with the texts."""
    axes: dict[str, list[object]] = {}
    wrong = [] if grid else ["--grid: expected at least one, such as --grid training.learning_rate=1e-3,3e-3"]
    for text in grid:
        key, equals, listed = text.partition("=")
        key = key.strip()
        if not equals or not listed.strip():
            wrong.append(f"--grid {text}: expected section.key=value,value,...")
            continue
        if key in axes:
            wrong.append(f"--grid {key}: given twice; list all of its values at once")
        if not (key in SEARCHED or (key.startswith("lora.") and len(key) > 5)):
            wrong.append(f"--grid {key}: {_why_not(key)}")
        try:
            values = cast("list[object]", parse(f"[{listed}]", f"--grid {key}"))
        except RecipeError as error:
            wrong.append(str(error))
            continue
        again = [value for i, value in enumerate(values) if value in values[:i]]
        if again:
            wrong.append(
                f"--grid {key}: {', '.join(map(str, again))} stands there twice, so that combinations would be the same"
            )
        axes[key] = values
    return axes, wrong


def _why_not(key: str) -> str:
    if key in ("privacy.noise_multiplier", "privacy.target_epsilon"):
        return (
            "all trials have the same epsilon, and the noise follows from it: more steps (training.num_train_epochs) "
            "mean more noise, a larger privacy.expected_batch_size more noise on a sum of more records"
        )
    return f"not a setting that trials may differ in{nearest(key, SEARCHED)}; they are lora.* and {', '.join(SEARCHED)}"


def _refusals(base: Recipe) -> Iterator[str]:
    """What a recipe may contain for a training, but not for a sweep."""
    privacy, training, data = base.privacy, base.training, base.data
    if privacy.target_epsilon is None:
        yield "privacy.target_epsilon: missing; it is the total of a sweep, and all trials get the same part of it"
    for name, value in (("debug_seed", privacy.debug_seed), ("budget_file", privacy.budget_file)):
        if value is not None:
            yield f"privacy.{name}: not for a sweep, whose total is target_epsilon; drop it"
    if data.validation is None:
        yield "data.validation: missing; the model is selected by its loss on records that are not training records"
    elif (data.validation, data.validation_split) == (data.train, data.train_split) or (
        recipes.is_file(data.validation)
        and recipes.is_file(data.train)
        and os.path.samefile(data.validation, data.train)
    ):
        yield (
            "data.validation: these are the training records; a score computed on them is private. Hold some records "
            "out"
        )
    for name in OWN:
        if training.get(name):
            yield f"training.{name}: not for a sweep; drop it"
    if training.get("report_to") not in (None, "none", [], ["none"]):
        yield (
            f"training.report_to: {training['report_to']} would be told of all trials, and only the selected model is "
            "covered; drop it"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield "a sweep runs in one process: start it without accelerate launch or torchrun"


def _with(sections: Mapping[str, object], values: Mapping[str, object]) -> dict[str, object]:
    changed = copy.deepcopy(dict(sections))
    for key, value in values.items():
        inner = changed
        *path, last = key.split(".")
        for name in path:
            inner[name] = inner.get(name) or {}
            inner = cast("dict[str, object]", inner[name])
        inner[last] = copy.deepcopy(value)
    return changed
