"""The words of a README -> whether PEFT's or Trainer's template made all of them, so that nobody's own are lost with
them.

Every line must be one of a template's, as the template makes it. A line that somebody added or changed is their own.
"""

import re
from functools import cache
from importlib.resources import files

OF_TRAINER = "<!-- This model card has been generated automatically according to the information the Trainer had access"
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
    template = _of_the_hub()
    return all(line in template or _OF_PEFT.fullmatch(line) for line in lines)


@cache
def _of_the_hub() -> frozenset[str]:
    """The lines of the Hub's template, which PEFT uses, with its places filled as where nothing is known."""
    text = files("huggingface_hub").joinpath("templates/modelcard_template.md").read_text(encoding="utf-8")
    return frozenset(line.strip() for line in _PLACE.sub(lambda place: place[1], text).splitlines())
