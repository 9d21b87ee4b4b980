"""Recipes: what the text means, what overrides do, and that everything wrong is named at once."""

import dataclasses
import re
from pathlib import Path

import pytest
from peft import LoraConfig
from transformers import TrainingArguments

from hf_dp.config import PrivacyConfig
from hf_dp.errors import RecipeError
from hf_dp.recipe.recipe import DataSection, ModelSection, read
from hf_dp.recipe.settings import MEANT
from hf_dp.recipe.tasks import TASKS
from hf_dp.recipe.template import Template
from hf_dp.recipe.yaml_text import nested, parse
from tests.support import recipes as R

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("2E+3", 2000.0),
        ("-.5", -0.5),
        ("8", 8),
        ("010", 10),
        ("1_000", 1000),
        (".inf", float("inf")),
        ("no", "no"),
        ("Yes", "Yes"),
        ("on", "on"),
        ("true", True),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("", None),
        ("[a, 1]", ["a", 1]),
        ("nothing", "nothing"),
        ("e5", "e5"),
        ('"8"', "8"),
    ],
)
def test_plain_scalars_are_those_of_yaml_1_2(text, value):
    assert parse(text, "here") == value
    assert type(parse(text, "here")) is type(value)


def test_a_key_given_twice_is_an_error_that_says_where():
    with pytest.raises(RecipeError, match=r"f\.yaml, line 3, column 3: .* a is given twice"):
        nested("model:\n  a: 1\n  a: 2\n", "f.yaml")


def test_overrides_reach_keys_sections_and_deeper():
    text = "a: {x: 1, y: 2}\nb: {z: 3}\n"
    got = nested(text, "f", ["a.x=1e-3", "b=null", "c.d.e=[p, q]", "a.w=p=q", "a.t={mr} | "])
    assert got == {"a": {"x": 1e-3, "y": 2, "w": "p=q", "t": "{mr} | "}, "b": None, "c": {"d": {"e": ["p", "q"]}}}


@pytest.mark.parametrize("override", ["a.x", "a..x=1", "=1", "a.x.deep=1", "a.x=[1"])
def test_overrides_that_are_none_are_refused_together(override):
    with pytest.raises(RecipeError) as refusal:
        nested("a: {x: 1}\n", "f", [override, "b"])
    assert repr(override) in str(refusal.value)
    assert "override 'b': expected section.key=value" in str(refusal.value)


@pytest.mark.parametrize("text", ["- a\n", "word", "", "8"])
def test_a_recipe_is_a_mapping(text):
    with pytest.raises(RecipeError, match="expected a mapping with sections"):
        nested(text, "f")


# ---- templates -------------------------------------------------------------------------------------------------------


def test_a_template_takes_the_first_alternative_that_is_there():
    template = Template.parse("{{{mr|meaning}}}: {ref | human}\n")
    assert template.resolve(["meaning", "ref", "human"]).render({"meaning": 1, "ref": None}) == "{1}: \n"


@pytest.mark.parametrize("text", ["{", "a}", "{}", "{a!r}", "{a:>9}", "{a|}"])
def test_templates_name_columns_only(text):
    with pytest.raises(RecipeError, match="template"):
        Template.parse(text)


def test_a_template_reaches_no_attributes():
    with pytest.raises(RecipeError, match=r"no column 'a\.__class__'"):
        Template.parse("{a.__class__}").resolve(["a"])


def test_every_missing_column_is_named_with_the_nearest():
    with pytest.raises(RecipeError, match=r"'reff'.*did you mean 'ref'.*'mrr' or 'm'.*did you mean 'mr'"):
        Template.parse("{reff} {mrr|m} {mr}").resolve(["mr", "ref"])


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_a_recipe_becomes_frozen_values(tmp_path):
    recipe = read(R.write(tmp_path), ["training.learning_rate=2e-3", "training.micro_batch_tokens=64", "lora=null"])
    assert recipe.name == "toy"
    assert recipe.lora is None
    assert recipe.training["learning_rate"] == 2e-3
    assert recipe.micro_batch_tokens == 64
    assert read(R.write(tmp_path), ["training.class_weights=[1, 2.5]"]).class_weights == (1, 2.5)
    assert "micro_batch_tokens" not in recipe.training
    assert recipe.privacy.target_epsilon == 8
    with pytest.raises(TypeError):
        recipe.training["seed"] = 1


