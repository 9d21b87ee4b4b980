"""Records: what becomes of them as examples, and what is said about files that hold none."""

import dataclasses
import datetime

import datasets
import pytest
import torch

from hf_dp.errors import RecipeError
from hf_dp.per_example import losses
from hf_dp.recipe import data_files
from hf_dp.recipe.classes import classified, label_names
from hf_dp.recipe.examples import PadRight, completions
from hf_dp.recipe.recipe import DataSection
from hf_dp.recipe.template import Template
from tests.support import recipes as R

PAD, END, UNK, NAME, PRICE, PUB, CHEAP, THE = range(8)


def section(**given):
    return DataSection(**{"train": "x.jsonl", "prompt": "{mr} |", "target": "{ref}", **given})


def rows(records, max_length=32, tokenizer=None, **given):
    made = completions(
        datasets.Dataset.from_list(records), section(**given), tokenizer or R.tokenizer(), max_length, "train"
    )
    return made.rows.to_list(), made.num_characters


BAR = R.WORDS.index("|")


# ---- completions -----------------------------------------------------------------------------------------------------


def test_the_loss_is_on_the_target_and_its_end():
    [row], characters = rows([{"mr": "name", "ref": " the pub"}])
    assert row == {"input_ids": [NAME, BAR, THE, PUB, END], "labels": [-100, -100, THE, PUB, END]}
    assert characters == len("the pub")


@pytest.mark.parametrize("nothing", ["", "  ", None])
def test_an_empty_target_counts_as_a_record_and_teaches_nothing(nothing):
    made, characters = rows([{"mr": "name", "ref": nothing}, {"mr": "name", "ref": "pub"}])
    assert len(made) == 2
    assert made[0] == {"input_ids": [NAME, BAR], "labels": [-100, -100]}
    assert characters == 3


def test_without_a_prompt_the_target_follows_one_token():
    [row], _ = rows([{"ref": "pub"}], prompt=None)
    assert row == {"input_ids": [END, PUB, END], "labels": [-100, PUB, END]}
    [row], _ = rows([{"ref": "pub"}], prompt=None, tokenizer=R.tokenizer(bos_token="the"))
    assert row["input_ids"] == [THE, PUB, END]


def test_a_prompt_that_does_not_fit_loses_its_beginning():
    [row], _ = rows([{"mr": "price pub cheap name", "ref": "the pub"}], max_length=5)
    assert row == {"input_ids": [NAME, BAR, THE, PUB, END], "labels": [-100, -100, THE, PUB, END]}
    [row], _ = rows([{"mr": "<pad> price pub cheap name", "ref": "pub"}], 5, tokenizer=R.tokenizer(bos_token="<pad>"))
    assert row["input_ids"] == [PAD, NAME, BAR, PUB, END]  # the tokenizer's own first mark stays


def test_a_target_that_does_not_fit_loses_its_end_and_its_mark():
    [row], characters = rows([{"mr": "name", "ref": "the pub the pub the pub"}], max_length=4)
    assert row == {"input_ids": [BAR, THE, PUB, THE], "labels": [-100, THE, PUB, THE]}
    assert characters == len("the pub the")


def test_every_record_is_one_example_in_its_place():
    records = [{"mr": f"name {i % 3}", "ref": "pub " * (i % 4)} for i in range(2345)]  # more than two chunks
    made, _ = rows(records, max_length=4)
    assert len(made) == 2345
    assert all(2 <= len(r["input_ids"]) == len(r["labels"]) <= 4 for r in made)
    assert [sum(label != -100 for label in r["labels"]) for r in made[:5]] == [0, 2, 3, 3, 0]


def test_a_split_record_is_cut_in_rows_that_lose_nothing():
    long, short, empty = "the pub is red blue green sad glad a the", "the pub", " "
    records = datasets.Dataset.from_list([{"mr": "name", "ref": text} for text in (long, empty, short)])
    data = DataSection(train="", prompt="{mr} {mr} {mr} | ", target="{ref}", split="chunks")
    made = completions(records, data, R.tokenizer(), 6)
    rows = [list(zip(row["input_ids"], row["labels"], strict=True)) for row in made.rows]
    assert made.record_of_row == [0] * 4 + [1, 2]  # 11 tokens by 3, which is what half a row leaves beside the prompt
    assert max(map(len, rows)) == 6
    words = R.WORDS.index
    for record, text in enumerate((long, empty, short)):
        of_it = [row for row, of in zip(rows, made.record_of_row, strict=True) if of == record]
        learnt = [label for row in of_it for _, label in row if label != losses.IGNORED]
        assert learnt == [words(w) for w in [*text.split(), *(["<end>"] if text.strip() else [])]]
        assert all([token for token, label in row if label == losses.IGNORED][-1] == words("|") for row in of_it)
    assert made.num_characters == len(long) + len(short)
    assert completions(records, dataclasses.replace(data, split=None), R.tokenizer(), 6).record_of_row is None


