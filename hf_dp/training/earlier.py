"""A model whose weights were trained privately before -> what that adds to the training to come, told or refused.

Epsilons of trainings on the same records add up, and a card states that of one training. So a second training on the
same records is refused where it is seen to be one, and told in plan and card where it may be.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from torch.distributed.tensor import DTensor

from hf_dp.card import PRIVACY_JSON, Record, read_record
from hf_dp.errors import ConfigError
from hf_dp.mechanism import Mechanism
from hf_dp.per_example import checksums
from hf_dp.step import PrivacySpent

EARLIER = "earlier private training"  # a row of plan and card
ADDS = "it adds to this one for whoever is in both"
UNKNOWN = "not known, but the adapter is no new one"


class Trained(NamedTuple):
    """A training in this process: its output folder, what it spent, of which unit, on which records, and the checksums
    of the weights that it left, of those that it changed.
    """

    folder: Path
    spent: PrivacySpent
    unit: str
    dataset: Callable[[], Any]
    weights: frozenset[int]


class Beneath(NamedTuple):
    """What an adapter was trained on, and the weight's first values: merging the adapter changes them."""

    trained: Trained
    first: bytes


SAMPLE = 4096  # how many of a weight's values are looked at
_TRAINED: list[Trained] = []
_OF_MODULE: "WeakKeyDictionary[nn.Module, Trained]" = WeakKeyDictionary()
_BENEATH: "WeakKeyDictionary[nn.Module, Beneath]" = WeakKeyDictionary()


def weights_of(model: nn.Module) -> dict[str, int]:
    """The checksums of what is trained, to be given to `note` after the training."""
    return checksums({name: p for name, p in model.named_parameters() if p.requires_grad})


def note(
    model: nn.Module,
    before: dict[str, int],
    folder: Path,
    spent: PrivacySpent,
    mechanism: Mechanism,
    dataset: Any,
) -> None:
    """Remembers that these weights were trained: the modules while they live, the weights' values, wherever they are
    copied, saved, loaded or merged. Without a step nothing is noted.

    Args:
        model: after the training.
        before: its `weights_of` when the training began.
        folder: of the output.
        spent: in all.
        mechanism: whose unit is told.
        dataset: that was trained on.
    """
    if not spent.num_steps:
        return
    left = frozenset(value for name, value in weights_of(model).items() if before.get(name) != value)
    trained = Trained(folder.resolve(), spent, mechanism.unit, _held_weakly(dataset), left)
    _TRAINED.append(trained)
    for module in _owners(model):
        _OF_MODULE[module] = trained
    for layer in model.modules():
        base = getattr(layer, "base_layer", None)  # beneath an adapter
        if isinstance(base, nn.Module):
            _BENEATH[base] = Beneath(trained, _first_values(base))


def refuse_again(model: nn.Module, folder: Path, dataset: Any, mechanism: Mechanism) -> None:
    """Refuses to train weights on the same records in another output folder, if privacy is claimed of it.

    Raises:
        ConfigError: the ledger there would not count the steps that the weights hold already.
    """
    for before in _elsewhere(_in_this_process(model), folder):
        if mechanism.is_private and _is_the_same(before.dataset(), dataset):
            raise ConfigError(
                f"these weights were trained on these records before, in {before.folder} ({before.spent.num_steps:,} "
                "steps), and a card of another folder would not count that: go on with output_dir="
                f"{str(before.folder)!r}, or load the model anew"
            )


def told(model: nn.Module, folder: Path) -> str:
    """What an earlier private training of these weights spent, in words; "" where there is no sign of one."""
    known = _in_this_process(model)
    found = [
        f"epsilon {before.spent.epsilon:.4g} at delta {before.spent.delta:.2g} for a {before.unit}"
        for before in _elsewhere(known, folder)
    ]
    stated = _stated(model, folder)
    if stated is not None:
        found.append(f"epsilon {stated.epsilon:.4g} at delta {stated.delta:.2g} for a {stated.unit}")
    if not known and _adapter_was_trained(model):
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


def _in_this_process(model: nn.Module) -> list[Trained]:
    """The trainings that the weights hold. It reads all that is trained once."""
    found = [_OF_MODULE[module] for module in model.modules() if module in _OF_MODULE]
    beneath = [(module, _BENEATH[module]) for module in model.modules() if module in _BENEATH]
    found += [before.trained for module, before in beneath if before.first != _first_values(module)]
    values = set(weights_of(model).values())
    found += [before for before in _TRAINED if before.weights & values]
    return list({before.folder: before for before in found}.values())


def _elsewhere(trainings: list[Trained], folder: Path) -> list[Trained]:
    return [before for before in trainings if before.folder != folder.resolve()]


def _first_values(module: nn.Module) -> bytes:
    with torch.no_grad():
        parts = [
            p.detach().flatten()[:SAMPLE].cpu().contiguous()
            for p in module.parameters(recurse=False)
            if not p.is_meta and not isinstance(p, DTensor)
        ]
    return b"".join(part.view(torch.uint8).numpy().tobytes() for part in parts if part.numel())


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