def test_the_output_folder_is_named_after_the_recipe(tmp_path):
    assert read(R.write(tmp_path, training__output_dir=None)).output_dir == Path("out/toy")


def test_a_budget_file_is_a_setting_of_privacy(tmp_path):
    assert read(R.write(tmp_path, privacy__budget_file="all.json")).privacy.budget_file == "all.json"
    with pytest.raises(RecipeError, match="budget_file must be a path as text, or left out"):
        read(R.write(tmp_path, privacy__budget_file=3))


def test_everything_wrong_is_named_at_once(tmp_path):
    wrong = {
        "model.nmae=x": "model.nmae: there is no such setting; did you mean 'name'?",
        "model.task=causal": "model.task: expected " + " or ".join(TASKS) + ", got 'causal'; did you mean 'causal_lm'?",
        "lora.lora_aplha=4": "lora.lora_aplha: there is no such setting; did you mean 'lora_alpha'?",
        "lora.r=two": "lora.r: expected a whole number, got 'two'",
        "data.train=nowhere.jsonl": "data.train: the file nowhere.jsonl does not exist",
        "data.target=null": "data.target: missing",
        "data.label=y": "data.label: not for the task causal_lm",
        "training.learning_rte=1": "training.learning_rte: there is no such setting; did you mean 'learning_rate'?",
        "training.max_steps=1.5": "training.max_steps: expected a whole number, got 1.5",
        "training.lr_scheduler_type=cosin": "did you mean 'cosine'?",
        "training.fp16=true": "training.fp16=True: cannot be combined with differential privacy: loss scaling",
        "training.gradient_accumulation_steps=8": "set it to 1, choose the logical batch with expected_batch_size",
        "privacy.noise_multiplier=1": "give exactly one of target_epsilon and noise_multiplier (got both)",
        "privacy.target_epsilom=1": "privacy.target_epsilom: there is no such setting; did you mean 'target_epsilon'?",
        "privcy.x=1": "privcy: there is no such section; did you mean 'privacy'?",
    }
    sections = [o for o in wrong if not o.startswith("privcy")]
    with pytest.raises(RecipeError) as refusal:
        read(R.write(tmp_path), [*sections, "data.target=null"])
    missing = [m for o, m in wrong.items() if o in sections and m not in str(refusal.value)]
    # model.task is wrong, so what the task needs cannot be told
    assert set(missing) == {wrong["data.target=null"], wrong["data.label=y"]}
    with pytest.raises(RecipeError) as refusal:
        read(R.write(tmp_path), ["data.target=null", "data.label=y"])
    assert all(wrong[o] in str(refusal.value) for o in ("data.target=null", "data.label=y"))
    with pytest.raises(RecipeError, match="did you mean 'privacy'"):
        read(R.write(tmp_path), ["privcy.x=1"])


