"""Generators that a collator or data set keeps for itself are found wherever they are kept."""

import functools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from hf_dp.errors import UnsupportedOptionError
from hf_dp.sampling.own_generators import own_generators
from tests.support import runs

MODULE_LEVEL = np.random.default_rng(0)
OF_PYTHON = random.Random(1)


class Holder:
    def __init__(self, *, kept: Any) -> None:
        self.kept = kept

    def __call__(self, records: Any) -> Any:
        return records


class Slotted:
    __slots__ = ("kept",)


def closed_over() -> Any:
    generator = torch.Generator()
    return lambda records: torch.rand(3, generator=generator)


def of_the_module(records: Any) -> Any:
    return MODULE_LEVEL.random(3)


class OfTheModule:
    def __call__(self, records: Any) -> Any:
        return MODULE_LEVEL.random(3)


def slotted() -> Slotted:
    holder = Slotted()
    holder.kept = random.Random(3)
    return holder


KEPT = {
    "attribute": Holder(kept=torch.Generator()),
    "Python's": Holder(kept=random.Random(0)),
    "old numpy's": Holder(kept=np.random.RandomState(0)),
    "bits": Holder(kept=np.random.PCG64(0)),
    "deep": Holder(kept={"transforms": [Holder(kept=(1, Holder(kept=np.random.default_rng(0))))]}),
    "slots": slotted(),
    "closure": closed_over(),
    "module": of_the_module,
    "module, in a class": OfTheModule(),
    "partial": functools.partial(lambda records, generator: records, generator=torch.Generator()),
    "default": lambda records, generator=OF_PYTHON: records,
    "method": Holder(kept=torch.Generator()).__call__,
    "subset": Subset(Holder(kept=torch.Generator()), [0]),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", KEPT)
def test_it_is_found(kind: str) -> None:
    assert len(own_generators(KEPT[kind], "it")) == 1


def test_what_draws_from_global_generators_has_none() -> None:
    def drawing(records: Any) -> Any:
        return torch.rand(2), np.random.rand(), random.random(), random.SystemRandom().random()

    for free in (
        drawing,
        runs.collate,
        runs.text_rows(),
        Holder(kept=random.SystemRandom()),
        None,
        Holder(kept=Holder),
    ):
        assert own_generators(free, "it") == []


def test_a_trainer_refuses_them_by_name_before_anything_else(tmp_path: Path) -> None:
    data = runs.text_rows().with_transform(functools.partial(lambda r, rng: r, rng=random.Random(0)))
    with pytest.raises(
        UnsupportedOptionError, match=r"data_collator\.kept \(torch.*Generator\), train_dataset.*global generator"
    ):
        runs.trainer(tmp_path, data_collator=Holder(kept=torch.Generator()), train_dataset=data)
