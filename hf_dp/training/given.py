"""A trainer's arguments other than its options (privacy, data set, collator) -> what can't be used of them, and why."""

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import datasets
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainingArguments

from hf_dp.config import AuditConfig, PrivacyConfig
from hf_dp.errors import ConfigError
from hf_dp.sampling import REMEDY, own_generators

STREAMED = (
    "Poisson sampling needs its length and random access; load it as a map-style dataset (datasets.load_dataset "
    "without streaming=True)"
)


def refuse_other_types(
    privacy: object, args: object, audit: object, micro_batch_tokens: object, check_records: object
) -> None:
    """Refuses what is not of the type that the trainer's argument has.

    Raises:
        ConfigError: names all of them.
    """
    wrong = [*_of_other_types(privacy, args, audit)]
    whole = isinstance(micro_batch_tokens, int) and not isinstance(micro_batch_tokens, bool) and micro_batch_tokens > 0
    if micro_batch_tokens is not None and not whole:
        wrong.append(f"micro_batch_tokens must be a whole number, 1 or more (got {micro_batch_tokens!r})")
    if check_records is not None and not _is_list_of_records(check_records):
        wrong.append(
            "check_records must be a list of public records, each as the data set gives one, such as [{'input_ids': "
            f"[...], 'labels': [...]}}, ...] (got {_kind(check_records)})"
        )
    if wrong:
        raise ConfigError("; ".join(wrong))


def _of_other_types(privacy: object, args: object, audit: object) -> Iterator[str]:
    expected = (("privacy", privacy, PrivacyConfig), ("audit", audit, AuditConfig), ("args", args, TrainingArguments))
    for name, value, kind in expected:
        if isinstance(value, kind) or (value is None and name != "privacy"):
            continue
        unpacked = f"{name}={kind.__name__}(**{name})" if isinstance(value, Mapping) else f"{name}={kind.__name__}(...)"
        yield f"{name} must be of type {kind.__name__}, got {_kind(value)}: give {unpacked}"


def _is_list_of_records(given: object) -> bool:
    return isinstance(given, (Sequence, datasets.Dataset)) and not isinstance(given, str) and len(given) > 0


def _kind(value: object) -> str:
    return f"an empty {type(value).__name__}" if value == [] else f"a {type(value).__name__}"


def unusable_data(dataset: Any, collator: Any) -> Iterator[str]:
    """One line for each reason why a data set can't be sampled from, or a collator not be private."""
    if dataset is not None:
        yield from _unusable_dataset(dataset)
    flattens = any(kind.__name__ == "DataCollatorWithFlattening" for kind in type(collator).__mro__)
    if flattens or getattr(collator, "padding_free", False):
        yield (
            f"{type(collator).__name__}{'' if flattens else '(padding_free=True)'} joins the records of a batch in one "
            "row, where nothing bounds what one of them adds: give a collator that pads, such as transformers' "
            "DataCollatorForSeq2Seq(tokenizer), or padding_free=False (micro-batches hold records of like lengths, so "
            "that little is padded)"
        )
    if getattr(collator, "seed", None) is not None:
        yield (
            f"{type(collator).__name__}(seed=...): masks from a public seed are dealt out in the order of the batch, "
            "which couples its records; leave the seed out (masks then come from the operating system)"
        )
    kept = own_generators(collator, "data_collator") + own_generators(dataset, "train_dataset")
    if kept:
        yield f"random generators of its own in {', '.join(kept)}: {REMEDY}"


def _unusable_dataset(dataset: Any) -> Iterator[str]:
    kind = type(dataset).__name__
    if isinstance(dataset, (str, PathLike)):
        yield f"train_dataset is a name: give datasets.load_dataset({str(dataset)!r}, split='train'), the records"
    elif isinstance(dataset, Mapping) and not any(map(_is_split, dataset.values())):
        yield f"train_dataset is a {kind} of columns: make a table of it, as datasets.Dataset.from_dict(...)"
    elif isinstance(dataset, Mapping):
        first = next(iter(dataset))
        yield (
            f"train_dataset is a {kind} of the splits {', '.join(map(str, dataset))}: give one of them, as "
            f"train_dataset=data[{first!r}]"
        )
    elif type(dataset).__module__.partition(".")[0] == "pandas":
        yield "train_dataset is a table of pandas: give datasets.Dataset.from_pandas(...)"
    elif not _has_length(dataset):
        yield f"train_dataset of type {kind}: {STREAMED}"
    elif len(dataset) == 0:
        yield "train_dataset is empty: it must have one record at least"


def _is_split(value: object) -> bool:
    return isinstance(value, (Dataset, datasets.Dataset, datasets.IterableDataset))


def _has_length(dataset: Any) -> bool:
    if isinstance(dataset, IterableDataset):
        return False
    try:
        return len(dataset) >= 0 and callable(type(dataset).__getitem__)
    except (TypeError, AttributeError, NotImplementedError):
        return False