def test_a_tokenizer_without_an_end_mark_is_refused():
    bare = R.tokenizer()
    bare.eos_token = None
    with pytest.raises(RecipeError, match="no eos_token"):
        rows([{"mr": "a", "ref": "b"}], tokenizer=bare)


def test_unknown_columns_say_where_and_which():
    with pytest.raises(
        RecipeError, match=r"data\.target on data\.train: no column 'ref' \(there are 'mr', 'reff'\); did"
    ):
        rows([{"mr": "a", "reff": "b"}])


# ---- batches ---------------------------------------------------------------------------------------------------------


NO_TEXT = {
    "a chat": [{"role": "user", "content": "a bird"}],
    "an object": {"role": "user"},
    "a list of words": ["a", "bird"],
    "numbers": [1, 2],
    "bytes": b"a bird",
    "a time": datetime.datetime(2026, 1, 1),
}


@pytest.mark.parametrize("held", NO_TEXT.values(), ids=NO_TEXT)
@pytest.mark.parametrize("place", [{"prompt": "{held}"}, {"target": "{ref|held} {held}"}])
def test_a_column_that_is_no_text_has_no_place_in_a_template(held, place):
    with pytest.raises(
        RecipeError, match=r"data\.(prompt|target) on data.train: column 'held' holds .*apply_chat_template"
    ) as error:
        rows([{"mr": NAME, "ref": "x", "held": held}], **place)
    assert "bird" not in str(error.value)


@pytest.mark.parametrize(("held", "text"), [(3, "3"), (True, "True"), (0.5, "0.5"), (None, ""), ("x", "x")])
def test_numbers_and_missing_values_have(held, text):
    template = Template.parse("{held}").resolve(["held"])
    assert template.render({"held": held}) == text
    with pytest.raises(RecipeError, match="holds a list, and a template takes text"):
        template.render({"held": [held]})


def test_batches_are_padded_on_the_right():
    batch = PadRight(9)([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert PadRight(9)([{"input_ids": [1], "labels": 3}])["labels"].tolist() == [3]


def test_an_example_of_the_pad_token_as_end_mark_keeps_its_label():
    [row], _ = rows([{"mr": "a", "ref": "pub"}], tokenizer=R.tokenizer(pad_token="<end>"))
    batch = PadRight(END)([row, {"input_ids": [1] * 9, "labels": [-100] * 9}])
    losses_ = losses.causal_lm(type("O", (), {"logits": torch.zeros(2, 9, 18)}), batch["labels"])
    assert batch["labels"][0].tolist() == [-100, -100, PUB, END] + [-100] * 5
    assert losses_[1] == 0


# ---- classes ---------------------------------------------------------------------------------------------------------


def moods(count=6):
    return datasets.Dataset.from_list(R.moods(count))


CLASSES = {"prompt": None, "target": None, "text": "{text}", "label": "mood|label"}


def test_class_names_come_from_the_recipe_the_schema_or_the_validation_set_never_from_private_records():
    assert label_names(section(**CLASSES, labels=["sad", "glad"]), moods(), None) == ["sad", "glad"]
    schema = moods().cast_column("label", datasets.ClassLabel(names=["sad", "glad", "bored"]))
    assert label_names(section(**CLASSES), schema, None) == ["sad", "glad", "bored"]
    assert label_names(section(**CLASSES), moods(), moods(4)) == ["glad", "sad"]
    with pytest.raises(RecipeError, match=r"data\.labels: missing.*not read off private records"):
        label_names(section(**CLASSES), moods(), None)


def test_a_column_of_text_is_no_label():
    free = datasets.Dataset.from_list([{"text": f"t{i}", "label": f"anything {i}"} for i in range(30)])
    with pytest.raises(RecipeError, match="expected a column of classes, got 'label' with 30 different values"):
        label_names(section(**CLASSES), free, free)
    with pytest.raises(RecipeError, match=r"expected one of 2 classes .*got 30 other value\(s\): 'anything 0'"):
        classified(free, section(**CLASSES), R.tokenizer(), (8, ["sad", "glad"]), "train")


@pytest.mark.parametrize("names", [["sad"], ["sad", "sad"]])
def test_two_classes_at_least(names):
    with pytest.raises(RecipeError, match="two different classes"):
        label_names(section(**CLASSES, labels=names), moods(), None)


def test_texts_are_cut_and_classes_numbered():
    made = classified(moods(2), section(**CLASSES), R.tokenizer(), (2, ["sad", "glad"]), "train").rows.to_list()
    assert made == [
        {"input_ids": [R.WORDS.index("red"), THE], "labels": 0},
        {"input_ids": [R.WORDS.index("blue"), R.WORDS.index("a")], "labels": 1},
    ]
    schema = moods(2).cast_column("label", datasets.ClassLabel(names=["glad", "sad"]))
    by_schema = classified(schema, section(**CLASSES), R.tokenizer(), (2, ["glad", "sad"]), "train").rows["labels"]
    assert list(by_schema) == [1, 0]


# ---- files -----------------------------------------------------------------------------------------------------------


def load(path, text=None):
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return data_files.load(section(train=str(path)), "train")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"a": 1, "b": "x"}\n\n{"b": "y", "a": 2}\n'),
        ("a.JSON", '[{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]'),
        ("bom.jsonl", b'\xef\xbb\xbf{"a": 1, "b": "x"}\n{"a": 2, "b": "y"}'),
    ],
)
def test_files_hold_records(tmp_path, name, text):
    assert load(tmp_path / name, text).to_list() == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]


