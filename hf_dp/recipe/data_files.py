"""A file, or a name on the Hub -> its records as a `datasets.Dataset`, held in memory.

Files are read here and not by `load_dataset`, which would leave a copy of the private records in the user's cache
folder, and whose errors do not name the faulty line. Data sets from the Hub are cached there, as everybody expects.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets

from hf_dp.errors import RecipeError
from hf_dp.recipe.recipe import DataSection, is_file

SHOWN = 5  # faulty lines that one message names


def load(data: DataSection, which: str) -> datasets.Dataset | None:
    """The records of `data.train` or `data.validation` (`which`); None where the recipe names none.

    Raises:
        RecipeError: they cannot be read, there are none, or a line is not a record; names the line.
    """
    source = data.train if which == "train" else data.validation
    if source is None:
        return None
    records = _from_file(Path(source), which) if is_file(source) else _from_hub(data, which, source)
    if not len(records):
        raise RecipeError(f"data.{which}: {source} holds no records")
    return records


def _from_file(path: Path, which: str) -> datasets.Dataset:
    try:
        return READERS[path.suffix.lower()](path)
    except RecipeError as error:
        raise RecipeError(f"data.{which}: {path}: {error}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"data.{which}: {path}: expected text in UTF-8, got a byte that is not ({error})") from None
    except OSError as error:
        raise RecipeError(f"data.{which}: cannot read {path}: {error.strerror or error}") from None


def _from_json_lines(path: Path) -> datasets.Dataset:
    wrong: list[str] = []
    with path.open(encoding="utf-8-sig") as file:
        records = [record for record in _json_lines(file, wrong)]
    if wrong:
        more = f" (and {len(wrong) - SHOWN} more)" if len(wrong) > SHOWN else ""
        raise RecipeError("expected one JSON object a line, got " + "; ".join(wrong[:SHOWN]) + more)
    return _table(records)


def _json_lines(file: Iterable[str], wrong: list[str]) -> Iterator[dict[str, object]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            wrong.append(f"line {number}: {error.msg} at column {error.colno}")
            continue
        if isinstance(record, dict):
            yield record
        else:
            wrong.append(f"line {number}: a {type(record).__name__}, no object")


def _from_json(path: Path) -> datasets.Dataset:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = "; for one object a line name the file .jsonl" if error.msg == "Extra data" else ""
        raise RecipeError(f"expected JSON, got: {error.msg} at line {error.lineno}{hint}") from None
    if not (isinstance(records, list) and all(isinstance(r, dict) for r in records)):
        raise RecipeError(f"expected a list of objects, got a {type(records).__name__} that is no such list")
    return _table(records)


def _from_csv(path: Path) -> datasets.Dataset:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            rows = list(reader)
        except csv.Error as error:
            raise RecipeError(f"expected CSV, got: {error} at line {reader.line_num}") from None
    names = reader.fieldnames or []
    uneven = [number for number, row in enumerate(rows, start=1) if None in row or None in row.values()]
    if uneven:
        raise RecipeError(f"expected {len(names)} values in every record, got another number in record {uneven[0]}")
    return _table(rows)


def _from_parquet(path: Path) -> datasets.Dataset:
    import pyarrow
    import pyarrow.parquet

    try:
        return datasets.Dataset(pyarrow.parquet.read_table(path))
    except pyarrow.ArrowInvalid as error:
        raise RecipeError(f"expected a Parquet file, got: {str(error).splitlines()[0]}") from None


READERS = {".jsonl": _from_json_lines, ".json": _from_json, ".csv": _from_csv, ".parquet": _from_parquet}


def _table(records: list[dict[str, object]]) -> datasets.Dataset:
    """A column for every name that occurs in any record; a record without it has null there."""
    names = list(dict.fromkeys(name for record in records for name in record))
    columns = {name: [record.get(name) for record in records] for name in names}
    mixed = [name for name, values in columns.items() if len({_kind(v) for v in values if v is not None}) > 1]
    for name in mixed:  # 5 and "five" in one column: a table has one type a column, so both become text
        columns[name] = [None if value is None else str(value) for value in columns[name]]
    uneven = {name: rows for name, values in columns.items() if (rows := _uneven(values))}
    if uneven:
        places = "; ".join(f"{n} in records {', '.join(map(str, rows[:SHOWN]))}" for n, rows in uneven.items())
        raise RecipeError(f"expected lists of texts alone, of numbers alone, or of lists alone, got others: {places}")
    return datasets.Dataset.from_dict(columns)


def _uneven(values: Iterable[object]) -> list[int]:
    """Which records, counted from 1, have lists whose members are not of the kind that the first member has."""
    kinds = [
        [_kind(member) for member in value if member is not None] if isinstance(value, list) else [] for value in values
    ]
    first = next((some[0] for some in kinds if some), None)
    return [number for number, some in enumerate(kinds, start=1) if {*some} - {first}]


def _kind(value: object) -> str:
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def _from_hub(data: DataSection, which: str, source: str) -> datasets.Dataset:
    split = data.train_split if which == "train" else data.validation_split
    try:
        return datasets.load_dataset(source, data.name, split=split, revision=data.revision)
    except (OSError, ValueError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RecipeError(
            f"data.{which}: cannot load the split {split!r} of {source!r} from the Hub: {lines[0][:300]} Check the "
            f"name, the split and the network, or give a file: data.{which}=PATH.jsonl"
        ) from None
