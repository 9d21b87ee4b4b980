"""Nothing goes in -> made-up notes, a base model, a plain and a private fine-tuning, attacks, and a report."""

import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from hf_dp import recipe as recipes
from hf_dp.cli import Sampling, quiet, texts
from hf_dp.demo import leaks, report, secrets
from hf_dp.demo.base import MAX_TOKENS, train_base
from hf_dp.demo.compare import tune_plain, tune_private
from hf_dp.demo.folder import fresh_folder
from hf_dp.demo.picture import plot_fine_tunings
from hf_dp.demo.records import Halves, Record, is_as_asked, write_records
from hf_dp.errors import HfDpError
from hf_dp.recipe import DataSection, Example, Recipe, Template, completions, data_files, nested

FOLDER = Path("out/demo")
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"
NUM_SAMPLES, SAMPLING = 100, Sampling(top_p=0.9, most_tokens=40)


class Size(NamedTuple):
    """How much of everything. `overrides` are applied to the recipe."""

    num_public: int = 3000
    num_private: int = 768
    num_heldout: int = 256
    base_steps: int = 300
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
    console.rule("1. Made-up notes, and a base model from the public half")
    seed = random.SystemRandom().randrange(2**32)  # every demo has records and secrets of its own
    hidden = secrets.make_secrets(seed)
    halves = write_records(
        folder,
        num_public=size.num_public,
        num_private=size.num_private,
        num_heldout=size.num_heldout,
        planted=hidden,
        seed=seed,
    )
    overrides = [*_overrides(folder, halves), *size.overrides]
    templates = nested(recipe_path.read_text(encoding="utf-8"), str(recipe_path), overrides)["data"]
    public = DataSection(**{**templates, "train": str(halves.public_train)})
    train_base(public, folder / "base", num_steps=size.base_steps)
    recipe = recipes.read(recipe_path, overrides)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.name)
    attacked = _attacked(recipe, tokenizer, hidden, size.num_heldout)

    def bits_left(model: Any) -> float:
        return secrets.bits_left(model, tokenizer, attacked.secrets)

    console.rule("2. Fine-tuning on the private half, by Trainer")
    plain = tune_plain(recipe, folder / "non-private", bits_left)
    console.rule("3. Fine-tuning by DPTrainer, with LoRA")
    private = tune_private(recipe, bits_left)
    console.rule("4. What came of it")
    models = report.Of(AutoModelForCausalLM.from_pretrained(recipe.model.name), private.model, plain.model)
    records, notes = _notes(recipe, tokenizer, models)
    base_losses = leaks.losses_of_people(models.base, tokenizer, attacked)
    assert private.spent is not None
    result = report.Result(
        losses=report.Of(private.losses[0][1], private.losses[-1][1], plain.losses[-1][1]),
        as_asked=report.Of(*(sum(map(is_as_asked, records, written)) / len(records) for written in notes)),
        spent=private.spent,
        num_steps=private.losses[-1][0],
        private=leaks.leaks(models.private, base_losses, tokenizer, attacked),
        non_private=leaks.leaks(models.non_private, base_losses, tokenizer, attacked),
        seconds=time.monotonic() - started,
    )
    (folder / "results.json").write_text(json.dumps(result.in_json(), indent=2))
    plot_fine_tunings(folder / report.PICTURE, plain=plain, private=private)
    console.print(report.examples(list(map(_prompt(recipe).render, records)), notes))
    for table in (report.codes(result, attacked.secrets), report.learnt(result), report.given_away(result)):
        console.print(table)
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


def _attacked(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, hidden: Sequence[Record], num: int) -> leaks.Records:
    """`num` of the private records, the held-out ones, and the secrets, as token rows."""
    found: list[Sequence[Example]] = []
    for which in ("train", "validation"):
        records = data_files.load(recipe.data, which)
        assert records is not None  # the demo has just written them
        some = records.select(range(min(num, len(records) - len(hidden))))
        found.append(completions(some, recipe.data, tokenizer, MAX_TOKENS).rows.to_list())
    return leaks.Records(found[0], found[1], secrets.secrets_in(hidden, recipe.data, tokenizer))


def _prompt(recipe: Recipe) -> Template:
    return Template.parse(recipe.data.prompt or "")


def _notes(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, models: report.Of
) -> tuple[list[Record], list[list[str]]]:
    """Held-out records, and what each model writes for their prompts."""
    lines = Path(str(recipe.data.validation)).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines[:NUM_SAMPLES]]
    prompts = [_prompt(recipe).render(record) for record in records]
    return records, [list(texts(model, tokenizer, prompts, SAMPLING)) for model in models]
