"""The words of a README -> whether PEFT's, Trainer's or trl's template made all of them, so that nobody's own are lost
with them.

Every line must be one of a template's, as the template makes it. A line that somebody added or changed is their own.
"""

import re
from functools import cache
from importlib.resources import files
from importlib.util import find_spec

OF_TRAINER = "<!-- This model card has been generated automatically according to the information the Trainer had access"
OF_TRL = "It has been trained using [TRL](https://github.com/huggingface/trl)."
_TAG = re.compile(r"(\{%.*?%\}|\{\{.*?\}\})")  # of trl's template: a condition, or a place
_PLACE = re.compile(r"\{\{.*?default\(\"(.*?)\", true\)\s*\}\}")  # of the Hub's template, with what stands there
_OF_PEFT = re.compile(r"### Framework versions|- PEFT \S+|# Model Card for Model ID")
_SETTINGS = """
    learning_rate train_batch_size eval_batch_size seed distributed_type num_devices gradient_accumulation_steps
    total_train_batch_size total_eval_batch_size optimizer lr_scheduler_type lr_scheduler_warmup_ratio
    lr_scheduler_warmup_steps num_epochs training_steps mixed_precision_training label_smoothing_factor
""".split()
_BY_TRAINER = re.compile(
    r"<!-- This model card has been generated automatically.*|should probably proofread and complete it.*|# \S.*"
    r"|This model (is a fine-tuned version of|was trained from scratch on) .*"
    r"|It achieves the following results on the evaluation set:|- [A-Z][\w ]*: (-?[\d.]+(e-?\d+)?|nan)"
    r"|## Model description|More information needed|## Intended uses & limitations|## Training and evaluation data"
    r"|## Training procedure|No additional optimizer arguments"
    r"|### Training hyperparameters|The following hyperparameters were used during training:"
    rf"|- ({'|'.join(_SETTINGS)}): .*|### Training results|\|.*\||### Framework versions"
    r"|- (Transformers|Pytorch|Datasets|Tokenizers|PEFT) \S+"
)


def untouched(words: str) -> bool:
    """Whether a template made all of `words`, the text of a card without its YAML; true of no words at all."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    if OF_TRAINER in words and "More information needed" in words:
        return all(_BY_TRAINER.fullmatch(line) for line in lines)
    if OF_TRL in words:
        patterns = [_OF_PEFT, *_of_trl()]
        return all(any(p.fullmatch(line) for p in patterns) for line in _without_citations(lines))
    template = _of_the_hub()
    return all(line in template or _OF_PEFT.fullmatch(line) for line in lines)


@cache
def _of_the_hub() -> frozenset[str]:
    """The lines of the Hub's template, which PEFT uses, with its places filled as where nothing is known."""
    text = files("huggingface_hub").joinpath("templates/modelcard_template.md").read_text(encoding="utf-8")
    return frozenset(line.strip() for line in _PLACE.sub(lambda place: place[1], text).splitlines())


@cache
def _of_trl() -> tuple[re.Pattern[str], ...]:
    """The lines of trl's templates for models, of the version that is installed."""
    if find_spec("trl") is None:
        return ()
    folder = files("trl").joinpath("templates")
    texts = [folder.joinpath(f"{kind}_model_card.md").read_text(encoding="utf-8") for kind in ("lm", "rm")]
    lines = {line.strip() for text in texts for line in text.splitlines() if line.strip()}
    return tuple(_as_filled(line) for line in lines if _TAG.sub("", line).strip())  # a place alone may hold anything


def _as_filled(line: str) -> re.Pattern[str]:
    """What a line of the template becomes."""
    parts = [
        "(?:" if part.startswith("{% if") else ")?" if part.startswith("{% endif") else ".*" if "{{" in part else ""
        for part in _TAG.findall(line)
    ]
    between = [re.escape(text) for text in _TAG.split(line)[::2]]
    pattern = "".join(text + part for text, part in zip(between, [*parts, ""], strict=True))
    if pattern.count("(?:") != pattern.count(")?"):  # a condition goes on in the next line
        pattern = pattern.replace("(?:", "").replace(")?", "")
    return re.compile(pattern)


def _without_citations(lines: list[str]) -> list[str]:
    """The lines that are in no block of BibTeX."""
    kept, inside = list[str](), False
    for line in lines:
        if line == "```bibtex" or (inside and line.startswith("```")):
            inside = line == "```bibtex"
        elif not inside:
            kept.append(line)
    return kept
