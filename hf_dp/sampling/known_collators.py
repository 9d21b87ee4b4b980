"""A collator -> whether it is known to make each row of one record alone."""

from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

from torch.utils.data import default_collate
from torch.utils.data._utils.collate import default_collate_fn_map
from transformers import default_data_collator

from hf_dp.per_example import Record

KNOWN = (
    "DataCollatorWithPadding DataCollatorForLanguageModeling DataCollatorForSeq2Seq DataCollatorForTokenClassification "
    "DefaultDataCollator"
).split()
SHIPPED_BY = ("transformers", "trl")


def unwrapped(collate: Callable[[list[Record]], Any]) -> Callable[[list[Record]], Any]:
    """Without what Trainer puts around it, which leaves columns out."""
    inside = type(collate).__name__ == "RemoveColumnsCollator"
    return cast(Callable[[list[Record]], Any], cast(Any, collate).data_collator) if inside else collate


def is_known(collate: Callable[[list[Record]], Any]) -> bool:
    """Whether this padding collator is known to make each row of one record alone; also inside Trainer's wrapper."""
    collate = unwrapped(collate)
    if collate is default_collate:  # a user may have put functions of their own in its table
        return all(getattr(f, "__module__", "") == default_collate.__module__ for f in default_collate_fn_map.values())
    if collate is default_data_collator:
        return True
    shipped = _is_as_shipped(collate) and type(collate).__name__ in KNOWN
    tokenizer = vars(collate).get("tokenizer") if shipped else None
    return shipped and not vars(collate).get("mlm", False) and (tokenizer is None or _is_as_shipped(tokenizer))


def _is_as_shipped(part: object) -> bool:
    """Whether a collator or tokenizer is of a class of these libraries, with nothing of its own in a method's place."""
    kind = type(part)
    own = [name for name in getattr(part, "__dict__", {}) if isinstance(getattr(kind, name, None), FunctionType)]
    return kind.__module__.partition(".")[0] in SHIPPED_BY and not own
