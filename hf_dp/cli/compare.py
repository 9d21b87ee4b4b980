"""A recipe -> the same fine-tuning with privacy and without, and what each model has learnt and gives away."""

from pathlib import Path
from typing import Annotated

import typer


def compare(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, as many as you like.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="The new folder for table and picture; default: RECIPE-compared.")
    ] = None,
    num_secrets: Annotated[int, typer.Option(min=1, help="Made-up secrets to plant among the records.")] = 10,
) -> None:
    """Trains a recipe with privacy and without, and shows side by side what the models learn and what they give away.

    Both take the same steps on the same records, among which secrets are planted. Neither model is kept.
    """
    from hf_dp.cli.comparing import compare_recipe
    from hf_dp.cli.folders import appearing_whole
    from hf_dp.cli.libraries import quiet
    from hf_dp.recipe import read

    quiet()
    asked = read(recipe, overrides or [])
    target = output or Path(f"{recipe.stem}-compared")
    with appearing_whole(target) as folder:
        compare_recipe(asked, num_secrets, folder)
    print(f"Numbers: {target / 'comparison.json'}\nPicture: {target / 'comparison.png'}")
