"""A record and the model beside it -> the card's first sections: what it is and promises, how to use it, how it was
trained.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hf_dp.card.readme import tags_of
from hf_dp.card.record import Record
from hf_dp.card.usage import Model, usage
from hf_dp.card.words import counted, ended_early, in_turn, rounded_up, settings, steps_claimed, units
from hf_dp.mechanism import is_owned

PREFIX = "base_model:"  # of the Hub's tags about the base
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_CLAIM = re.compile(r"\(epsilon <= [^)]*\)")
_NAMED = re.compile(r'^model_id = "([\w.-]+/[\w.-]+)"', re.MULTILINE)  # in the code of a card
_NO_NAMES = re.compile(
    r"(outputs?|out|results?|models?|final|run|checkpoint-\d+)(-merged)?", re.IGNORECASE
)  # of folders


@dataclass(frozen=True)
class Described:
    """What only the training knows of a model, all of it public.

    Attributes:
        rows: name -> value, for the table of settings.
        results: name -> number, on evaluation data that were declared public.
        base: folder or name of the base model, or "".
        license: of the base, where it is known, or "".
        evaluated_on: name of the evaluation data, or "".
        name: of the model on the Hub, `USER/MODEL`, or "".
    """

    rows: Mapping[str, str] = field(default_factory=dict)
    results: Mapping[str, float] = field(default_factory=dict)
    base: str = ""
    license: str = ""
    evaluated_on: str = ""
    name: str = ""


def claim(record: Record) -> str:
    """What is claimed, in one line: `(epsilon <= 7.997, delta = 2.3e-05)`. Epsilon is rounded up."""
    return f"(epsilon <= {rounded_up(record.epsilon, digits=4):g}, delta = {record.delta:.6g})"


def wrong_claims(words: str, record: Record) -> list[str]:
    """The claims in `words` that are not the record's."""
    right = {claim(record)} if record.private else set()
    return [found for found in _CLAIM.findall(words) if found not in right]


def model_section(record: Record, model: Model, front: Mapping[str, object], name: str) -> str:
    """The first section: title, promise, what it is, how to use it.

    Args:
        record: of the training.
        model: what lies beside the card.
        front: the card's YAML; its base and licence are told.
        name: of the model's folder, or on the Hub.
    """
    base = model.base or str(front.get("base_model") or "")
    what = f"{_kind(model.adapter)} adapter" if model.adapter else "whole model"
    rows = {
        "what it is": f"{what} for {model.task}",
        "base model": _base_in_words(base),
        "licence": str(front.get("license") or ""),
        "classes": ", ".join(_cell(c) for c in model.classes),
    }
    return f"""# {title(record, model, front, name)}

{_promise(record)}

{table("about", {k: v for k, v in rows.items() if v})}

## How to use it

```python
{usage(model, base, name)}
```
"""


def title(record: Record, model: Model, front: Mapping[str, object], name: str) -> str:
    """What the model is called: by its name, or by base or task where its folder's name is any folder's (`out`)."""
    short = name.rpartition("/")[2]
    if not _NO_NAMES.fullmatch(short):
        return short
    base = Path(model.base or str(front.get("base_model") or "")).name
    how = " with differential privacy" if record.private else ""
    return f"{base or model.task.capitalize()}, fine-tuned{how}"


def name_on_the_hub(words: str) -> str:
    """The name on the Hub by which the code in a card's first section loads the model; "" where it has none."""
    found = _NAMED.search(words)
    return found[1] if found else ""


def training_section(record: Record, described: Described) -> str:
    """The second section: what it was trained on, and how."""
    each = settings(record)
    rows = {
        f"training {counted(record.unit)}": f"{record.mechanism.num_examples:,}",
        "steps": f"{record.num_steps:,}" + (f" of {steps_claimed(record):,}" if ended_early(record) else ""),
        "expected batch size": in_turn(s.expected_batch_size for s in each),
        "clipping bound of an example's gradient": in_turn(s.clip_norm for s in each),
        "noise multiplier": in_turn(s.joint_noise_multiplier for s in each),
    }
    versions = ", ".join(f"{name} {version}" for name, version in record.libraries.items())
    shown = table("setting", {**described.rows, **rows})
    return f"## Training\n\n{shown}\n\n**Framework versions.** {versions}\n"  # as a heading, PEFT would write below it


