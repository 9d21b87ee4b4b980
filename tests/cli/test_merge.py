"""`hf-dp merge`: the whole model gives what the adapter gave, its card verifies, and a refusal leaves nothing."""

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
import transformers

from hf_dp.card import leaving
from tests.support import recipes as R
from tests.support.folders import failures, model_folder

OWN = "Words of the user's own."
IDS = torch.tensor([[3, 4, 7, 12]])
CLASSES = {"0": "sad", "1": "glad", "2": "neither"}


@cache
def made(kind: str) -> Path:
    """What a run leaves, with an adapter of random weights, in a folder for the time of these tests."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    base = R.save_causal_lm(folder / "base") if kind != "classifier" else R.save_encoder(folder / "base")
    if kind == "classifier":  # with a pooler, which a masked LM has not
        transformers.AutoModel.from_pretrained(base).save_pretrained(base)
    torch.manual_seed(1)
    if kind == "classifier":
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(CLASSES))
        config = peft.LoraConfig(r=2, task_type="SEQ_CLS", init_lora_weights=False)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)
        if kind == "prompt":
            config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(folder / "adapter")
    if kind == "classifier":
        (folder / "adapter" / "classes.json").write_text(json.dumps(CLASSES))
    model_folder(folder / "adapter")
    return folder


def adapter(folder: Path, kind: str = "causal") -> Path:
    """A copy of `made`, with its base beside it."""
    shutil.copytree(made(kind), folder, dirs_exist_ok=True)
    settings = folder / "adapter" / "adapter_config.json"
    settings.write_text(settings.read_text().replace(str(made(kind)), str(folder)))
    return folder / "adapter"


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_the_merged_model_loads_without_peft_and_gives_what_the_adapter_gave(hf_dp, tmp_path):
    folder = adapter(tmp_path)
    readme = folder / "README.md"
    readme.write_text(f"{readme.read_text()}\n## Limits\n\n{OWN}\n")
    status, out, err = hf_dp("merge", folder)
    assert status == 0, err
    merged = tmp_path / "adapter-merged"
    assert str(merged) in out
    before = peft.AutoPeftModelForCausalLM.from_pretrained(folder)(input_ids=IDS).logits
    after = transformers.AutoModelForCausalLM.from_pretrained(merged)(input_ids=IDS).logits
    assert (before - after).abs().max() < 1e-5
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")(input_ids=IDS).logits
    assert (before - base).abs().max() > 1e-3
    assert failures(merged) == ""
    text = (merged / "README.md").read_text()
    assert OWN in text
    assert "# adapter-merged\n" in text
    assert "AutoModelForCausalLM.from_pretrained(model_id)" in text
    for carried in ("privacy.json", "privacy_ledger.jsonl", "privacy_tradeoff.svg"):
        assert (merged / carried).read_bytes() == (folder / carried).read_bytes()


def test_all_that_the_merged_folder_holds_may_be_pushed(hf_dp, tmp_path):
    folder = adapter(tmp_path)
    (folder / "stray.txt").write_text("not of the model")
    assert hf_dp("merge", folder, "--output", tmp_path / "deep" / "whole")[0] == 0
    found = leaving(tmp_path / "deep" / "whole")
    assert found.behind == ()
    assert {"config.json", "model.safetensors", "tokenizer.json", "privacy.json"} <= {*found.files}
    front = transformers.AutoConfig.from_pretrained(tmp_path / "deep" / "whole")
    assert front.model_type == "llama"


def test_a_merged_classifier_knows_its_classes(hf_dp, tmp_path):
    folder = adapter(tmp_path, "classifier")
    assert hf_dp("merge", folder)[0] == 0
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter-merged")
    assert list(merged.config.id2label.values()) == list(CLASSES.values())
    before = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert (before(input_ids=IDS).logits - merged(input_ids=IDS).logits).abs().max() < 1e-5


def test_weights_that_neither_base_nor_adapter_hold_are_not_made_up(hf_dp, tmp_path):
    folder = adapter(tmp_path, "classifier")
    R.save_encoder(tmp_path / "base")  # a masked LM, without a pooler
    status, _, err = hf_dp("merge", folder)
    assert status == 2
    assert "bert.pooler.dense" in err
    assert "would be random" in err


def spoil(folder: Path, how: str) -> None:
    if how == "no adapter":
        (folder / "adapter_config.json").unlink()
    elif how == "no record":
        (folder / "privacy.json").unlink()
    elif how == "no weights":
        (folder / "adapter_model.safetensors").unlink()
    elif how == "no base":
        (folder.parent / "base" / "config.json").unlink()
    elif how == "there already":
        (folder.parent / "whole").mkdir()
    elif how == "a lie":
        record = json.loads((folder / "privacy.json").read_text())
        (folder / "privacy.json").write_text(json.dumps(record | {"epsilon": record["epsilon"] / 2}))


REFUSED = {
    "no adapter": "has no adapter_config.json",
    "no record": "has no privacy.json",
    "no weights": "cannot be loaded on its base",
    "no base": "base_model_name_or_path",
    "there already": "exists already",
    "a lie": "epsilon, computed again",
    "prompt": "cannot be merged",
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_cannot_be_merged_is_refused_and_nothing_is_left(how, hf_dp, tmp_path):
    folder = adapter(tmp_path, "prompt" if how == "prompt" else "causal")
    spoil(folder, how)
    before = names(tmp_path)
    status, _, err = hf_dp("merge", folder, "--output", tmp_path / "whole")
    assert status == 2
    assert REFUSED[how] in err
    assert names(tmp_path) == before
    if how == "there already":
        assert names(tmp_path / "whole") == set()
    assert hf_dp("merge", folder, "--output", tmp_path / "deep" / "whole")[0] == (0 if how == "there already" else 2)
    assert (tmp_path / "deep").exists() == (how == "there already")
