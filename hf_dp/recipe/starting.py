"""What somebody wants (model, data, templates, budget) -> the text of a commented recipe that runs.

Only names of columns and the number of records go into it, nothing that stands in a record.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hf_dp.recipe.recipe import default_output

Templates = Mapping[str, str]
_PLAIN = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./-")


@dataclass(frozen=True)
class Wanted:
    """What a starting recipe is made from.

    Attributes:
        model: a folder, or a name on the Hub.
        data: the file of the records, or a name on the Hub.
        num_records: N; None where it is not known.
        columns: the columns with what they hold, in words, or "".
        task: a key of `tasks.TASKS`.
        templates: keys of the section `data`, such as `target`, with their templates or columns.
        labels: the classes of a classifier; they are published.
        validation: as `data`, or None.
        epsilon: the budget.
        unit_column: protect all records with the same value there as one; None for each record by itself.
        contribution_bound: with lists of owners in that column, how many records of each are kept at most; else None.
        person: a column that looks like a person's name or number, told in a comment; None if there is none.
        max_length: the most tokens of a record.
    """

    model: str
    data: str
    num_records: int | None = None
    columns: str = ""
    task: str = "causal_lm"
    templates: Templates = field(default_factory=lambda: {"target": "{text}"})
    labels: tuple[str, ...] = ()
    validation: str | None = None
    epsilon: float = 8.0
    unit_column: str | None = None
    contribution_bound: int | None = None
    person: str | None = None
    max_length: int = 256


def starting_recipe(wanted: Wanted, path: Path) -> str:
    """The recipe's text; `path` is where it is to lie."""
    records = f" ({wanted.num_records:,} records)" if wanted.num_records else ""
    sections = [
        f"""\
# A private fine-tuning of {wanted.model} on {wanted.data}{records}.
#   hf-dp check {path}    what is trained, and the plan; trains nothing
#   hf-dp train {path}    the run; model and card are then in {default_output(path.stem)}
#   hf-dp recipe --keys{" " * (len(str(path)) - 7)}    every key that may stand here, with its default""",
        "\n".join(_model(wanted)),
        "\n".join(_data(wanted)),
        "\n".join(_training(wanted, default_output(path.stem))),
        "\n".join(_privacy(wanted)),
    ]
    return "\n\n".join(sections) + "\n"


def _model(wanted: Wanted) -> Iterator[str]:
    yield "model:"
    yield _line("name", _scalar(wanted.model), "a folder, or a name on the Hub")
    if wanted.task != "causal_lm":
        yield _line("task", wanted.task)
    yield ""
    yield "lora:                              # a small adapter; without this section, all weights"
    yield _line("r", "8", "its rank: fewer trained numbers, less noise in all")
    yield _line("target_modules", "all-linear")


def _data(wanted: Wanted) -> Iterator[str]:
    yield "data:"
    yield _line("train", _scalar(wanted.data), wanted.columns)
    validation = "public records to evaluate on; else its numbers are not covered"
    if wanted.validation:
        yield _line("validation", _scalar(wanted.validation), validation)
    else:
        yield f"  # validation: heldout.jsonl      # {validation}"
    for key, template in wanted.templates.items():
        yield _line(key, _scalar(template))
    if wanted.task == "causal_lm" and "prompt" not in wanted.templates:
        yield '  # prompt: "{column}: "             # what stands before the target; no loss on it'
    if wanted.labels:
        yield _line("labels", json.dumps(list(wanted.labels), ensure_ascii=False), "published with the model")
    yield _line("max_length", str(wanted.max_length), "tokens; longer records lose their end")


def _training(wanted: Wanted, output: str) -> Iterator[str]:
    yield "training:"
    yield _line("output_dir", _scalar(output))
    yield _line(
        "num_train_epochs", str(epochs_for(wanted.num_records)), "each step spends; more steps, more noise each"
    )
    yield "  # learning_rate: 1e-3              # from a rule, which the plan names, unless given"
    yield _line("per_device_train_batch_size", "16", "memory and speed only")
    yield _line("logging_steps", "10")
    yield _line("save_strategy", '"no"', "the finished model is saved in any case")


def _privacy(wanted: Wanted) -> Iterator[str]:
    yield "privacy:"
    yield _line("target_epsilon", f"{wanted.epsilon:g}", "smaller is more private; the noise follows from it")
    yield _line(
        "expected_batch_size", str(batch_for(wanted.num_records)), "the logical batch; larger, less noise in all"
    )
    yield "  # clip_norm: 0.1                   # no record moves a step's sum by more; from a rule unless given"
    if wanted.unit_column and wanted.contribution_bound:
        yield _line("unit_column", _scalar(wanted.unit_column), "lists of owners; all records of each are protected")
        bound = "records of an owner that are kept at most; who owns which is not protected"
        yield _line("contribution_bound", str(wanted.contribution_bound), bound)
    elif wanted.unit_column:
        yield _line("unit_column", _scalar(wanted.unit_column), "all records with the same value are protected as one")
    else:
        yield (
            f"  # unit_column: {wanted.person or 'author'}  # protect all records with the same value as one, not each"
            " by itself"
        )


def epochs_for(num_records: int | None) -> int:
    """Passes over the data: few records need many, and many cost time."""
    n = num_records or 0
    return 10 if n <= 50_000 else 3 if n <= 500_000 else 1


def batch_for(num_records: int | None) -> int:
    """A power of two from 8 to 1,024, at most a quarter of the records, that makes some 150 steps of the epochs."""
    n = num_records or 10_000
    batch = 8
    while batch < 1024 and batch * 2 <= n / 4 and n * epochs_for(n) / (batch * 2) >= 110:
        batch *= 2
    return batch


def _line(key: str, value: str, comment: str = "") -> str:
    text = f"  {key}: {value}"
    return f"{text:<34} # {comment}" if comment else text


def _scalar(text: str) -> str:
    """Text as YAML reads it back."""
    plain = text and set(text) <= _PLAIN and not text[0].isdigit() and text[0] not in "-."
    return (
        text
        if plain and text.lower() not in ("true", "false", "null", "no", "yes")
        else json.dumps(text, ensure_ascii=False)
    )
