"""`hf-dp generate`: an adapter and a whole model write; the data set has the model's claim and verifies."""

import json

import pytest
import transformers

from hf_dp.card.readme import yaml_of
from tests.cli.test_merge import adapter, names, spoil
from tests.support.folders import failures, model_folder


def test_a_line_of_text_of_an_adapter_and_of_the_whole_model(hf_dp, tmp_path):
    folder = adapter(tmp_path)
    status, first, err = hf_dp("generate", folder, "Once upon", "--temperature", 0, "--max-new-tokens", 5)
    assert status == 0, err
    assert hf_dp("merge", folder)[0] == 0
    merged = tmp_path / "adapter-merged"
    assert hf_dp("generate", merged, "Once upon", "--temperature", 0, "--max-new-tokens", 5) == (0, first, "")
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    model = transformers.AutoModelForCausalLM.from_pretrained(merged)
    given = tokenizer("Once upon", return_tensors="pt").input_ids
    ids = model.generate(input_ids=given, max_new_tokens=5, do_sample=False)[0, given.shape[1] :]
    assert first.strip() == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_a_short_prompt_beside_a_long_one_gives_what_it_gives_alone(hf_dp, tmp_path):
    folder = adapter(tmp_path)
    settings = ("--temperature", 0, "--max-new-tokens", 5)
    alone = [hf_dp("generate", folder, prompt, *settings)[1].strip() for prompt in ("a", "Once upon a time")]
    (tmp_path / "prompts.txt").write_text("Once upon a time\n")
    both = hf_dp("generate", folder, "a", "--prompts", tmp_path / "prompts.txt", *settings)[1]
    assert both == f"1. a\n{alone[0]}\n\n2. Once upon a time\n{alone[1]}\n\n"


def test_a_data_set_has_the_claim_of_its_model(hf_dp, tmp_path):
    folder = adapter(tmp_path)
    status, out, err = hf_dp("generate", folder, "a", r"b\n", "--num", 5, "--output", tmp_path / "deep" / "texts")
    assert status == 0, err
    made = tmp_path / "deep" / "texts"
    rows = [json.loads(line) for line in (made / "train.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a", "b\n", "a", "b\n", "a"]
    assert all(row["text"] for row in rows)
    assert failures(made) == ""
    for carried in ("privacy.json", "privacy_ledger.jsonl", "privacy_tradeoff.svg"):
        assert (made / carried).read_bytes() == (folder / carried).read_bytes()
    card = (made / "README.md").read_text()
    assert "synthetic" in yaml_of(card)["tags"]
    assert "post-processing" in card
    assert str(tmp_path) not in card
    assert str(made) in out


def test_texts_of_a_model_without_a_guarantee_have_none(hf_dp, tmp_path):
    folder = adapter(tmp_path)
    for name in ("privacy_ledger.jsonl", "privacy.json", "README.md"):
        (folder / name).unlink()
    model_folder(folder, sigma=0.0)
    assert hf_dp("generate", folder, "--output", tmp_path / "texts", "--max-new-tokens", 2)[0] == 0
    card = (tmp_path / "texts" / "README.md").read_text()
    assert "**NOT PRIVATE**" in card
    assert "post-processing" not in card
    assert failures(tmp_path / "texts") == ""


def spoiled(folder, how):
    """Spoils the folder; arguments that must be refused."""
    if how in ("a lie", "no base"):
        spoil(folder, how)
    elif how == "no model":
        spoil(folder, "no adapter")
    elif how == "there already":
        (folder.parent / "texts").mkdir()
    return {"too long": ["a b c " * 500], "hot": ["--temperature", -1], "none": ["--num", 0]}.get(how, [])


REFUSED = {
    "a lie": "epsilon, computed again",
    "no model": "holds no model",
    "no base": "base_model_name_or_path",
    "there already": "exists already",
    "too long": "shorten it",
    "hot": "temperature: expected 0 or more",
    "none": "--num: expected 1 or more",
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_cannot_be_written_is_refused_and_nothing_is_left(how, hf_dp, tmp_path):
    folder = adapter(tmp_path)
    arguments = spoiled(folder, how)
    before = names(tmp_path)
    status, _, err = hf_dp("generate", folder, *arguments, "--output", tmp_path / "texts")
    assert status == 2
    assert REFUSED[how] in err
    assert names(tmp_path) == before


def test_a_classifier_writes_no_text(hf_dp, tmp_path):
    status, _, err = hf_dp("generate", adapter(tmp_path, "classifier"), "a")
    assert status == 2
    assert "writes no text" in err
