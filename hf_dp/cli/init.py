"""A file of records, and a few answers -> a commented recipe that runs. Questions are asked on a terminal only."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

if TYPE_CHECKING:
    import datasets

    from hf_dp.recipe import Guess, Wanted

MODEL, LENGTH = "openai-community/gpt2", 256


def init(
    data: Annotated[str | None, typer.Argument(help="A file (.jsonl, .json, .csv, .parquet), or a Hub name.")] = None,
    model: Annotated[str | None, typer.Option(help=f"A folder, or a name on the Hub such as {MODEL}.")] = None,
    target: Annotated[str | None, typer.Option(help='What is learnt to write, such as "{note}".')] = None,
    prompt: Annotated[str | None, typer.Option(help='What stands before it, such as "{title}: ".')] = None,
    label: Annotated[str | None, typer.Option(help="Tell classes instead: the column that holds them.")] = None,
    labels: Annotated[str | None, typer.Option(help="Their names, with commas between; they are published.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="The budget. Default 8; smaller is more private.")] = None,
    unit_column: Annotated[str | None, typer.Option(help="Protect all records with one value here as one.")] = None,
    output: Annotated[Path | None, typer.Option(help="The recipe's file. Default: the data's name, .yaml.")] = None,
) -> None:
    """Writes a commented recipe for your data: what flags don't say, it asks, with what it found in the columns."""
    from hf_dp.cli.libraries import quiet
    from hf_dp.errors import ConfigError
    from hf_dp.recipe import check_columns, from_mapping, nested, starting_recipe

    quiet()
    data = data or _asked("Your records (a .csv, .jsonl, .json or .parquet file)", "")
    name = (output or Path(data)).stem
    if not name:
        raise ConfigError("name the file of your records: hf-dp init RECORDS.csv")
    path = output or Path(f"{name}.yaml")
    if path.exists():
        raise ConfigError(f"{path} exists already, and nothing is written over: name another file by --output")
    records = _records(data)
    text = starting_recipe(
        _wanted(data, records, Flags(model, target, prompt, label, labels, epsilon, unit_column)), path
    )
    made = from_mapping(nested(text, str(path)), name=name)
    check_columns(made.data, records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"Written: {path}\nNext: hf-dp check {path}    what is trained, and the plan; trains nothing")
    print(f"      hf-dp train {path}    the run; model and card are then in {made.output_dir}")


class Flags(NamedTuple):
    """What was said on the command line; None asks, or takes what was found."""

    model: str | None
    target: str | None
    prompt: str | None
    label: str | None
    labels: str | None
    epsilon: float | None
    unit_column: str | None


def _records(data: str) -> "datasets.Dataset":
    from hf_dp.errors import ConfigError
    from hf_dp.recipe import FILE_KINDS, DataSection, data_files, is_file

    if Path(data).exists() and not is_file(data):
        raise ConfigError(f"{data}: expected a file ending in {', '.join(FILE_KINDS)}, with one record a line or row")
    records = data_files.load(DataSection(train=data), "train")
    assert records is not None  # load returns None only where the recipe names nothing
    return records


def _wanted(data: str, records: "datasets.Dataset", flags: Flags) -> "Wanted":
    """The recipe's contents, from flags, answers and the columns.

    Raises:
        ConfigError: no column holds text, or classes have no names.
    """
    from hf_dp.recipe import OF_EACH, TASKS, Wanted, columns_in_words, guessed
    from hf_dp.sampling import groups_by, owners_in

    columns, guess = columns_in_words(records), guessed(records)
    print(f"{data}: {len(records):,} records of {columns}")
    task, templates, labels = _learnt(guess, flags, columns)
    model = flags.model or _asked("Base model (a folder, or a name on the Hub)", TASKS[task].base)
    epsilon = flags.epsilon if flags.epsilon is not None else _number("Privacy budget epsilon", 8.0)
    unit_column = flags.unit_column or _person(guess)
    units, bound = len(records), None
    if unit_column is not None and unit_column in records.column_names:
        bound = OF_EACH if owners_in(records, unit_column).in_lists else None
        groups = groups_by(records, unit_column, bound=bound)
        units = groups.num_groups if groups else units
    return Wanted(
        model=model,
        data=data,
        num_records=units,
        columns=columns,
        task=task,
        templates=templates,
        labels=labels,
        epsilon=epsilon,
        unit_column=unit_column,
        contribution_bound=bound,
        person=guess.person,
        max_length=min(LENGTH, _positions(model)),
    )


def _learnt(guess: "Guess", flags: Flags, columns: str) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """(task, templates, names of classes)."""
    from hf_dp.errors import ConfigError

    found = guess.templates
    if not found:
        raise ConfigError(f"no column holds text, which a model could learn from: there are {columns}")
    label = flags.label
    if label is None and flags.target is None and guess.label and _yes(f"Tell the classes of column {guess.label!r}?"):
        label = guess.label
    if label:
        named = flags.labels or _asked("Names of the classes, with commas between (they are published)", "")
        labels = tuple(name.strip() for name in named.split(",") if name.strip())
        if not labels:
            raise ConfigError(
                "--labels: name the classes, such as --labels yes,no: they become part of the published model, so they "
                "are not read off the records"
            )
        return "sequence_classification", {"text": flags.prompt or found["target"], "label": label}, labels
    if guess.task != "causal_lm" and not flags.target:
        return guess.task, found, ()
    prompt, target = flags.prompt or "", flags.target
    if target is None:
        target = _asked("What it learns to write, a template of columns", found["target"])
        prompt = prompt or _asked(
            "What stands before it (nothing: Enter)", found.get("prompt", "").replace("\n", "\\n")
        )
    templates = {"prompt": prompt, "target": target}
    return "causal_lm", {key: text.replace("\\n", "\n") for key, text in templates.items() if text}, ()


def _person(guess: "Guess") -> str | None:
    if guess.person and _yes(f"Protect all records with the same {guess.person!r} as one?"):
        return guess.person
    if guess.person:
        print(f"Each record is protected by itself; where a {guess.person} has several: --unit-column {guess.person}")
    return None


def _positions(model: str) -> int:
    """How many tokens a model in a folder takes; LENGTH of others, which are not loaded here."""
    import json

    try:
        settings = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        return int(settings.get("max_position_embeddings") or settings.get("n_positions") or LENGTH)
    except (OSError, ValueError, TypeError, AttributeError):
        return LENGTH


def _asked(question: str, default: str) -> str:
    """The answer on a terminal; elsewhere the default."""
    if not sys.stdin.isatty():
        return default
    return str(typer.prompt(question, default=default, show_default=bool(default)))


def _number(question: str, default: float) -> float:
    return float(typer.prompt(question, default=default, type=float)) if sys.stdin.isatty() else default


def _yes(question: str) -> bool:
    """A yes on a terminal; elsewhere no."""
    return sys.stdin.isatty() and typer.confirm(question, default=False)
