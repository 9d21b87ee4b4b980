"""Records -> examples for training: rows of tokens whose loss is on the target alone, pairs of a source and a target,
or texts as they are.

Every record becomes exactly one example, or, where long ones are split, one unit of several: so N, which is public,
does not depend on the content of any record.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_dp.errors import RecipeError
from hf_dp.per_example import IGNORED
from hf_dp.recipe.recipe import DataSection
from hf_dp.recipe.records import chunks, template_of


class Examples(NamedTuple):
    """`rows` has the columns input_ids and labels, or those of trl's trainers; `num_characters` is the total length of
    the kept targets (0 where there are none); `record_of_row` says of which record each row is, where a record may have
    several.
    """

    rows: datasets.Dataset
    num_characters: int = 0
    record_of_row: Sequence[int] | None = None


class Example(TypedDict):
    """One example: its tokens, and a label for each token, the tokens of its target, or the number of its class."""

    input_ids: Sequence[int]
    labels: int | Sequence[int]


@dataclass(frozen=True)
class PadRight:
    """A collator: features -> input_ids, attention_mask, [B, T], and labels, [B, S] ([B] for classes), padded on the
    right.
    """

    pad_token_id: int

    def __call__(self, features: Sequence[Example]) -> dict[str, Tensor]:
        """The batch; T and S are the lengths of its longest row and of its longest list of labels, at least 1."""
        rows = [list(f["input_ids"]) for f in features]
        width = max([1, *map(len, rows)])
        return {
            "input_ids": torch.tensor([row + [self.pad_token_id] * (width - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
            "labels": _padded([f["labels"] for f in features]),
        }


def _padded(labels: Sequence[int | Sequence[int]]) -> Tensor:
    rows = [label for label in labels if not isinstance(label, int)]
    if len(rows) < len(labels):
        return torch.tensor(labels)
    width = max([1, *map(len, rows)])
    return torch.tensor([[*row, *[IGNORED] * (width - len(row))] for row in rows])


# ---- causal language models ------------------------------------------------------------------------------------------


def completions(
    records: datasets.Dataset,
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    which: str = "train",
) -> Examples:
    """Prompt, target and end-of-text mark of every record as one row of tokens; labels are -100 on the prompt.

    Prompt and target are tokenised separately, so that a prompt alone gives the same tokens as in training. A target of
    more than `max_length` tokens loses its end (and the end-of-text mark); then a prompt that does not fit loses its
    beginning. With `data.split` a longer target loses nothing: it is cut in pieces, each a row of its own after the
    prompt, of which what half a row holds stays. A record with an empty target becomes an example without labels: its
    loss and gradient are zero, and it still counts in N.

    Raises:
        RecipeError: a template names an unknown column, or the tokenizer has no end-of-text mark.
    """
    _require_end(tokenizer)
    prompt = template_of(data, "prompt", records, which)
    target = template_of(data, "target", records, which)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    num_characters, record_of_row, number = 0, [], 0
    for chunk in chunks(records):
        prompts = tokens(tokenizer, [prompt.render(r) for r in chunk], special=True)
        texts = [target.render(r) for r in chunk]
        for start, text, ids in zip(prompts, texts, tokens(tokenizer, texts, special=False), strict=True):
            first, ended = beginning(start, tokenizer), [*ids, tokenizer.eos_token_id] if text.strip() else []
            room = max_length - 1 if data.split is None else max_length - min(len(first), max_length // 2)
            pieces = [ended[at : at + room] for at in range(0, max(1, len(ended)), room)]
            pieces = pieces[:1] if data.split is None else pieces
            for piece in pieces:
                row = joined(first, piece, tokenizer, max_length)
                rows["input_ids"].append(row)
                rows["labels"].append([IGNORED] * (len(row) - len(piece)) + piece)
            record_of_row += [number] * len(pieces)
            number, kept = number + 1, sum(map(len, pieces))
            num_characters += len((text if kept > len(ids) else str(tokenizer.decode(ids[:kept]))).strip())
    found = dataset_of(rows, {"labels": datasets.Sequence(datasets.Value("int32"))})
    return Examples(found, num_characters, record_of_row if data.split else None)


def beginning(prompt: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The prompt without a closing mark that the tokenizer added; at least one token, for the target to follow."""
    if prompt[-1:] == [tokenizer.eos_token_id] and tokenizer.eos_token_id != tokenizer.bos_token_id:
        prompt = prompt[:-1]
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return prompt or [first]


