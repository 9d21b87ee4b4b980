"""A model whose weights were trained privately before -> what that adds to the training to come, told or refused.

Epsilons of trainings on the same records add up, and a card states that of one training. So a second training on the
same records is refused where it is seen to be one, and told in plan and card where it may be.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

from huggingface_hub import try_to_load_from_cache
from torch import nn

from hf_dp.card import PRIVACY_JSON, Record, read_record
from hf_dp.errors import ConfigError
from hf_dp.mechanism import Mechanism
from hf_dp.step import PrivacySpent

EARLIER = "earlier private training"  # a row of plan and card
ADDS = "it adds to this one for whoever is in both"
UNKNOWN = "not known: the adapter is not a new one, and nothing in it says what was spent"


class Trained(NamedTuple):
    """A training in this process: its output folder, what it spent, of which unit, and on which records."""

    folder: Path
    spent: PrivacySpent
    unit: str
    dataset: Callable[[], Any]


_TRAINED: "WeakKeyDictionary[nn.Module, Trained]" = WeakKeyDictionary()


def note(model: nn.Module, folder: Path, spent: PrivacySpent, mechanism: Mechanism, dataset: Any) -> None:
    """Remembers that these weights were trained, as long as the model lives. Without a step nothing is noted."""
    if spent.num_steps:
        for module in _owners(model):
            _TRAINED[module] = Trained(folder.resolve(), spent, mechanism.unit, _held_weakly(dataset))


def refuse_again(model: nn.Module, folder: Path, dataset: Any, mechanism: Mechanism) -> None:
    """Refuses to train weights on the same records in another output folder, if privacy is claimed of it.

    Raises:
        ConfigError: the ledger there would not count the steps that the weights hold already.
    """
    for before in _in_this_process(model, folder):
        if mechanism.is_private and _is_the_same(before.dataset(), dataset):
            raise ConfigError(
                f"these weights were trained on these records before, in {before.folder} ({before.spent.num_steps:,} "
                "steps), and a card of another folder would not count that: go on with output_dir="
                f"{str(before.folder)!r}, or load the model anew"
            )


def told(model: nn.Module, folder: Path) -> str:
    """What an earlier private training of these weights spent, in words; "" where there is no sign of one."""
    found = [
        f"epsilon {before.spent.epsilon:.4g} at delta {before.spent.delta:.2g} for a {before.unit}"
        for before in _in_this_process(model, folder)
    ]
    stated = _stated(model, folder)
    if stated is not None:
        found.append(f"epsilon {stated.epsilon:.4g} at delta {stated.delta:.2g} for a {stated.unit}")
    if _adapter_was_trained(model) and not any(module in _TRAINED for module in model.modules()):
        found.append(UNKNOWN)
    return f"{' and '.join(dict.fromkeys(found))}; {ADDS}" if found else ""


def _held_weakly(dataset: Any) -> Callable[[], Any]:
    try:
        return ref(dataset)
    except TypeError:  # a list
        return lambda: dataset


def _owners(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            yield module


def _in_this_process(model: nn.Module, folder: Path) -> list[Trained]:
    found = [_TRAINED[module] for module in model.modules() if module in _TRAINED]
    return list({before.folder: before for before in found if before.folder != folder.resolve()}.values())


def _is_the_same(before: Any, now: Any) -> bool:
    """Whether two data sets are one; tables by the fingerprint that `datasets` keeps of what was done to them."""
    if before is now:
        return True
    marks = [getattr(dataset, "_fingerprint", None) for dataset in (before, now)]
    return marks[0] is not None and marks[0] == marks[1]


def _adapter_was_trained(model: nn.Module) -> bool:
    """Whether a LoRA adapter was loaded: its B, which is zero in a new one unless its config says otherwise, is not.

    Neither peft nor its files say where an adapter came from, so the record in that folder cannot be read.
    """
    begin_at_zero = {
        name
        for name, config in (getattr(model, "peft_config", None) or {}).items()
        if getattr(config, "init_lora_weights", False) in (True, "gaussian")
    }
    layers = [getattr(module, "lora_B", None) for module in model.modules()]
    found = [
        layer[name] for layer in layers if isinstance(layer, nn.ModuleDict) for name in layer.keys() & begin_at_zero
    ]
    return any(bool(parameter.any()) for module in found for parameter in module.parameters())


def _stated(model: nn.Module, folder: Path) -> Record | None:
    """The record beside the weights that the model was loaded from: a folder other than `folder`, or a repository in
    the Hub's cache.
    """
    name = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
    if not name:
        return None
    try:
        found = name if Path(name).is_dir() else try_to_load_from_cache(name, PRIVACY_JSON)
        if not isinstance(found, str) or Path(found).resolve() == folder.resolve():
            return None
        base = Path(found) if Path(found).is_dir() else Path(found).parent
        return Record.of(read_record(base)) if (base / PRIVACY_JSON).is_file() else None
    except (ConfigError, OSError, ValueError):  # nothing that can be read, or that is a record
        return None
