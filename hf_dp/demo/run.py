"""Nothing but a seed -> made-up records, a base model, a plain and a private fine-tuning, and the report on them."""

import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dp import recipe as recipes
from hf_dp.cli import quiet
from hf_dp.demo import report, secrets
from hf_dp.demo.base import train_base
from hf_dp.demo.compare import Tuned, tune_plain, tune_private
from hf_dp.demo.folder import fresh_folder
from hf_dp.demo.picture import plot_fine_tunings
from hf_dp.demo.records import Halves, write_records
from hf_dp.errors import HfDpError
from hf_dp.recipe import DataSection, Recipe, Template, nested

FOLDER = Path("out/demo")
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"


class Size(NamedTuple):
    """How much of everything. `overrides` are applied to the recipe."""

    num_public: int = 4096
    num_private: int = 16_384
    num_heldout: int = 256
    base_steps: int = 150
    overrides: tuple[str, ...] = ()


def main() -> None:
    """Runs the demo in ./out/demo. Mistakes end in a few lines, with exit status 2."""
    try:
        run(FOLDER, Size())
    except HfDpError as error:
        print(f"scripts/demo: {error}", file=sys.stderr)
        sys.exit(2)


def run(folder: Path, size: Size, recipe_path: Path = RECIPE) -> report.Result:
    """The whole demo in `folder`, which is emptied first if an earlier demo made it.

    Raises:
        HfDpError: `folder` belongs to somebody else, or the recipe does not fit.
    """
    quiet()
    started, console = time.monotonic(), Console()
    if fresh_folder(folder):
        console.print(f"Starting from an empty {folder}; what an earlier demo left there is gone.")
    console.rule("1. Made-up records, and a base model from the public half")
    hidden = secrets.make_secrets()
    halves = write_records(
        folder,
        num_public=size.num_public,
        num_private=size.num_private,
        num_heldout=size.num_heldout,
        planted=[group[0] for group in hidden],
    )
    overrides = [*_overrides(folder, halves), *size.overrides]
    templates = nested(recipe_path.read_text(encoding="utf-8"), str(recipe_path), overrides)["data"]
    public = DataSection(**{**templates, "train": str(halves.public_train)})
    train_base(public, folder / "base", num_steps=size.base_steps)
    recipe = recipes.read(recipe_path, overrides)
    console.rule("2. LoRA fine-tuning on the private half, by Trainer")
    plain = tune_plain(recipe, folder / "non-private")
    console.rule("3. The same by DPTrainer")
    private = tune_private(recipe)
    assert private.spent is not None
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.name)
    exposed = [secrets.given_away(one.model, tokenizer, recipe.data, hidden) for one in (private, plain)]
    result = report.Result(
        base=private.losses[0][1],
        private=private.losses[-1][1],
        non_private=plain.losses[-1][1],
        spent=private.spent,
        num_steps=private.losses[-1][0],
        exposure=secrets.Exposure.of(*exposed),
        seconds=time.monotonic() - started,
    )
    nested_ones = {"spent": private.spent._asdict(), "exposure": result.exposure._asdict()}
    (folder / "results.json").write_text(json.dumps(result._asdict() | nested_ones, indent=2))
    plot_fine_tunings(
        folder / "loss_and_epsilon.png", plain=plain, private=private, target_epsilon=recipe.privacy.target_epsilon
    )
    console.rule("4. What came of it")
    console.print(report.table(result))
    report.show_examples(console, *_examples(recipe, {"private": private, "non-private": plain}))
    console.print(report.statement(result, folder, size.num_private), soft_wrap=True, highlight=False)
    return result


def _overrides(folder: Path, halves: Halves) -> list[str]:
    """The recipe's paths, in this folder."""
    return [
        f"model.name={folder / 'base'}",
        f"data.train={halves.private_train}",
        f"data.validation={halves.private_heldout}",
        f"training.output_dir={folder / 'private'}",
    ]


def _examples(recipe: Recipe, tuned: dict[str, Tuned]) -> tuple[str, dict[str, str]]:
    """A prompt in the recipe's form, and each model's continuation."""
    base = AutoModelForCausalLM.from_pretrained(recipe.model.name)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.name)
    prompt = Template.parse(recipe.data.prompt or "").render({"topic": "outage", "tone": "worried"})
    models = {"base": base, **{name: one.model for name, one in tuned.items()}}
    return prompt, {name: report.generate(model, tokenizer, prompt) for name, model in models.items()}