def joined(prompt: list[int], ended: list[int], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int]:
    """The row of a prompt, of which at least one token stays, and what it ends with: a target, or a piece of one."""
    room = max_length - len(ended)
    if len(prompt) > room:
        mark = prompt[:1] if prompt[0] == tokenizer.bos_token_id and room > 1 else []
        prompt = mark + prompt[len(prompt) - room + len(mark) :]
    return prompt + ended


# ---- encoder-decoders, and encoders that fill in masked tokens -------------------------------------------------------


def translations(
    records: datasets.Dataset,
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    which: str = "train",
) -> Examples:
    """Prompt and target of every record as two rows of tokens: what the encoder reads, and what the decoder is to
    write. Each loses its end beyond `max_length` tokens. A record with an empty target has no labels, and still counts.

    Raises:
        RecipeError: a template names an unknown column, or the tokenizer has no end-of-text mark.
    """
    _require_end(tokenizer)
    prompt, target = (template_of(data, key, records, which) for key in ("prompt", "target"))
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    num_characters, end = 0, tokenizer.eos_token_id
    for chunk in chunks(records):
        texts = [target.render(r) for r in chunk]
        sources = tokenizer([prompt.render(r) for r in chunk], truncation=True, max_length=max_length)["input_ids"]
        targets = tokenizer(text_target=texts, truncation=True, max_length=max_length)["input_ids"]
        for source, text, ids in zip(sources, texts, targets, strict=True):
            ended = ids if ids[-1:] == [end] else [*ids, end][:max_length]
            rows["input_ids"].append(list(source) or [end])
            rows["labels"].append(list(ended) if text.strip() else [])
            whole = ended[-1] == end
            num_characters += len((text if whole else str(tokenizer.decode(ended, skip_special_tokens=True))).strip())
    return Examples(dataset_of(rows, {"labels": datasets.Sequence(datasets.Value("int32"))}), num_characters)


def whole_texts(
    records: datasets.Dataset,
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    which: str = "train",
) -> Examples:
    """The text of every record as a row of tokens without labels, which a collator masks anew in each step. A text of
    more than `max_length` tokens loses its end.

    Raises:
        RecipeError: the template names an unknown column, or the tokenizer has no mask.
    """
    if tokenizer.mask_token_id is None:
        raise RecipeError("model.name: its tokenizer has no mask_token; take a model that was trained to fill in masks")
    text = template_of(data, "text", records, which)
    rows = [
        ids
        for chunk in chunks(records)
        for ids in tokenizer([text.render(r) for r in chunk], truncation=True, max_length=max_length)["input_ids"]
    ]
    return Examples(dataset_of({"input_ids": rows}, {}))


def _require_end(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            "the tokenizer has no eos_token, so that a model could not learn where a target ends: set one"
        )


# ---- all -------------------------------------------------------------------------------------------------------------


def tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool) -> list[list[int]]:
    """Each text's tokens, with the tokenizer's own special ones or without."""
    return [
        list(ids) for ids in tokenizer(texts, add_special_tokens=special, truncation=False, verbose=False)["input_ids"]
    ]


def dataset_of(rows: Mapping[str, Sequence[object]], features: dict[str, object]) -> datasets.Dataset:
    """Rows with the column input_ids, and the columns of `features`."""
    schema = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32")), **features})
    return datasets.Dataset.from_dict(rows, features=schema)
