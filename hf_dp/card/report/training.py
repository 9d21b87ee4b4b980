"""A model's folder -> what was trained, by its own configuration, and the losses that may be shown, or why there are
none.

Nothing here is verified. Of a log, only numbers that were released with noise or computed on public data are shown. Of
a base model in a local folder, only the folder's name is shown.
"""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeGuard

from hf_dp.card.readme import read_readme, yaml_of
from hf_dp.card.record import Record
from hf_dp.errors import ConfigError
from hf_dp.pictures import Point

Json = dict[str, object]  # of a file that nobody vouches for
STATE = "trainer_state.json"
DESCRIPTIONS = ("adapter_config.json", "config.json", STATE, f"*/{STATE}")  # what is read here beside the card
PRIVATE_EVAL_MARK = "eval_not_covered_by_privacy"


class Losses(NamedTuple):
    """Name of a line -> its points (step, loss); and the notes that belong beside the plot."""

    lines: dict[str, list[Point]]
    notes: list[str]


def trained(folder: Path) -> dict[str, str]:
    """What the folder says of base model and method: name -> value, for a table."""
    adapter, config = _json(folder / "adapter_config.json"), _json(folder / "config.json")
    with suppress(ConfigError):
        config.setdefault("base_model", yaml_of(read_readme(folder / "README.md")).get("base_model"))
    if adapter:
        base = adapter.get("base_model_name_or_path") or config.get("base_model")
        return {"base model": _base(base), "method": _adapter(adapter)} | _task(adapter.get("task_type"))
    method = "the model's own weights were trained, all or some of them; there is no adapter in this folder"
    if not (folder / "config.json").is_file():
        method = "unknown: this folder has neither adapter_config.json nor config.json"
    return {"base model": _base(config.get("base_model")), "method": method} | _task(config.get("architectures"))


def losses(folder: Path, record: Record) -> Losses:
    """Training loss if it was released with noise, and evaluation loss if the data were declared public."""
    if not record.private:
        return Losses({}, ["Nothing is shown: without a guarantee every number of this training may tell of its data."])
    entries = _history(folder)
    noised = bool(record.segments) and all(s.loss_bound for s in record.segments)
    public = record.public_eval
    lines, notes = {}, []
    if not entries:
        notes.append(
            f"No loss is drawn: neither this folder nor a checkpoint in it holds the log of a training ({STATE})."
        )
    if not noised:
        notes.append("Training loss was not released: it is computed on private records, and no noise was added to it.")
    elif found := _points(entries, "loss", needs="epsilon"):
        lines["training loss, with noise, inside epsilon"] = found
    if not public:
        notes.append("Evaluation loss is not shown: the evaluation data were not declared public.")
    elif found := _points([e for e in entries if PRIVATE_EVAL_MARK not in e], "eval_loss"):
        lines["evaluation loss, on data declared public"] = found
    if entries and not lines and (noised or public):
        notes.append("The log holds no loss that may be shown.")
    return Losses(lines, notes)


def _points(entries: list[Json], name: str, *, needs: str = "step") -> list[Point]:
    """A point for each step, from the step's last entry. Entries with anything but finite numbers are left out."""
    found: dict[float, float] = {}
    for entry in entries:
        step, value = entry.get("step"), entry.get(name)
        if _finite(step) and _finite(value) and needs in entry:
            found[float(step)] = float(value)
    return sorted(found.items())


def _history(folder: Path) -> list[Json]:
    """The log of the trainer state with the most steps."""
    furthest, history = -math.inf, []
    for path in (folder / STATE, *sorted(folder.glob(f"*/{STATE}"))):
        state = _json(path)
        step, log = state.get("global_step"), state.get("log_history")
        if _finite(step) and isinstance(log, list) and step > furthest:
            furthest, history = step, log
    return [entry for entry in history if isinstance(entry, dict)]


def _finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15  # NaN is not


def _json(path: Path) -> Json:
    """A JSON object, or {} if there is none. Such files only describe; nothing is claimed from them."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _base(name: object) -> str:
    if isinstance(name, list):
        return ", ".join(map(_base, name))
    if not isinstance(name, str) or not name:
        return "not stated"
    is_path = name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1
    return f"{name.replace(chr(92), '/').rstrip('/').rpartition('/')[2]} (a local folder)" if is_path else name


def _task(name: object) -> dict[str, str]:
    words = ", ".join(map(str, name)) if isinstance(name, list) else name
    return {"task": str(words)} if words else {}


def _adapter(adapter: Json) -> str:
    """Such as `LoRA of rank 16 on k_proj, q_proj; the base model's other weights stayed as they were`."""
    kind = "LoRA" if adapter.get("peft_type") == "LORA" else str(adapter.get("peft_type", "an adapter"))
    words = kind + (f" of rank {adapter['r']}" if "r" in adapter else "")
    for name, joint in (("target_modules", "on"), ("modules_to_save", "and, whole,")):
        value = adapter.get(name)
        if value:
            words += f" {joint} {', '.join(sorted(map(str, value))) if isinstance(value, list) else value}"
    return f"{words}; the base model's other weights stayed as they were"
