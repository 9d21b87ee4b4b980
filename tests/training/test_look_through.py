"""Records that would end a run are refused before its first step; later failures tell nothing of a record."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from datasets import Dataset
from torch import nn
from torch.utils.data import Subset

from hf_dp import ConfigError
from hf_dp.errors import CaptureError
from hf_dp.ledger import LEDGER_NAME, read_ledger
from hf_dp.training.look_through import Limits, _problems, complete_record
from tests.support import exact, runs
from tests.support import models as M
from tests.support.marks import quick

LABELS = ("labels", "label")
FAR = 1 << 40  # a label that an error's message would tell


class OnTheFly(torch.utils.data.Dataset):
    """Records that are made when they are asked for."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: torch.tensor(v) if isinstance(v, list) else v for name, v in self.rows[index].items()}


def as_list(rows: list[dict[str, Any]]) -> Any:
    return rows


FORMS: list[Callable[[list[dict[str, Any]]], Any]] = [Dataset.from_list, as_list]
GOOD = {"input_ids": [3, 4, 5], "attention_mask": [1, 1, 1]}
LIMITS = Limits({"input_ids": 97, "labels": 5, "label": 5}, 8)


def seen(dataset: Any) -> set[tuple[int, str, str]]:
    return {(row, column, what) for row, (column, what) in _problems(dataset, LIMITS, LABELS)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("odd", "column", "what"),
    [
        ({"labels": None}, "labels", "missing"),
        ({"labels": 5}, "labels", "out of range"),
        ({"labels": -1}, "labels", "out of range"),
        ({"input_ids": [3, 97, 5]}, "input_ids", "out of range"),
        ({"input_ids": [3, 4], "attention_mask": [1, 1, 1]}, "attention_mask", "another length"),
        ({"input_ids": [3] * 9, "attention_mask": [1] * 9}, "input_ids", "longer than"),
    ],
)
def test_an_odd_record_is_found_with_its_row(form: Any, odd: dict[str, Any], column: str, what: str) -> None:
    rows = [{**GOOD, "labels": i % 5} for i in range(5)]
    assert seen(form(rows)) == set()
    rows[3].update(odd)
    found = seen(form(rows))
    assert {(row, name) for row, name, _ in found} == {(3, column)}
    assert any(what in said for _, _, said in found)


def test_labels_of_mixed_types_texts_and_lists_with_gaps_are_found() -> None:
    mixed = [{**GOOD, "label": label} for label in (0, 1, 2.5, 3, [4])]
    assert {(row, what) for row, _, what in seen(mixed)} == {
        (i, "of another type than in other records") for i in (2, 4)
    }
    assert {row for row, *_ in seen(Dataset.from_dict({"labels": ["a", "b"]}))} == {0, 1}
    gaps = Dataset.from_dict({"labels": [[0, 1], [2, None], [-100, 4]]})
    assert seen(gaps) == {(1, "labels", "missing (None)")}


@pytest.mark.parametrize("labels", [[0.5, 7.0, -3.0], [[0.0, 1.0]] * 3, [-100, 0, 4], [[1, -100], [], [3, 2, 1]]])
def test_scores_several_labels_and_masked_ones_are_fine(labels: list[Any]) -> None:
    assert seen(Dataset.from_dict({"labels": labels})) == set()


def test_a_complete_record_is_the_first_that_others_can_be_made_of() -> None:
    empty = {"input_ids": [], "attention_mask": [], "labels": []}
    unlabelled = {**GOOD, "labels": None}
    assert complete_record([empty, unlabelled, {**GOOD, "labels": 1}, GOOD]) == {**GOOD, "labels": 1}
    assert complete_record([empty, empty]) == empty
    assert complete_record([(1, 2)]) == (1, 2)


CLASSES = [*runs.class_rows()]
TRAINED_ON: dict[str, tuple[Callable[[], Any], list[dict[str, Any]], dict[str, Any], str]] = {
    "a class too many": (M.bert, CLASSES, {"labels": FAR}, "labels out of range: number them from 0 to 4"),
    "a class below 0": (M.electra, CLASSES, {"labels": -1}, "labels out of range"),
    "no label": (M.albert, CLASSES, {"labels": None}, r"labels missing \(None\)"),
    "no text": (M.llama, [*runs.text_rows()], {"labels": None}, r"labels missing \(None\)"),
    "a text too long": (M.gpt2, [*runs.text_rows()], {"input_ids": [5] * 65}, "truncate the records to 64 tokens"),
    "a token too many": (M.gpt2, [*runs.text_rows()], {"input_ids": [5, FAR, 7]}, "the model knows the tokens 0 to 96"),
}


