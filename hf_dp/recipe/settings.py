"""A section of a recipe and the dataclass that it fills -> all mistakes: unknown names, wrong types, missing values."""

import dataclasses
import enum
import types
import typing
from collections.abc import Iterable, Iterator, Mapping

from hf_dp.config import nearest

Problem = str
_PLAIN = (bool, int, float, str, type(None), list, dict)
_WORDS: dict[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
    list: "a list",
    dict: "a mapping",
}
# words that people use, in lower case -> the setting that they mean
MEANT = {
    "batch_size": "privacy.expected_batch_size (the logical batch) or training.per_device_train_batch_size (memory)",
    "train_batch_size": "privacy.expected_batch_size, the logical batch",
    "micro_batch_size": "training.per_device_train_batch_size",
    "lr": "training.learning_rate",
    "epochs": "training.num_train_epochs",
    "num_epochs": "training.num_train_epochs",
    "n_epochs": "training.num_train_epochs",
    "steps": "training.max_steps",
    "num_steps": "training.max_steps",
    "scheduler": "training.lr_scheduler_type",
    "optimizer": "training.optim",
    "output": "training.output_dir",
    "out": "training.output_dir",
    "wd": "training.weight_decay",
    "rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "modules": "lora.target_modules",
    "epsilon": "privacy.target_epsilon",
    "eps": "privacy.target_epsilon",
    "delta": "privacy.target_delta",
    "sigma": "privacy.noise_multiplier",
    "clip": "privacy.clip_norm",
    "clipping": "privacy.clip_norm",
    "max_norm": "privacy.clip_norm",
    "path": "model.name or data.train",
    "base": "model.name",
    "model": "model.name",
    "model_name": "model.name",
    "file": "data.train",
    "dataset": "data.train",
    "train_file": "data.train",
    "eval": "data.validation",
    "test": "data.validation",
    "max_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "classes": "data.labels",
    "completion": "data.target",
}


def meant(section: str, name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` for an unknown setting, by its meaning or by its letters."""
    word = name.lower()
    asked = MEANT.get(word) or MEANT.get(word.removeprefix(f"{section}_")) or ""
    there, _, key = asked.partition(".")
    if there == section and key.isidentifier():
        asked = repr(key)
    return f"; did you mean {asked}?" if asked else nearest(name, known)


def problems(section: str, given: Mapping[str, object], into: type, extra: Iterable[str] = ()) -> Iterator[Problem]:
    """What keeps `given` from being the keywords of the dataclass `into`.

    A type is checked if it is made of plain ones (numbers, text, lists, mappings, enums); others are left to `into`.

    Args:
        section: the section's name, for the messages.
        given: key -> value.
        into: the dataclass.
        extra: further keys that the section may have.
    """
    fields = {f.name: f for f in dataclasses.fields(into) if f.init}
    hints = typing.get_type_hints(into)
    for name, value in given.items():
        if name in fields:
            if not _fits(value, hints[name]):
                near = _near_member(value, hints[name])
                yield f"{section}.{name}: expected {_described(hints[name])}, got {value!r}{near}"
        elif name not in extra:
            yield f"{section}.{name}: there is no such setting{meant(section, str(name), [*fields, *extra])}"
    for name, f in fields.items():
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if needed and name not in given:
            yield f"{section}.{name}: missing; {f.metadata.get('help', 'it has no default')}"


def _options(hint: object) -> list[object]:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return [option for part in typing.get_args(hint) for option in _options(part)]
    if origin is typing.Literal:
        return list(typing.get_args(hint))
    return [origin or hint]


def _is_enum(option: object) -> typing.TypeGuard[type[enum.Enum]]:
    return isinstance(option, type) and issubclass(option, enum.Enum)


def _fits(value: object, hint: object) -> bool:
    options = _options(hint)
    types_, members = [o for o in options if isinstance(o, type)], [o for o in options if not isinstance(o, type)]
    enums = [o for o in types_ if _is_enum(o)]
    if any(o not in _PLAIN and not _is_enum(o) for o in types_) or not (types_ or members):
        return True  # another type: its class will say what is wrong
    if enums and isinstance(value, str):
        return any(value == member.value for e in enums for member in e)
    if any(value == m and type(value) is type(m) for m in members):
        return True
    if members and isinstance(value, str) and any("[" in str(m) for m in members):
        return True  # a pattern among literals, as 'pissa_niter_[number of iters]'
    if isinstance(value, bool):
        return bool in types_
    return any(type(value) is t or (t is float and isinstance(value, int)) for t in types_)


def _described(hint: object) -> str:
    options = _options(hint)
    enums = [o for o in options if _is_enum(o)]
    if enums:
        words = [repr(member.value) for e in enums for member in e]
        return "one of " + ", ".join(words[:12]) + (", ..." if len(words) > 12 else "")
    return " or ".join(dict.fromkeys(_WORDS.get(o, repr(o)) for o in options))


def _near_member(value: object, hint: object) -> str:
    members = [str(m.value) for o in _options(hint) if _is_enum(o) for m in o]
    return nearest(value, members) if isinstance(value, str) and members else ""
