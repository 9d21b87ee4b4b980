"""A private adapter's folder -> a new folder with the whole model, and card, record and ledger carried along."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merge(
    folder: Annotated[Path, typer.Argument(help="The folder of an adapter saved by hf_dp.")],
    output: Annotated[Path | None, typer.Option(help="The new folder; default: FOLDER-merged.")] = None,
) -> None:
    """Merges an adapter into its base: a whole model that loads without PEFT, with the same epsilon and card."""
    from hf_dp.card import carry_card
    from hf_dp.cli.folders import appearing_whole, no_empty_folder, refuse_unverified
    from hf_dp.cli.libraries import quiet

    target = output or folder.resolve().with_name(f"{folder.resolve().name}-merged")
    settings = _adapter_settings(folder)
    refuse_unverified(folder, "merged")
    quiet()
    with no_empty_folder(target), appearing_whole(target) as unfinished:
        model = _merged(folder, settings)
        model.save_pretrained(unfinished)
        _save_processor(folder, str(settings["base_model_name_or_path"]), unfinished)
        carry_card(folder, unfinished, name=target.name)
    print(f"Model: {target}\nCard: {target / 'README.md'}; `hf-dp verify {target}` says whether it is true")


def _adapter_settings(folder: Path) -> dict[str, Any]:
    from hf_dp.cli.loading import settings_of
    from hf_dp.errors import ConfigError

    found = settings_of(folder)
    if found is None:
        whole = (folder / "config.json").is_file()
        raise ConfigError(
            f"{folder} has no adapter_config.json: expected the folder of an adapter saved by hf_dp"
            + ("; this one holds a whole model already, which needs no merging" if whole else "")
        )
    return found


def _merged(folder: Path, settings: dict[str, Any]) -> "PreTrainedModel":
    """The base with the adapter's change in its weights.

    Raises:
        ConfigError: the base can't be loaded, the adapter does not fit it, or adapters of its kind can't be merged.
    """
    from hf_dp.cli.hub import first_line
    from hf_dp.cli.loading import on_its_base
    from hf_dp.errors import ConfigError

    model = on_its_base(folder, settings)
    try:
        return model.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, ValueError, TypeError) as error:
        raise ConfigError(
            f"an adapter of the kind {settings.get('peft_type')} cannot be merged into a base like this: "
            f"{first_line(error)}. Use it as it is, with PEFT"
        ) from None


def _save_processor(folder: Path, base: str, target: Path) -> None:
    """The adapter's own tokenizer and processor files; where it has none, those of its base, if it has some."""
    from transformers import AutoProcessor

    from hf_dp.card import processing_files

    found = processing_files(folder)
    for name in found:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, target / name)
    if not found:
        try:
            AutoProcessor.from_pretrained(base).save_pretrained(target)
        except (OSError, ValueError, KeyError, ImportError):
            print(f"{base} has no tokenizer or processor that can be loaded here: the merged folder has none either")
