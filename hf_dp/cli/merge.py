"""A private adapter's folder -> a new folder with the whole model, and card, record and ledger carried along."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODELS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def merge(
    folder: Annotated[Path, typer.Argument(help="The folder of an adapter saved by hf_dp.")],
    output: Annotated[Path | None, typer.Option(help="The new folder; default: FOLDER-merged.")] = None,
) -> None:
    """Merges an adapter into its base: a whole model that loads without PEFT, with the same epsilon and card."""
    from hf_dp.card import carry_card
    from hf_dp.cli.folders import no_empty_folder
    from hf_dp.cli.libraries import quiet

    target = output or folder.resolve().with_name(f"{folder.resolve().name}-merged")
    settings = _adapter_settings(folder)
    _refuse_unverified(folder)
    quiet()
    with no_empty_folder(target), _appearing_whole(target) as unfinished:
        model = _merged(folder, settings)
        model.save_pretrained(unfinished)
        _save_processor(folder, str(settings["base_model_name_or_path"]), unfinished)
        carry_card(folder, unfinished, name=target.name)
    print(f"Model: {target}\nCard: {target / 'README.md'}; `hf-dp verify {target}` says whether it is true")


def _adapter_settings(folder: Path) -> dict[str, Any]:
    from hf_dp.errors import ConfigError

    path = folder / "adapter_config.json"
    if not path.is_file():
        whole = (folder / "config.json").is_file()
        raise ConfigError(
            f"{folder} has no adapter_config.json: expected the folder of an adapter saved by hf_dp"
            + ("; this one holds a whole model already, which needs no merging" if whole else "")
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not (isinstance(found, dict) and found.get("base_model_name_or_path")):
        raise ConfigError(
            f"{path} does not name the base model: write its folder or name there, as base_model_name_or_path"
        )
    return found


def _refuse_unverified(folder: Path) -> None:
    from hf_dp.card import verify
    from hf_dp.errors import ConfigError

    failed = [check.name for check in verify(folder) if not check.holds]
    if failed:
        raise ConfigError(
            f"nothing was merged, because the card is not what can be verified ({'; '.join(failed)}): see `hf-dp "
            f"verify {folder}`; where only the card is spoilt, `hf-dp card {folder}` writes it again"
        )


@contextmanager
def _appearing_whole(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` at the end; after any exception nothing of it is left."""
    from hf_dp.errors import ConfigError

    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} exists already, and nothing is written over: name another folder by --output")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"_{target.name}.", dir=target.parent))
    try:
        yield unfinished
        mask = os.umask(0)
        os.umask(mask)
        unfinished.chmod(0o777 & ~mask)  # mkdtemp lets nobody else in
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _merged(folder: Path, settings: dict[str, Any]) -> "PreTrainedModel":
    """The base with the adapter's change in its weights.

    Raises:
        ConfigError: the base can't be loaded, the adapter does not fit it, or adapters of its kind can't be merged.
    """
    from hf_dp.errors import ConfigError

    base, kind = settings["base_model_name_or_path"], settings.get("peft_type")
    try:
        model = _loaded(folder, settings)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError) as error:
        raise ConfigError(
            f"the adapter in {folder} cannot be loaded on its base {base!r}: {_first_line(error)}. Check the network, "
            "or write the base's folder into adapter_config.json as base_model_name_or_path; a classifier also needs "
            'the names of its classes in classes.json, such as {"0": "no", "1": "yes"}'
        ) from None
    try:
        return model.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, ValueError, TypeError) as error:
        raise ConfigError(
            f"an adapter of the kind {kind} cannot be merged into a base like this: {_first_line(error)}. Use it as it "
            "is, with PEFT"
        ) from None


def _loaded(folder: Path, settings: dict[str, Any]) -> Any:
    """The adapter on its base.

    Raises:
        ValueError: weights of the model are neither in the base nor in the adapter, so that they would be random.
    """
    import peft
    import transformers
    from safetensors import safe_open

    name = MODELS.get(str(settings.get("task_type"))) or (settings.get("auto_mapping") or {}).get("base_model_class")
    model, found = getattr(transformers, str(name)).from_pretrained(
        settings["base_model_name_or_path"],
        revision=settings.get("revision"),
        output_loading_info=True,
        **_classes(folder),
    )
    if (folder / "tokenizer_config.json").is_file():  # as peft's AutoPeftModel
        words = len(transformers.AutoTokenizer.from_pretrained(folder))
        if words > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(words)
    adapted = peft.PeftModel.from_pretrained(model, folder)
    with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
        saved = {key.removeprefix("base_model.model.") for key in weights.keys()}  # noqa: SIM118 (no mapping)
    random = sorted({*found["missing_keys"]} - saved)
    if random:
        raise ValueError(f"{', '.join(random[:5])} are neither in the base nor in the adapter, and would be random")
    return adapted


def _classes(folder: Path) -> dict[str, Any]:
    path = folder / "classes.json"
    if not path.is_file():
        return {}
    names = {int(number): str(name) for number, name in json.loads(path.read_text(encoding="utf-8")).items()}
    return {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}


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


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".")