def results_section(described: Described) -> str:
    """The third section: the results that may be stated; "" where there are none."""
    if not described.results:
        return ""
    where = f" ({described.evaluated_on})" if described.evaluated_on else ""
    numbers = {name.replace("_", " "): f"{value:.4g}" for name, value in described.results.items()}
    return (
        f"## Results\n\nOn evaluation data that whoever trained the model declared public{where}:\n\n"
        f"{table('measure', numbers)}\n"
    )


def front_matter(
    model: Model, front: Mapping[str, object], described: Described | None, name: str, *, selected: bool
) -> dict[str, object]:
    """Keys of the YAML that a whole card has besides the privacy block; the user's own values stay.

    The base is named where it is a name on the Hub, which refuses paths. Of a model that was `selected` by its results,
    none are stated.
    """
    known = described or Described()
    base = front.get("base_model") or known.base
    named = None if isinstance(base, str) and not is_hub_name(base) else base
    ours = {
        "library_name": "peft" if model.adapter else "transformers",
        "pipeline_tag": model.pipeline_tag,
        "base_model": named,
        "license": known.license,
    }
    keys: dict[str, object] = {key: front.get(key) or value for key, value in ours.items() if value}
    if "base_model" in front and "base_model" not in keys:
        keys |= {"base_model": None, "tags": [t for t in tags_of(front) if not str(t).startswith(PREFIX)]}
    index = front.get("model-index")
    if (described is not None or selected) and (index is None or _has_our_form(index)):
        may = known.results and known.evaluated_on and not selected
        keys["model-index"] = _model_index(model, known, name) if may else None
    return keys


def is_hub_name(name: str) -> bool:
    """Whether `name` can be the name of a repository and is no folder here."""
    return bool(_HUB_NAME.fullmatch(name)) and not Path(name).is_dir()


def _promise(record: Record) -> str:
    if not record.private:
        return f"**NOT PRIVATE: {record.reason}.** Treat this model like its training data."
    n, plural = record.mechanism.num_examples, units(record.unit)
    of = f"{n:,}" if counted(record.unit) == plural else f"{n:,} {counted(record.unit)}"
    single = f"one of its training {plural}"
    if is_owned(record.unit):
        of, single = f"{n:,} {plural}", f"owner of its training {plural} by what these say"
    return (
        f"**Trained with differential privacy: {claim(record)}, one {record.unit} of {of}.** What the model tells "
        f"about any single {single} is limited; what that means, and how to check it, stands under "
        '"Privacy" below.'
    )


def _kind(adapter: str) -> str:
    return {"LORA": "LoRA", "ADALORA": "AdaLoRA", "DORA": "DoRA"}.get(adapter, adapter)


def _base_in_words(base: str) -> str:
    if not base:
        return ""
    return f"[{base}](https://huggingface.co/{base})" if is_hub_name(base) else f"`{Path(base).name}`, a local folder"


def table(title: str, rows: Mapping[str, str]) -> str:
    """Name -> value as a table of Markdown."""
    return "\n".join([f"| {title} | |", "|---|---|", *(f"| {k} | {_cell(v)} |" for k, v in rows.items())])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _model_index(model: Model, known: Described, name: str) -> list[dict[str, object]]:
    """The results in the form that the Hub reads."""
    metrics = [
        {"type": key, "name": key, "value": value} for key, value in known.results.items() if math.isfinite(value)
    ]
    return [
        {
            "name": name,
            "results": [
                {
                    "task": {"type": model.pipeline_tag or "other", "name": model.task},
                    "dataset": {"type": known.evaluated_on, "name": known.evaluated_on},
                    "metrics": metrics,
                }
            ],
        }
    ]


def _has_our_form(index: object) -> bool:
    """Whether a model-index holds no results, or only those of the form that `_model_index` gives them."""
    found = [r for entry in index for r in entry.get("results") or []] if isinstance(index, list) else [{}]
    metrics = [m for r in found for m in r.get("metrics") or [{"type": None, "name": "of somebody else"}]]
    return all(m.get("type") == m.get("name") for m in metrics)
