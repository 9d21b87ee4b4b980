"""Each task of recipes: what its rows hold, that it trains and is evaluated, and what is said where data do not fit."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as tf
from peft import PeftModel

from hf_dp import ConfigError
from hf_dp.errors import RecipeError
from hf_dp.recipe import Wanted, guessed, nested, starting_recipe, task
from hf_dp.recipe.examples import PadRight
from hf_dp.recipe.recipe import Recipe, from_mapping
from hf_dp.recipe.tasks import TASKS
from tests.support import recipes as R

IGNORED, PAD, END, UNK, NAME, PRICE, PUB, CHEAP, THE = -100, *range(8)
TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} <end> {% endfor %}"
BASES = {  # task -> (class, its configuration)
    "seq2seq": (
        tf.T5ForConditionalGeneration,
        tf.T5Config(
            d_model=16,
            d_kv=4,
            d_ff=24,
            num_layers=1,
            num_heads=4,
            vocab_size=len(R.WORDS),
            dropout_rate=0.0,
            decoder_start_token_id=0,
        ),
    ),
}
ENCODERS = ("masked_lm", "token_classification", "sequence_classification")
TALK = [{"role": "user", "content": "name the pub"}, {"role": "assistant", "content": "the pub is cheap"}]
RECORD = {
    "mr": "name the pub",
    "good": "the pub is red",
    "bad": "a price",
    "mood": "sad",
    "words": ["the", "pub", "is", "cheap"],
    "tags": ["O", "B", "O", "O"],
    "messages": TALK,
}
SECTIONS: dict[str, dict[str, Any]] = {
    "causal_lm": {"prompt": "{mr} | ", "target": "{good}"},
    "chat": {"messages": "messages", "max_length": 32},
    "preference": {"prompt": "{mr} |", "chosen": " {good}", "rejected": " {bad}", "max_length": 16},
    "reward": {"prompt": "{mr} |", "chosen": " {good}", "rejected": " {bad}", "max_length": 16},
    "sequence_classification": {"text": "{good}", "label": "mood", "labels": ["sad", "glad"]},
    "token_classification": {"words": "words", "label": "tags", "labels": ["O", "B"]},
    "seq2seq": {"prompt": "{mr}", "target": "{good}"},
    "masked_lm": {"text": "{good}"},
}


def save_base(folder: Path, name: str) -> Path:
    if name in ENCODERS:
        R.save_encoder(folder)
    elif name in BASES:
        torch.manual_seed(0)
        kind, config = BASES[name]
        kind(config).save_pretrained(folder)
    else:
        R.save_causal_lm(folder)
    tokenizer = R.tokenizer(mask_token="blue")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def recipe(folder: Path, name: str, records: list[dict[str, Any]] | None = None, **changes: Any) -> Recipe:
    """A recipe of a task; a change replaces a key of `data`, or a section."""
    rows = records or [{**RECORD, "mr": f"name {R.WORDS[3 + i % 3]}"} for i in range(30)]
    data = {
        "train": str(R.write_lines(folder / "train.jsonl", rows)),
        "validation": str(R.write_lines(folder / "validation.jsonl", rows[:6])),
        **SECTIONS[name],
    }
    sections: dict[str, Any] = {
        "model": {"name": str(save_base(folder / "base", name)), "task": name},
        "lora": {"r": 2, "target_modules": "all-linear"},
        "data": data,
        "training": {
            "output_dir": str(folder / "out"),
            "max_steps": 2,
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
        },
        "privacy": {"target_epsilon": 8, "expected_batch_size": 10, "public_eval": True},
    }
    for key, value in changes.items():
        (sections if key in sections or key == "peft" else data)[key] = value
    return from_mapping({k: v for k, v in sections.items() if v is not None}, name="toy")


def rows(folder: Path, name: str, record: dict[str, Any], **changes: Any) -> datasets.Dataset:
    """What the first record becomes."""
    return task.prepare(recipe(folder, name, [record, RECORD, RECORD], **changes, privacy=FEW)).train[0]


FEW = {"noise_multiplier": 1.0, "expected_batch_size": 1}


@pytest.mark.parametrize("name", TASKS)
def test_each_task_trains_is_evaluated_and_verifies(name: str, tmp_path: Path) -> None:
    trainer = task.build(recipe(tmp_path, name))
    trainer.train()
    found = task.evaluate(trainer)
    assert found["loss"] > 0
    metric = {"causal_lm": "nats_per_character", "seq2seq": "nats_per_character", "preference": "rewards/margins"}
    metric |= dict.fromkeys(("sequence_classification", "token_classification"), "accuracy")
    assert metric.get(name, "loss") in found
    trainer.save_model()
    record = json.loads((tmp_path / "out" / "privacy.json").read_text())
    assert record["num_steps"] == 2
    assert record["unit"] == ("pair of answers" if TASKS[name].trainer[2] in "DR" else "record")


@pytest.mark.parametrize("kind", ["bert without pooler", "distilbert"])
def test_what_no_file_of_the_base_has_is_trained_and_saved(kind: str, tmp_path: Path) -> None:
    """A pooler, or what stands before the head: random, and of no use to whoever loads the adapter otherwise."""
    asked = recipe(tmp_path, "sequence_classification")
    if kind == "distilbert":
        config = tf.DistilBertConfig(vocab_size=len(R.WORDS), dim=16, n_layers=1, n_heads=2, hidden_dim=24)
        tf.DistilBertForMaskedLM(config).save_pretrained(tmp_path / "base")
    trainer = task.build(asked)
    trainer.train()
    trainer.save_model()
    merged = trainer.model.merge_and_unload().eval()
    loaded = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "out").eval()
    ids = torch.tensor([[3, 4, 5]])
    assert torch.allclose(loaded(ids).logits, merged(ids).logits, atol=1e-5)


@pytest.mark.parametrize(("given", "written"), [([0, 1], "01"), (["0", "1"], [0, 1])])
def test_numbers_and_their_texts_are_one_class(given: list[Any], written: Any, tmp_path: Path) -> None:
    records = [{**RECORD, "mood": written[i % 2]} for i in range(12)]
    made = task.prepare(recipe(tmp_path, "sequence_classification", records, labels=given))
    assert made.train["labels"] == [i % 2 for i in range(12)]


@pytest.mark.parametrize("name", TASKS)
def test_all_weights_of_each_task_train(name: str, tmp_path: Path) -> None:
    trainer = task.build(recipe(tmp_path, name, lora=None))
    trainer.train()
    assert trainer.privacy_spent().num_steps == 2


# ---- what rows hold --------------------------------------------------------------------------------------------------


def test_an_encoder_decoder_reads_the_prompt_and_writes_the_target(tmp_path: Path) -> None:
    assert rows(tmp_path, "seq2seq", RECORD) == {
        "input_ids": [NAME, THE, PUB],
        "labels": [THE, PUB, R.WORDS.index("is"), R.WORDS.index("red"), END],
    }


def test_an_empty_target_of_an_encoder_decoder_teaches_nothing(tmp_path: Path) -> None:
    assert rows(tmp_path, "seq2seq", {**RECORD, "good": " "})["labels"] == []
    batch = PadRight(PAD)([{"input_ids": [THE], "labels": []}])
    assert batch["labels"].tolist() == [[IGNORED]]


def test_a_long_target_of_an_encoder_decoder_loses_its_end(tmp_path: Path) -> None:
    made = rows(tmp_path, "seq2seq", {**RECORD, "good": "pub " * 9}, max_length=4)
    assert made["labels"] == [PUB] * 4


def test_labels_are_padded_by_themselves() -> None:
    batch = PadRight(PAD)(
        [{"input_ids": [THE, PUB, NAME], "labels": [PUB]}, {"input_ids": [THE], "labels": [PUB, END]}]
    )
    assert batch["input_ids"].tolist() == [[THE, PUB, NAME], [THE, PAD, PAD]]
    assert batch["labels"].tolist() == [[PUB, IGNORED], [PUB, END]]


def test_a_word_has_its_label_at_its_first_token(tmp_path: Path) -> None:
    record = {**RECORD, "words": ["the", "pub price", "is"], "tags": ["O", "B", "O"]}
    made = rows(tmp_path, "token_classification", record)
    assert made["input_ids"] == [THE, PUB, PRICE, R.WORDS.index("is")]
    assert made["labels"] == [0, 1, IGNORED, 0]


def test_a_record_without_words_counts_and_teaches_nothing(tmp_path: Path) -> None:
    trainer = task.build(
        recipe(tmp_path, "token_classification", [{**RECORD, "words": [], "tags": []}, *[RECORD] * 19])
    )
    trainer.train()
    assert trainer.privacy_spent().num_steps == 2


def test_the_schema_names_the_classes_of_words(tmp_path: Path) -> None:
    feature = datasets.Features(
        {
            "words": datasets.Sequence(datasets.Value("string")),
            "tags": datasets.Sequence(datasets.ClassLabel(names=["O", "B"])),
        }
    )
    records = datasets.Dataset.from_dict({"words": [["the", "pub"]] * 20, "tags": [[0, 1]] * 20}, features=feature)
    records.to_parquet(tmp_path / "tags.parquet")
    built = recipe(tmp_path, "token_classification", train=str(tmp_path / "tags.parquet"), labels=None, validation=None)
    parts = task.prepare(built)
    assert parts.model.config.id2label == {0: "O", 1: "B"}
    assert parts.train[0]["labels"] == [0, 1]


def test_conversations_are_written_by_the_chat_template(tmp_path: Path) -> None:
    trainer = task.build(recipe(tmp_path, "chat"))
    text = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    assert text.split() == "<unk> : name the pub <end> <unk> : the pub is cheap <end>".split()


def test_conversations_in_other_words_are_the_same(tmp_path: Path) -> None:
    told = [{"from": "human", "value": "name the pub"}, {"from": "gpt", "value": "the pub is cheap"}]
    assert rows(tmp_path, "chat", {**RECORD, "messages": told}) == {"messages": TALK}


def test_a_prompt_and_its_answer_are_a_conversation_with_loss_on_the_answer(tmp_path: Path) -> None:
    told = recipe(tmp_path, "chat", messages=None, prompt="{mr}", target="{good}")
    labels = task.build(told).train_dataset[0]["labels"]
    answer = [UNK, R.WORDS.index(":"), THE, PUB, R.WORDS.index("is"), R.WORDS.index("red"), END]
    assert labels == [IGNORED] * (len(labels) - len(answer)) + answer
    assert len(labels) > len(answer)


def test_a_reward_ends_at_the_end_mark_within_the_length(tmp_path: Path) -> None:
    made = rows(tmp_path, "reward", {**RECORD, "bad": "pub " * 40}, max_length=9)
    assert made["chosen_ids"][-1] == made["rejected_ids"][-1] == END
    assert len(made["rejected_ids"]) == 9
    assert made["chosen_ids"][:3] == [NAME, THE, PUB]


def test_masked_words_are_drawn_anew_and_alone_have_a_loss(tmp_path: Path) -> None:
    parts = task.prepare(recipe(tmp_path, "masked_lm"))
    assert parts.train.column_names == ["input_ids"]
    batch = parts.collator([{"input_ids": list(range(3, 15))}] * 20)
    masked = batch["labels"] != IGNORED
    assert 0 < masked.sum() < masked.numel() / 2


# ---- adapters, bits and attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["loha", "IA3", "VERA"])
def test_an_adapter_of_another_kind_trains(kind: str, tmp_path: Path) -> None:
    settings = {"feedforward_modules": []} if kind == "IA3" else {"r": 2}
    trainer = task.build(
        recipe(
            tmp_path, "causal_lm", lora=None, peft={"type": kind, "target_modules": ["q_proj", "v_proj"], **settings}
        )
    )
    assert trainer.model.active_peft_config.peft_type.value == kind.upper()
    trainer.train()
    trainer.save_model()
    assert kind.upper() in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("peft", "match"),
    [
        ({"type": "LOHAA"}, r"peft\.type: there is no adapter 'LOHAA'; did you mean 'LOHA'\?"),
        ({"r": 2}, r"peft\.type: missing; one of"),
        ({}, r"peft\.type: missing; one of"),
        ({"type": "LOHA", "rank": 2}, r"peft\.rank: there is no such setting"),
    ],
)
def test_adapters_that_there_are_not_are_named(peft: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=match):
        recipe(tmp_path, "causal_lm", lora=None, peft=peft)


def test_two_adapters_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="peft: the section lora is given too"):
        recipe(tmp_path, "causal_lm", peft={"type": "LOHA"})
    with pytest.raises(RecipeError, match="peft: the section lora is given too"):
        recipe(tmp_path, "causal_lm", lora={}, peft={"type": "LOHA"})


def test_a_base_of_four_bits_trains(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = str(save_base(tmp_path / "base", "causal_lm"))
    trainer = task.build(recipe(tmp_path, "causal_lm", model={"name": base, "load_in": "4bit"}))
    assert trainer.model.get_base_model().config.quantization_config.load_in_4bit
    trainer.train()
    assert trainer.privacy_spent().num_steps == 2


def test_few_bits_need_an_adapter(tmp_path: Path) -> None:
    base = str(save_base(tmp_path / "base", "causal_lm"))
    with pytest.raises(RecipeError, match=r"model\.load_in: .*add the section lora"):
        recipe(tmp_path, "causal_lm", model={"name": base, "load_in": "4bit"}, lora=None)
    with pytest.raises(RecipeError, match=r"model\.load_in: expected 4bit or 8bit, got '3bit'"):
        recipe(tmp_path, "causal_lm", model={"name": base, "load_in": "3bit"})


def test_attention_is_the_one_asked_for(tmp_path: Path) -> None:
    base = str(save_base(tmp_path / "base", "causal_lm"))
    parts = task.prepare(recipe(tmp_path, "causal_lm", model={"name": base, "attn_implementation": "eager"}))
    assert parts.model.config._attn_implementation == "eager"
    with pytest.raises(RecipeError, match=r"model\.name: cannot load"):
        task.prepare(recipe(tmp_path, "causal_lm", model={"name": base, "attn_implementation": "eagre"}))


# ---- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("chat", {"messages": None}, r"data\.messages: missing; the task chat needs it, or prompt and target"),
        ("chat", {"prompt": "{mr}"}, r"data\.prompt: not for the task chat beside messages and max_length; drop it"),
        ("chat", {"max_length": None}, r"data\.max_length: missing"),
        ("seq2seq", {"prompt": None}, r"data\.prompt: missing; the task seq2seq needs it"),
        ("masked_lm", {"label": "mood"}, r"data\.label: not for the task masked_lm; drop it"),
        ("reward", {"split": "chunks"}, r"data\.split: not for the task reward"),
    ],
)
def test_what_a_task_needs_is_named(name: str, changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=match):
        recipe(tmp_path, name, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("chat", {"messages": "good"}, r"expected lists of \{role, content\}.*'good'.*give data\.prompt"),
        ("chat", {"messages": "talk"}, r"data\.messages on data\.train: .*talk"),
        ("token_classification", {"label": "mood"}, r"expected lists, one entry a word, in the column 'mood'"),
        ("token_classification", {"labels": ["O", "X"]}, r"expected one of 2 classes"),
        ("preference", {"chosen": "{goood}"}, r"data\.chosen on data\.train: .*did you mean|good"),
    ],
)
def test_columns_that_do_not_fit_are_named(name: str, changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=match):
        task.prepare(recipe(tmp_path, name, **changes))


def test_words_and_labels_of_other_numbers_are_counted(tmp_path: Path) -> None:
    records = [RECORD, {**RECORD, "tags": ["O"]}, *[RECORD] * 20]
    with pytest.raises(
        RecipeError, match=r"1 records have another number of labels than of words, the first.* in row 1"
    ):
        task.prepare(recipe(tmp_path, "token_classification", records))


def test_a_chat_needs_a_template(tmp_path: Path) -> None:
    asked = recipe(tmp_path, "chat")
    R.tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(RecipeError, match="no chat template; take an instruct model, or the task causal_lm"):
        task.prepare(asked)


def test_a_conversation_that_the_template_refuses_ends_in_a_few_words(tmp_path: Path) -> None:
    asked = recipe(tmp_path, "chat")
    tokenizer = R.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(RecipeError, match="roles must alternate"):
        task.build(asked)


def test_masks_need_a_mask(tmp_path: Path) -> None:
    asked = recipe(tmp_path, "masked_lm")
    R.tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(RecipeError, match="no mask_token"):
        task.prepare(asked)


@pytest.mark.parametrize("name", ["chat", "preference", "reward", "masked_lm"])
def test_members_are_not_attacked_where_rows_have_no_labels(name: str, tmp_path: Path) -> None:
    from hf_dp.cli.membership import refuse_attack

    with pytest.raises(ConfigError, match=f"rows of the task {name} .*have no labels to empty"):
        refuse_attack(recipe(tmp_path, name, privacy=FEW))


# ---- the page, and recipes to start from -----------------------------------------------------------------------------


def test_the_page_has_every_task_with_its_keys() -> None:
    page = (Path(task.__file__).parent / "README.md").read_text(encoding="utf-8")
    found = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in page.splitlines()
        if line.startswith("| `") and "`data`" not in line
    ]
    expected = [
        [f"`{name}`", "; or ".join(", ".join(group) for group in t.needed), ", ".join(t.more), t.trainer]
        for name, t in TASKS.items()
    ]
    assert found == expected


@pytest.mark.parametrize("name", TASKS)
def test_the_recipe_to_start_from_is_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    about = TASKS[name]
    labels = ("O", "B") if about.has_classes else ()
    R.write_lines(tmp_path / "records.jsonl", [RECORD])
    text = starting_recipe(
        Wanted(about.base, "records.jsonl", task=name, templates=about.start, labels=labels), Path("recipe.yaml")
    )
    made = from_mapping(nested(text, "recipe.yaml"), name="recipe")
    assert made.model.task == name
    assert {**about.start}.items() <= vars(made.data).items()


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"messages": [TALK]}, "chat"),
        ({"conversations": [[{"from": "human", "value": "the pub"}]]}, "chat"),
        ({"messages": ["one text"]}, "causal_lm"),
        ({"chosen": ["a"], "rejected": ["b"]}, "reward"),
        ({"prompt": ["a"], "chosen": ["a"], "rejected": ["b"]}, "preference"),
    ],
)
def test_the_task_is_guessed_from_the_columns(columns: dict[str, Any], expected: str) -> None:
    guess = guessed(datasets.Dataset.from_dict(columns))
    assert guess.task == expected
    assert guess.templates


@pytest.mark.parametrize(
    ("section", "key", "value", "match"),
    [
        ("training", "seed", -1, r"training\.seed: expected a whole number from 0"),
        ("training", "log_level", "abc", r"training: transformers refuses these settings"),
        ("training", "logging_steps", 1e400, r"training: transformers refuses these settings|logging_steps"),
        ("lora", "runtime_config", "abc", r"lora"),
    ],
)
def test_odd_values_end_in_a_few_words(section: str, key: str, value: Any, match: str, tmp_path: Path) -> None:
    given = {"lora": {"r": 2, "target_modules": "all-linear"}, "training": {"output_dir": str(tmp_path / "out")}}
    given["training"] |= {"max_steps": 1, "use_cpu": True}
    given[section][key] = value
    with pytest.raises(RecipeError, match=match):
        task.build(recipe(tmp_path, "causal_lm", **given))