@pytest.mark.parametrize("written", ["inf", ".inf", "Infinity"])
def test_an_infinite_epsilon_is_told_how_to_train_without_privacy(written, tmp_path):
    with pytest.raises(RecipeError, match=r"for training without privacy use transformers\.Trainer"):
        read(R.write(tmp_path), [f"privacy.target_epsilon={written}"])
    with pytest.raises(RecipeError, match=r"privacy\.epsilon: there is no such setting; did you mean 'target_epsilon'"):
        read(R.write(tmp_path), [f"privacy.epsilon={written}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=../no/such/folder", "the folder ../no/such/folder does not exist"),
        ("model.name=.", "holds no config.json"),
        ("data.train=data.txt", r"expected a file ending in .*"),
        ("data.train=a/b/c", "expected a file ending in"),
        ("data.max_length=1", "2 tokens or more"),
        ("data.prompt={mr", "data.prompt: template"),
        ("training.micro_batch_tokens=0", "micro_batch_tokens"),
        ("training.class_weights=[1.0, -2.0]", "class_weights"),
        ("training.class_weights=3", "class_weights"),
        ("training.class_weights=[]", "class_weights"),
        ("training.output_dir=null", "output_dir"),
        ("training.save_strategy=never", "one of 'no', 'steps', 'epoch', 'best'"),
        ("training.max_grad_norm=0.5", "clip_norm"),
        ("privacy.target_epsilon=null", "got neither"),
        ("privacy.clip_norm=-1", "clip_norm must be"),
        ("lora=8", "lora: expected `key: value` lines, got 8"),
        ("model.name=null", "model.name: expected text, got None"),
    ],
)
def test_mistakes_are_named(tmp_path, override, message):
    if override == "data.train=data.txt":
        (tmp_path / "data.txt").write_text("x")
        override = f"data.train={tmp_path / 'data.txt'}"
    with pytest.raises(RecipeError, match=message):
        read(R.write(tmp_path), [override])


def test_a_setting_is_found_by_what_people_call_it(tmp_path):
    called = {
        "training.lr=1": "did you mean 'learning_rate'?",
        "training.epochs=1": "did you mean 'num_train_epochs'?",
        "training.batch_size=8": "did you mean privacy.expected_batch_size",
        "lora.rank=4": "did you mean 'r'?",
        "lora.alpha=4": "did you mean 'lora_alpha'?",
        "privacy.sigma=1": "did you mean 'noise_multiplier'?",
        "data.file=x": "did you mean 'train'?",
    }
    with pytest.raises(RecipeError) as error:
        read(R.write(tmp_path), list(called))
    for wrong, message in called.items():
        line = next(x for x in str(error.value).splitlines() if wrong.partition("=")[0] in x)
        assert message in line


def test_each_setting_that_is_meant_exists():
    classes = {
        "model": ModelSection,
        "data": DataSection,
        "privacy": PrivacyConfig,
        "lora": LoraConfig,
        "training": TrainingArguments,
    }
    named = {found for words in MEANT.values() for found in re.findall(r"([a-z]+)\.([a-z_]+)", words)}
    assert len(named) > 15
    for section, key in named:
        assert key in {f.name for f in dataclasses.fields(classes[section])}, f"{section}.{key}"


def test_a_recipe_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*: No such file"):
        read(tmp_path / "no.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(RecipeError, match="not UTF-8"):
        read(tmp_path / "bytes.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_recipes_of_the_repository_are_recipes(path, tmp_path):
    local = R.sections(tmp_path)
    overrides = [f"model.name={local['model']['name']}"] + [
        f"data.{key}={local['data'][key]}" for key in ("train", "validation")
    ]
    recipe = read(path, overrides)
    assert recipe.privacy.target_epsilon is not None
    assert recipe.lora["target_modules"]


def test_the_published_setting_of_li_et_al_2021(tmp_path):
    local = R.sections(tmp_path)
    path = next(p for p in RECIPES if p.stem == "e2e-gpt2")
    as_published = read(path)
    assert (as_published.model.name, as_published.data.train) == ("openai-community/gpt2", "tuetschek/e2e_nlg")
    p, t = as_published.privacy, as_published.training
    assert (p.target_epsilon, p.target_delta, p.expected_batch_size, p.clip_norm) == (8, 8e-6, 1024, 0.1)
    assert (t["learning_rate"], t["num_train_epochs"]) == (2e-3, 10)
    assert read(path, [f"model.name={local['model']['name']}"]).model.name.endswith("base")