@pytest.mark.parametrize("name", TRAINED_ON)
def test_it_is_refused_before_the_first_step_and_told_on_the_screen_alone(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, rows, odd, said = TRAINED_ON[name]
    rows = [dict(row) for row in rows]
    rows[7].update(odd)
    if "input_ids" in odd:
        rows[7].update({name: [1] * len(odd["input_ids"]) for name in ("attention_mask", "labels")})
    form = FORMS[len(name) % 2]
    trainer = runs.trainer(
        tmp_path, M.with_lora(build) if build in (M.llama, M.gpt2) else build(), train_dataset=form(rows)
    )
    before = torch.get_rng_state()
    with pytest.raises(ConfigError, match=said) as error:
        trainer.train()
    assert torch.equal(torch.get_rng_state(), before)
    assert str(FAR) not in str(error.value)
    assert "rows 7" not in str(error.value)
    assert "1 " in (shown := capsys.readouterr().err)
    assert ": rows 7\n" in shown
    assert not (tmp_path / LEDGER_NAME).exists()


def sound(samples: int) -> dict[str, Any]:
    return {"input_values": [0.1 * (i % 7) for i in range(samples)], "labels": samples % 3}


def listener() -> nn.Module:
    """A classifier of sounds, whose first layer reads windows of 10 samples."""
    one_layer = {"conv_dim": (8,), "conv_kernel": (10,), "conv_stride": (5,), "num_feat_extract_layers": 1}
    size = {**M.WIDE, "num_hidden_layers": 1, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
    kept = {"feat_extract_norm": "layer", "layerdrop": 0.0, "mask_time_prob": 0.0, "classifier_proj_size": 8}
    return tf.Wav2Vec2ForSequenceClassification(tf.Wav2Vec2Config(**size, **one_layer, **kept, num_labels=3))


def picture(*shape: int) -> dict[str, Any]:
    return {"pixel_values": torch.ones(*shape).tolist(), "labels": 0}


def padded(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Tensors of sounds or pictures, padded on the right."""
    name = next(iter(features[0]))
    inputs = torch.nn.utils.rnn.pad_sequence([torch.tensor(f[name]) for f in features], batch_first=True)
    return {name: inputs, "labels": torch.tensor([f["labels"] for f in features])}


OTHER_INPUTS: dict[str, tuple[Callable[[], Any], list[dict[str, Any]], dict[str, Any], Any, str]] = {
    "a sound too short": (listener, [sound(40 + i) for i in range(8)], sound(7), padded, "input_values too short"),
    "a small picture": (M.vit, [picture(3, 8, 8)] * 8, picture(3, 8, 4), padded, "pixel_values of another shape"),
    "no target": (M.t5, [*runs.text_rows(8)], {"labels": []}, exact.collate, r"\(labels empty: leave these"),
}


@pytest.mark.parametrize("form", quick(FORMS[:1], FORMS))
@pytest.mark.parametrize("name", OTHER_INPUTS)
def test_a_sound_a_picture_or_a_text_that_ends_a_step_is_refused(
    name: str, form: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, rows, odd, collate, said = OTHER_INPUTS[name]
    rows = [dict(row) for row in rows]
    rows[5].update(odd)
    privacy = {**runs.NOISELESS, "expected_batch_size": 8}
    trainer = runs.trainer(tmp_path, build(), privacy, train_dataset=form(rows), data_collator=collate)
    with pytest.raises(ConfigError, match=said):
        trainer.train()
    assert ": rows 5\n" in capsys.readouterr().err
    assert not (tmp_path / LEDGER_NAME).exists()


@pytest.mark.parametrize("form", [*FORMS, lambda rows: Dataset.from_list(rows).select([*range(len(rows))][::-1])])
def test_shapes_are_told_apart_in_lists_tables_and_views_of_them(form: Any) -> None:
    rows = [{"pixel_values": [[1.0, 2.0], [3.0, 4.0]]}] * 3
    rows += [{"pixel_values": [[1.0], [3.0]]}, {"pixel_values": []}, {"pixel_values": [[]]}]
    data = form(rows)
    shape = "of another shape than in other records"
    assert seen(data) == {(i, "pixel_values", shape) for i in range(6) if data[i]["pixel_values"] == [[1.0], [3.0]]}
    sounds = form([{"input_values": [0.5] * n, "labels": 1} for n in (0, 9, 3, 7, 8)])
    assert {(len(sounds[i]["input_values"]), what) for i, _, what in seen(sounds)} == {
        (n, "too short for the model") for n in (3, 7, 8)
    }
    texts = form([{"input_features": [[1.0]], "labels": labels} for labels in ([1], [], [2])])
    assert {tuple(texts[i]["labels"]) for i, *_ in seen(texts)} == {()}


def test_what_a_loss_of_the_users_own_takes_is_not_refused(tmp_path: Path) -> None:
    rows = [{**row, "labels": row["labels"] + 1} for row in CLASSES]  # 5 is the class 0
    loss = lambda outputs, labels: torch.nn.functional.cross_entropy(outputs.logits, labels % 5)  # noqa: E731
    trainer = runs.trainer(tmp_path, M.bert(), train_dataset=rows, compute_loss_func=loss)
    trainer.train()
    assert read_ledger(tmp_path / LEDGER_NAME).num_steps == 1


SLOW = pytest.mark.slow
EMPTY_AT = [
    (3, as_list),
    pytest.param(0, OnTheFly, marks=SLOW),
    pytest.param(0, Dataset.from_list, marks=SLOW),
    pytest.param(23, OnTheFly, marks=SLOW),
]


@pytest.mark.parametrize(("where", "form"), EMPTY_AT)
def test_a_record_without_tokens_counts_and_contributes_nothing(
    where: int, form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*runs.text_rows()]
    rows[where] = {name: [] for name in rows[where]}
    sums, model = runs.record_sums(monkeypatch), M.with_lora(M.llama)
    some = {"data_collator": tensors, "learning_rate": 0.0}
    trainer = runs.trainer(tmp_path / "with", model, train_dataset=form(rows), **some)
    trainer.train()
    others = rows[:where] + rows[where + 1 :]
    privacy = {**runs.NOISELESS, "expected_batch_size": 23}
    runs.trainer(tmp_path / "without", model, privacy, train_dataset=form(others), **some).train()
    assert trainer.mechanism.num_examples == 24
    assert float((sums[0] - sums[1]).norm() / sums[1].norm()) < 1e-5


def tensors(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return runs.collate([{name: list(map(int, value)) for name, value in f.items()} for f in features])


def spoilt(rows: list[dict[str, Any]]) -> Dataset:
    """A table that is fine, whose transform spoils record 300: further than the first records of such a table."""
    table = Dataset.from_list([{**rows[i % len(rows)], "i": i} for i in range(301)])

    def change(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        labels = [FAR if i == 300 else label for i, label in zip(batch["i"], batch["labels"], strict=True)]
        return {**{k: v for k, v in batch.items() if k != "i"}, "labels": labels}

    return table.with_transform(change)


@pytest.mark.parametrize("build", [M.bert, M.electra, M.distilbert])
def test_what_fails_in_a_step_is_charged_and_tells_nothing_of_the_record(build: Any, tmp_path: Path) -> None:
    rows = spoilt(CLASSES)
    privacy = {**runs.NOISELESS, "expected_batch_size": 301}
    trainer = runs.trainer(
        tmp_path, build(), privacy, train_dataset=rows, remove_unused_columns=False, per_device_train_batch_size=64
    )
    with pytest.raises(
        CaptureError, match=r"could not be brought to a loss \(.*Error in .*The step is charged"
    ) as error:
        trainer.train()
    assert str(FAR) not in str(error.value)
    assert error.value.__cause__ is None
    assert str(FAR) not in repr(error.value.__context__)
    assert read_ledger(tmp_path / LEDGER_NAME).num_steps == 1


def test_a_part_of_a_list_is_looked_through_too() -> None:
    rows = [{**GOOD, "labels": i} for i in range(7)]
    assert {row for row, *_ in seen(Subset(rows, [6, 1, 5]))} == {0, 2}
