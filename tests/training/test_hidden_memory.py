"""Wherever code keeps something, it is put back, or what keeps it is refused, or a change of it is found."""

import argparse
import array
import collections
import contextvars
import functools
import json
import os
import sqlite3
import threading
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn

from hf_dp import ConfigError, DPTrainer
from hf_dp.per_example import State, note_losses, state_put_back
from hf_dp.per_example.reads import has_changed, reads_of_code
from tests.support import memories, runs

COUNTS = [0]
VARIABLE: contextvars.ContextVar[dict[str, int]] = contextvars.ContextVar("words", default={})  # noqa: B039
LOCAL = threading.local()
LOCAL.calls = 0


def helper() -> int:
    COUNTS[0] += 1
    return COUNTS[0]


def of_itself() -> int:
    of_itself.calls += 1
    return of_itself.calls


of_itself.calls = 0


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        return self.calls


GLOBAL = Counter()
NAMESPACE, EVENTS = argparse.Namespace(calls=0), collections.Counter[str]()


class Slotted:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class Numbered(nn.Module):
    """Gives the number of its pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.slotted, self.octets, self.doubles = Slotted(), bytearray(1), array.array("d", [0.0])
        self.partial = functools.partial(self._first_plus_one, [0])
        name = types.SimpleNamespace
        self.deep = name(a=name(b=name(c=name(d=name(calls=0)))))
        self.by = ""

    def forward(self) -> Tensor:
        return self.weight * getattr(self, f"by_{self.by}")()

    def by_helper(self) -> int:
        return helper()

    def by_instance(self) -> int:
        return GLOBAL()

    @staticmethod
    def by_static() -> int:
        COUNTS[0] += 1
        return COUNTS[0]

    @property
    def store(self) -> list[int]:
        return COUNTS

    def by_property(self) -> int:
        self.store[0] += 1
        return self.store[0]

    def by_namespace(self) -> int:
        NAMESPACE.calls += 1
        return int(NAMESPACE.calls)

    def by_counter(self) -> int:
        EVENTS["pass"] += 1
        return EVENTS["pass"]

    def by_function(self) -> int:
        return of_itself()

    def by_module(self) -> int:
        return memories.number()

    def by_slot(self) -> int:
        self.slotted.calls += 1
        return self.slotted.calls

    @staticmethod
    def _first_plus_one(kept: list[int]) -> int:
        kept[0] += 1
        return kept[0]

    def by_partial(self) -> int:
        return self.partial()

    def by_depth(self) -> int:
        inner = self.deep.a.b.c.d
        inner.calls += 1
        return int(inner.calls)

    def by_octets(self) -> int:
        self.octets[0] += 1
        return self.octets[0]

    def by_array(self) -> int:
        self.doubles[0] += 1
        return int(self.doubles[0])

    def by_gradient(self) -> int:
        if self.frozen.grad is None:
            self.frozen.grad = torch.zeros(1)
        self.frozen.grad += 1
        return int(self.frozen.grad)

    def by_thread(self) -> int:
        LOCAL.calls += 1
        return int(LOCAL.calls)

    def by_variable(self) -> int:
        words = VARIABLE.get()
        words["calls"] = words.get("calls", 0) + 1
        return words["calls"]

    def by_environment(self) -> int:
        os.environ["HF_DP_TEST_CALLS"] = str(int(os.environ.get("HF_DP_TEST_CALLS", "0")) + 1)
        return int(os.environ["HF_DP_TEST_CALLS"])


WAYS = [name.removeprefix("by_") for name in vars(Numbered) if name.startswith("by_")]


@pytest.fixture(autouse=True)
def fresh() -> Any:
    def begin() -> None:
        COUNTS[0] = memories.CALLS[0] = GLOBAL.calls = LOCAL.calls = of_itself.calls = 0
        NAMESPACE.calls = 0
        EVENTS.clear()
        os.environ.pop("HF_DP_TEST_CALLS", None)
        VARIABLE.get().clear()

    begin()
    yield
    begin()


@pytest.mark.parametrize("way", WAYS)
def test_whatever_a_model_counts_in_is_found_and_put_back(way: str) -> None:
    model = Numbered()
    model.by = way
    state = State(model)
    for _ in range(3):
        with state_put_back(model, state):
            assert model() == 1
            assert state.changes()
        assert not state.changes()


def test_what_losses_keep_is_put_back_before_each_example() -> None:
    class Trainer(DPTrainer):
        def example_losses(self, model: nn.Module, inputs: Any) -> Tensor:
            self.calls += 1
            return torch.tensor([float(helper() + self.calls)])

    trainer, model = Trainer.__new__(Trainer), Numbered()
    trainer.calls = 0
    note_losses(model, {"example_losses": trainer.example_losses})
    state = State(model)
    for _ in range(3):
        with state_put_back(model, state):
            assert trainer.example_losses(model, {}) == 2
    assert trainer.calls == COUNTS[0] == 0


# ---- data sets that number words as they meet them -------------------------------------------------------------------


TEXTS = [" ".join("abcdefghij"[(7 * i + k * k) % 10] for k in range(4 + i % 5)) for i in range(24)]


class Words(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return len(TEXTS)

    def __getitem__(self, index: int) -> Any:
        ids = [3 + self.number(word) for word in TEXTS[index].split()]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}

    def number(self, word: str) -> int:
        raise NotImplementedError


class OfAHelper(Words):
    def number(self, word: str) -> int:
        return memories.word(word)


@functools.lru_cache(None)
def numbered(word: str) -> int:
    return helper()


class OfACache(Words):
    def number(self, word: str) -> int:
        return numbered(word)


class OfADatabase(Words):
    def __init__(self) -> None:
        self.db = sqlite3.connect(":memory:")
        self.db.execute("create table words (word text primary key)")

    def number(self, word: str) -> int:
        self.db.execute("insert or ignore into words values (?)", (word,))
        return int(self.db.execute("select rowid from words where word = ?", (word,)).fetchone()[0])


class OfATokenizer(Words):
    def __init__(self) -> None:
        self.tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))

    def number(self, word: str) -> int:
        self.tokenizer.add_tokens([word])
        return int(self.tokenizer.token_to_id(word))


class OfAThread(Words):
    kept = threading.local()

    def number(self, word: str) -> int:
        words = self.kept.__dict__.setdefault("words", {})
        return int(words.setdefault(word, len(words)))


@pytest.mark.parametrize("kind", [OfAHelper, OfACache, OfADatabase, OfATokenizer, OfAThread])
def test_words_numbered_as_they_are_met_are_refused_wherever_the_numbers_are(kind: type, tmp_path: Path) -> None:
    numbered.cache_clear()
    memories.WORDS.clear()
    with pytest.raises(ConfigError, match="the data set gives something else for a record after others"):
        runs.trainer(tmp_path, train_dataset=kind())


def test_a_file_that_is_read_and_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "words.json"
    file.write_text("{}")

    class OfAFile(Words):
        def number(self, word: str) -> int:
            words: dict[str, int] = json.loads(file.read_text())
            words.setdefault(word, len(words))
            file.write_text(json.dumps(words))
            return words[word]

    with pytest.raises(ConfigError, match=r"the data set reads and writes .*words\.json"):
        runs.trainer(tmp_path / "a", train_dataset=OfAFile())

    class Filled(Words):  # the remedy
        def number(self, word: str) -> int:
            return int(json.loads(file.read_text())[word])

    file.write_text(json.dumps({word: i for i, word in enumerate("abcdefghij")}))
    runs.trainer(tmp_path / "b", train_dataset=Filled()).train()


# ---- what is read ----------------------------------------------------------------------------------------------------

FLAG = {"on": False}
TABLE = pd.DataFrame({"on": [False]})
HELD = Counter()
REFERENCE = weakref.ref(HELD)
ON: contextvars.ContextVar[bool] = contextvars.ContextVar("on", default=False)


@functools.lru_cache(None)
def is_on() -> bool:
    return FLAG["on"]


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)

    @property
    def on(self) -> bool:
        return FLAG["on"]

    @staticmethod
    def stands() -> bool:
        return FLAG["on"]

    @classmethod
    def of_the_class(cls) -> bool:
        return FLAG["on"]

    def forward(self, way: int) -> Any:
        ways: list[Callable[[], Any]] = [
            lambda: self.on or self.stands() or self.of_the_class() or is_on() or memories.is_on(),
            lambda: of_itself.calls or LOCAL.calls or ON.get() or TABLE["on"][0],
            lambda: NAMESPACE.calls or os.environ.get("HF_DP_TEST_CALLS") or REFERENCE().calls,
        ]
        return ways[way]()


def change_a_setting() -> None:
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark


CHANGES: list[Callable[[], Any]] = [
    lambda: FLAG.update(on=True),
    lambda: memories.FLAG.update(on=True),
    lambda: setattr(of_itself, "calls", 1),
    lambda: setattr(LOCAL, "calls", 1),
    lambda: ON.set(True),
    lambda: TABLE.__setitem__("on", [True]),
    lambda: os.environ.update(HF_DP_TEST_CALLS="1"),
    lambda: setattr(HELD, "calls", 1),
    lambda: setattr(NAMESPACE, "calls", 1),
    change_a_setting,
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_a_change_is_found_wherever_it_is_read(number: int) -> None:
    model, setting = Reading(), torch.backends.cudnn.benchmark
    before = reads_of_code({}, model)
    assert not has_changed(before, reads_of_code({}, model))
    CHANGES[number]()
    try:
        assert has_changed(before, reads_of_code({}, model))
    finally:
        torch.backends.cudnn.benchmark = setting
        FLAG["on"] = memories.FLAG["on"] = False
        TABLE["on"] = [False]
        ON.set(False)
        HELD.calls = 0


def test_a_gradient_that_a_frozen_weight_gets_is_found() -> None:
    model = Reading()
    state = State(model)
    model.frozen.grad = torch.ones(1)
    assert state.changes() == ["frozen.grad"]
