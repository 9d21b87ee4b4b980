"""Records -> rows of trl's trainers: conversations, prompts with two answers, and pairs of answers for a reward."""

from collections.abc import Mapping
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from hf_dp.errors import RecipeError
from hf_dp.recipe.classes import inner
from hf_dp.recipe.examples import Examples, beginning, joined, tokens
from hf_dp.recipe.recipe import DataSection
from hf_dp.recipe.records import chunks, column_of, template_of

ROLES = {"human": "user", "gpt": "assistant"}  # names of other data sets -> those of chat templates


def dialogues(records: datasets.Dataset, data: DataSection, tokenizer: PreTrainedTokenizerBase, which: str) -> Examples:
    """Conversations, which trl writes out by the tokenizer's chat template: the column `messages`, or prompt and
    completion as one turn each of user and assistant.

    Raises:
        RecipeError: an unknown column, one that holds no messages, or a tokenizer without a chat template.
    """
    if tokenizer.chat_template is None:
        raise RecipeError(
            "model.name: its tokenizer has no chat template; take an instruct model, or the task causal_lm, whose "
            "templates write a conversation out"
        )
    if data.messages is None:
        prompt, target = (template_of(data, key, records, which) for key in ("prompt", "target"))
        turns = {
            "prompt": [[_turn("user", prompt.render(r))] for chunk in chunks(records) for r in chunk],
            "completion": [[_turn("assistant", target.render(r))] for chunk in chunks(records) for r in chunk],
        }
        return Examples(datasets.Dataset.from_dict(turns))
    column = column_of(data, "messages", records, which)
    keys = set(found) if isinstance(found := inner(records.features[column]), dict) else set()
    if not any({*pair} <= keys for pair in (("role", "content"), ("from", "value"))):
        raise RecipeError(
            f"data.messages on data.{which}: expected lists of {{role, content}} or of {{from, value}} in the column "
            f"{column!r}; for a text and its answer give data.prompt and data.target"
        )
    if "from" in keys:
        told = [[_translated(message) for message in row or []] for row in records[column]]
        return Examples(datasets.Dataset.from_dict({"messages": told}))
    return Examples(
        records.select_columns([column]).rename_columns({column: "messages"} if column != "messages" else {})
    )


def _translated(message: Mapping[str, str]) -> Mapping[str, str]:
    if message.get("role") is not None:
        return _turn(message["role"], message["content"])
    return _turn(ROLES.get(message["from"], message["from"]), message["value"])


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def pairs(records: datasets.Dataset, data: DataSection, which: str) -> Examples:
    """Prompt and two answers of every record, as text: columns prompt, chosen and rejected, which trl tokenises.

    Raises:
        RecipeError: a template names an unknown column.
    """
    return Examples(datasets.Dataset.from_dict(_rendered(records, data, which)))


def ranked(
    records: datasets.Dataset, data: DataSection, tokenizer: PreTrainedTokenizerBase, max_length: int, which: str
) -> Examples:
    """Prompt and answer in one row of tokens, for the better and for the worse answer of every record: columns
    chosen_ids and rejected_ids. A row of more than `max_length` tokens is cut as those of `completions` are.

    Raises:
        RecipeError: a template names an unknown column, or the tokenizer has no end-of-text mark.
    """
    if tokenizer.eos_token_id is None:
        raise RecipeError("model.name: its tokenizer has no eos_token, at which a text is scored: set one")
    texts = _rendered(records, data, which)
    starts = [beginning(ids, tokenizer) for ids in tokens(tokenizer, texts["prompt"], special=True)]
    rows = {
        f"{name}_ids": [
            joined(start, [*ids[: max_length - 2], tokenizer.eos_token_id], tokenizer, max_length)
            for start, ids in zip(starts, tokens(tokenizer, texts[name], special=False), strict=True)
        ]
        for name in ("chosen", "rejected")
    }
    return Examples(datasets.Dataset.from_dict(rows))


def _rendered(records: datasets.Dataset, data: DataSection, which: str) -> Mapping[str, list[Any]]:
    templates = {name: template_of(data, name, records, which) for name in ("prompt", "chosen", "rejected")}
    return {
        name: [template.render(r) for chunk in chunks(records) for r in chunk] for name, template in templates.items()
    }
