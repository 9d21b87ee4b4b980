"""What a recipe can train -> for each task, what its data must say, and which classes load and train its model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_dp.errors import RecipeError


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        needed: keys of the section `data`, one group or the other of which must be given.
        more: further keys that may be given.
        auto: the class of transformers that loads a model for it.
        adapter: peft's `task_type`.
        start: keys of `data` in a recipe to start from.
        base: a model on the Hub to start from.
        trainer: the class of `hf_dp.training` that trains it.
        has_classes: whether its labels have names, which are published with the model.
    """

    needed: tuple[tuple[str, ...], ...]
    auto: str
    adapter: str | None
    start: Mapping[str, str]
    base: str
    more: tuple[str, ...] = ()
    trainer: str = "DPTrainer"
    has_classes: bool = False

    @property
    def names(self) -> frozenset[str]:
        """All keys of the section `data` that it may have."""
        return frozenset([*(name for group in self.needed for name in group), *self.more])

    @property
    def of_trl(self) -> bool:
        """Whether trl makes its rows and collates them."""
        return self.trainer != "DPTrainer"

    @property
    def has_labels(self) -> bool:
        """Whether its rows have labels of their own, so that a record's loss can be measured again and again."""
        return not self.of_trl and self.auto != "AutoModelForMaskedLM"

    @property
    def arguments(self) -> Any:
        """The class whose keywords the section `training` holds.

        Raises:
            RecipeError: it is trl's, which is not installed.
        """
        from transformers import TrainingArguments

        return self.trainer_class.config_class if self.of_trl else TrainingArguments

    @property
    def trainer_class(self) -> Any:
        """What trains it.

        Raises:
            RecipeError: it is made of trl's, which is not installed.
        """
        from hf_dp import training

        try:
            return getattr(training, self.trainer)
        except ImportError as error:
            raise RecipeError(f"model.task: {error}") from None


DECODER, ENCODER = "openai-community/gpt2", "distilbert/distilbert-base-uncased"
INSTRUCT = "Qwen/Qwen2.5-0.5B-Instruct"
TASKS = {
    "causal_lm": Task(
        needed=(("target",),),
        more=("prompt", "split"),
        auto="AutoModelForCausalLM",
        adapter="CAUSAL_LM",
        start={"target": "{text}"},
        base=DECODER,
    ),
    "chat": Task(
        needed=(("messages", "max_length"), ("prompt", "target", "max_length")),
        auto="AutoModelForCausalLM",
        adapter="CAUSAL_LM",
        start={"messages": "messages"},
        base=INSTRUCT,
        trainer="DPSFTTrainer",
    ),
    "preference": Task(
        needed=(("prompt", "chosen", "rejected", "max_length"),),
        auto="AutoModelForCausalLM",
        adapter="CAUSAL_LM",
        start={"prompt": "{prompt}", "chosen": "{chosen}", "rejected": "{rejected}"},
        base=INSTRUCT,
        trainer="DPDPOTrainer",
    ),
    "reward": Task(
        needed=(("chosen", "rejected", "max_length"),),
        more=("prompt",),
        auto="AutoModelForSequenceClassification",
        adapter="SEQ_CLS",
        start={"prompt": "{prompt}", "chosen": "{chosen}", "rejected": "{rejected}"},
        base=INSTRUCT,
        trainer="DPRewardTrainer",
    ),
    "sequence_classification": Task(
        needed=(("text", "label"),),
        more=("labels",),
        auto="AutoModelForSequenceClassification",
        adapter="SEQ_CLS",
        start={"text": "{text}", "label": "label"},
        base=ENCODER,
        has_classes=True,
    ),
    "token_classification": Task(
        needed=(("words", "label"),),
        more=("labels",),
        auto="AutoModelForTokenClassification",
        adapter="TOKEN_CLS",
        start={"words": "tokens", "label": "tags"},
        base=ENCODER,
        has_classes=True,
    ),
    "seq2seq": Task(
        needed=(("prompt", "target"),),
        auto="AutoModelForSeq2SeqLM",
        adapter="SEQ_2_SEQ_LM",
        start={"prompt": "{source}", "target": "{target}"},
        base="google-t5/t5-small",
    ),
    "masked_lm": Task(
        needed=(("text",),),
        auto="AutoModelForMaskedLM",
        adapter=None,
        start={"text": "{text}"},
        base=ENCODER,
    ),
}
