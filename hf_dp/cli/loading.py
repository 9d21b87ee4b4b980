"""The folder of a model saved by hf_dp -> the model, whole or an adapter on its base."""

import json
from pathlib import Path
from typing import Any

from hf_dp.cli.hub import first_line

MODELS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
CANNOT_BE_LOADED = (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError)


def settings_of(folder: Path) -> dict[str, Any] | None:
    """What adapter_config.json says; None where the folder has none.

    Raises:
        ConfigError: it cannot be read, or does not name the base model.
    """
    from hf_dp.errors import ConfigError

    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not (isinstance(found, dict) and found.get("base_model_name_or_path")):
        raise ConfigError(
            f"{path} does not name the base model: write its folder or name there, as base_model_name_or_path"
        )
    return found


def on_its_base(folder: Path, settings: dict[str, Any]) -> Any:
    """The adapter in `folder`, with these settings, on its base.

    Raises:
        ConfigError: the base can't be loaded, the adapter does not fit it, or weights of the model are neither in the
            base nor in the adapter, so that they would be random.
    """
    from hf_dp.errors import ConfigError

    try:
        return _loaded(folder, settings)
    except CANNOT_BE_LOADED as error:
        base = settings["base_model_name_or_path"]
        raise ConfigError(
            f"the adapter in {folder} cannot be loaded on its base {base!r}: {first_line(error)}. Check the network, "
            "or write the base's folder into adapter_config.json as base_model_name_or_path; a classifier also needs "
            'the names of its classes in classes.json, such as {"0": "no", "1": "yes"}'
        ) from None


def _loaded(folder: Path, settings: dict[str, Any]) -> Any:
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
