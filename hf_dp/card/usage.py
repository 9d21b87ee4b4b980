"""A model's folder -> what kind of model lies in it, and Python that loads and uses it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

MOST_CLASSES = 100  # that the code lists by name
OF_AN_ADAPTER = {
    "CAUSAL_LM": "CausalLM",
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
    "SEQ_2_SEQ_LM": "Seq2SeqLM",
    "QUESTION_ANS": "QuestionAnswering",
    "FEATURE_EXTRACTION": "FeatureExtraction",
}
OF_A_CLASS = {  # the end of a model class's name -> that of the Auto class which loads it
    "ForCausalLM": "CausalLM",
    "LMHeadModel": "CausalLM",
    "ForSequenceClassification": "SequenceClassification",
    "ForTokenClassification": "TokenClassification",
    "ForQuestionAnswering": "QuestionAnswering",
    "ForMaskedLM": "MaskedLM",
    "ForImageClassification": "ImageClassification",
}
TASKS = {  # head -> (the task in words, the Hub's name for it or "")
    "CausalLM": ("text generation", "text-generation"),
    "Seq2SeqLM": ("text to text (encoder-decoder)", ""),
    "SequenceClassification": ("text classification", "text-classification"),
    "TokenClassification": ("token classification", "token-classification"),
    "QuestionAnswering": ("question answering", "question-answering"),
    "FeatureExtraction": ("feature extraction", "feature-extraction"),
    "MaskedLM": ("filling in masked words", "fill-mask"),
    "ImageClassification": ("image classification", "image-classification"),
}
USES = {
    "CausalLM": """\
ids = tokenizer("Once", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(input_ids=ids, max_new_tokens=40)[0]))""",
    "Seq2SeqLM": """\
ids = tokenizer("A text to begin from", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(input_ids=ids, max_new_tokens=40)[0], skip_special_tokens=True))""",
    "SequenceClassification": """\
scores = model(**tokenizer("A text to classify", return_tensors="pt")).logits[0]
print(model.config.id2label[scores.argmax().item()])""",
    "TokenClassification": """\
inputs = tokenizer("A text to look through", return_tensors="pt")
found = model(**inputs).logits[0].argmax(-1).tolist()
for token, number in zip(inputs.tokens(), found):
    print(token, model.config.id2label[number])""",
}


class Model(NamedTuple):
    """What a folder holds.

    Attributes:
        head: a key of TASKS, or "" for another kind.
        base: what the adapter's settings name, or "".
        adapter: PEFT's name of the adapter's kind, or "" of a whole model.
        loader: the class that loads it.
        classes: names of a classifier's classes in the order of their numbers, where they are known.
        has_tokenizer: whether a tokenizer lies in the folder too.
    """

    head: str
    base: str
    adapter: str
    loader: str
    classes: tuple[str, ...]
    has_tokenizer: bool

    @property
    def task(self) -> str:
        """What it does, in words."""
        return TASKS[self.head][0] if self.head else "another task"

    @property
    def pipeline_tag(self) -> str:
        """The Hub's name for the task, or ""."""
        return TASKS[self.head][1] if self.head else ""


def model_in(folder: Path) -> Model | None:
    """The model in `folder`; None where neither an adapter's nor a model's settings can be read there."""
    adapter, whole = _read(folder / "adapter_config.json"), _read(folder / "config.json")
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    if adapter:
        head = OF_AN_ADAPTER.get(str(adapter.get("task_type")), "")
        base, kind = str(adapter.get("base_model_name_or_path") or ""), str(adapter.get("peft_type") or "adapter")
        classes = _in_order(_read(folder / "classes.json"))
        return Model(head, base, kind, f"AutoPeftModel{f'For{head}' if head else ''}", classes, has_tokenizer)
    if whole:
        name = str((whole.get("architectures") or ["AutoModel"])[0])
        head = next((head for end, head in OF_A_CLASS.items() if name.endswith(end)), "")
        listens = (folder / "preprocessor_config.json").is_file()  # to speech, or looks at pictures
        if name.endswith("ForConditionalGeneration") and whole.get("is_encoder_decoder") and not listens:
            head = "Seq2SeqLM"
        classes = _in_order(whole.get("id2label") or {}) if head.endswith("Classification") else ()
        return Model(head, "", "", f"AutoModelFor{head}" if head else name, classes, has_tokenizer)
    return None


def usage(model: Model, base: str, name: str) -> str:
    """Python that loads the model and uses it; the last lines only for tasks with a short use.

    Args:
        model: what the folder holds.
        base: folder or name of the base, for its tokenizer where the folder has none; may be "".
        name: the model's on the Hub, `USER/MODEL`, or its folder's, for code that runs beside that folder.
    """
    reads = model.head in USES and (model.has_tokenizer or bool(base))
    return "\n".join(
        [*_imports(model, reads=reads), "", *_loading(model, base, name, reads=reads), *_using(model, reads)]
    )


def _imports(model: Model, *, reads: bool) -> Iterator[str]:
    names = [model.loader, *(["AutoTokenizer"] if reads else [])]
    if model.adapter:
        yield f"from peft import {model.loader}"
        names = names[1:]
    if names:
        yield f"from transformers import {', '.join(names)}"


def _loading(model: Model, base: str, name: str, *, reads: bool) -> Iterator[str]:
    where = "" if "/" in name else "  # the folder of this card"
    yield f"model_id = {json.dumps(name, ensure_ascii=False)}{where}"
    if model.adapter and model.classes:
        listed = len(model.classes) <= MOST_CLASSES
        if listed:
            yield "classes = {"
            yield from (
                f"    {number}: {json.dumps(name, ensure_ascii=False)}," for number, name in enumerate(model.classes)
            )
            yield "}"
        yield f"model = {model.loader}.from_pretrained("
        yield f"    model_id, num_labels={len(model.classes)}{', id2label=classes' if listed else ''}"
        yield ")"
    else:
        yield f"model = {model.loader}.from_pretrained(model_id)"
    if reads:
        yield f"tokenizer = AutoTokenizer.from_pretrained({'model_id' if model.has_tokenizer else json.dumps(base)})"


def _using(model: Model, reads: bool) -> list[str]:
    return USES[model.head].splitlines() if reads else ["print(model)"]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _in_order(names: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(str(names[number]) for number in sorted(names, key=lambda n: int(n) if str(n).isdigit() else 0))