def test_csv_and_parquet(tmp_path):
    assert load(tmp_path / "a.csv", 'a,b\n1,"x, y"\n2,"z\nw"\n').to_list() == [
        {"a": "1", "b": "x, y"},
        {"a": "2", "b": "z\nw"},
    ]
    moods(3).to_parquet(str(tmp_path / "a.parquet"))
    assert load(tmp_path / "a.parquet").to_list() == moods(3).to_list()


def test_columns_that_some_records_lack_or_spell_otherwise(tmp_path):
    assert load(tmp_path / "a.jsonl", '{"a": 1}\n{"a": "five", "b": 2}\n').to_list() == [
        {"a": "1", "b": None},
        {"a": "five", "b": 2},
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 1,}\n[1]\n{"a"', r"line 2: .* at column \d+; line 3: a list, no object; line 4: "),
        ("a.jsonl", "x\n" * 9, r"line 5.*\(and 4 more\)"),
        ("a.jsonl", "", "holds no records"),
        ("a.jsonl", b"\xff\xfe", "expected text in UTF-8"),
        ("a.json", '{"a": 1}\n{"a": 2}', r"Extra data at line 2; for one object a line name the file \.jsonl"),
        ("a.json", '{"a": 1}', "expected a list of objects"),
        ("a.csv", "a,b\n1\n", "expected 2 values in every record, got another number in record 1"),
        ("a.csv", "a,b\n", "holds no records"),
        ("a.csv", 'a,b\n1,"x\n', "expected CSV"),
        ("a.parquet", "no", "expected a Parquet file"),
    ],
)
def test_files_that_hold_no_records_say_where_and_why(tmp_path, name, text, message):
    with pytest.raises(RecipeError, match=message) as refusal:
        load(tmp_path / name, text)
    assert str(refusal.value).startswith(f"data.train: {tmp_path / name}")


def test_a_name_on_the_hub_without_a_network():
    with pytest.raises(
        RecipeError, match=r"cannot load the split 'train' of 'nobody/nothing' from the Hub.*give a file"
    ):
        data_files.load(section(train="nobody/nothing"), "train")


def test_reading_leaves_no_copy_of_private_records(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    records = load(tmp_path / "a.jsonl", '{"mr": "a", "ref": "b"}\n')
    made = completions(records, section(), R.tokenizer(), 8).rows
    assert records.cache_files == made.cache_files == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


@pytest.mark.parametrize("which", ["e2e_nlg", "banking77"])
def test_real_files_become_examples(real_data, which):
    data = section(train=str(real_data / which / "validation.jsonl"))
    records = data_files.load(data, "train")
    if which == "e2e_nlg":
        made = completions(records, data, R.tokenizer(), 64)
        assert len(made.rows) == 2410
        assert made.num_characters > 100_000
    else:
        data = section(train=data.train, **CLASSES)
        names = label_names(data, records, records)
        assert (len(names), names[0]) == (77, "Refund_not_showing_up")
        assert len(classified(records, data, R.tokenizer(), (32, names), "train").rows) == 1000
