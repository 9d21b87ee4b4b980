"""A model, its tokenizer and prompts -> the texts that the model writes after them."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_dp.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 32  # prompts of one batch


class Sampling(NamedTuple):
    """How the next token is drawn.

    Attributes:
        temperature: 1 draws from the model's own probabilities, 0 takes the likeliest token.
        top_p: draw among the likeliest tokens that have this probability together.
        most_tokens: of a text, at most.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    most_tokens: int = 200

    def refuse_wrong(self) -> None:
        """Raises ConfigError for values out of range; names all of them."""
        wrong = []
        if not 0 <= self.temperature < float("inf"):
            wrong.append(f"temperature: expected 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            wrong.append(f"top_p: expected more than 0 and at most 1, got {self.top_p}")
        if self.most_tokens < 1:
            wrong.append(f"max_new_tokens: expected 1 or more, got {self.most_tokens}")
        if wrong:
            raise ConfigError("; ".join(wrong))


def texts(
    model: Any, tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], sampling: Sampling
) -> Iterator[str]:
    """What the model writes after each prompt, without the prompt, in the order of the prompts.

    An empty prompt is the token with which the texts of a recipe without a prompt begin.

    Args:
        model: a causal LM or an encoder-decoder; put into evaluation mode.
        tokenizer: its own.
        prompts: any number.
        sampling: how tokens are drawn.

    Raises:
        ConfigError: a prompt fills all positions that the model has.
    """
    model.eval()
    for start in range(0, len(prompts), AT_ONCE):
        yield from _batch(model, tokenizer, prompts[start : start + AT_ONCE], sampling)


def _batch(model: Any, tokenizer: Any, prompts: Sequence[str], sampling: Sampling) -> list[str]:
    import torch

    rows = [ids or _first(tokenizer) for ids in tokenizer(list(prompts))["input_ids"]]
    whole = bool(model.config.is_encoder_decoder)
    rows = rows if whole else [_open(ids, tokenizer) for ids in rows]
    given = tokenizer.pad({"input_ids": rows}, padding_side="right" if whole else "left", return_tensors="pt")
    width = given["input_ids"].shape[1]
    random = sampling.temperature > 0
    with torch.no_grad():
        ids = model.generate(
            input_ids=given["input_ids"].to(model.device),
            attention_mask=given["attention_mask"].to(model.device),
            max_new_tokens=sampling.most_tokens if whole else _room(model, width, sampling.most_tokens),
            do_sample=random,
            pad_token_id=tokenizer.pad_token_id,
            **({"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if random else {}),
        )
    return [str(text).strip() for text in tokenizer.batch_decode(ids[:, 0 if whole else width :], **_WITHOUT_MARKS)]


_WITHOUT_MARKS = {"skip_special_tokens": True}


def _first(tokenizer: Any) -> list[int]:
    return [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]


def _open(ids: list[int], tokenizer: Any) -> list[int]:
    """The prompt without a closing mark that the tokenizer added, as in training."""
    closed = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id
    return ids[:-1] if closed else ids


def _room(model: Any, width: int, asked: int) -> int:
    """How many tokens may follow a prompt of `width`: as many as asked, or as the model has positions left."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return asked
    if width >= positions:
        raise ConfigError(f"a prompt has {width:,} tokens, and the model takes {positions:,} in all: shorten it")
    return min(asked, positions - width)
