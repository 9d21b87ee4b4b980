"""The whole card: written where only a template stood, with code that runs; what somebody wrote stays."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import peft
import pytest
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

from hf_dp.accounting.selection import Selection
from hf_dp.card import Described
from hf_dp.card import writing as card
from hf_dp.card.readme import kept
from hf_dp.card.record import Record
from hf_dp.card.schema import read_record
from hf_dp.card.untouched import untouched
from tests.support import recipes as R
from tests.support.folders import failures, model_folder

ROOT = Path(__file__).resolve().parents[2]
OWN = "It purrs."
SIZES = {**R.SIZES, "vocab_size": len(R.WORDS), "max_position_embeddings": 32}
NAMES = {"id2label": {0: "sad", 1: "glad", 2: 'a "third" one'}, "label2id": {"sad": 0, "glad": 1, 'a "third" one': 2}}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 4, "vocab_size": len(R.WORDS)}


def adapter_of(base: Path, task: str, load: type) -> torch.nn.Module:
    names = NAMES if task == "SEQ_CLS" else {}
    return peft.get_peft_model(load.from_pretrained(base, **names), peft.LoraConfig(r=2, task_type=task))


def causal_adapter(folder: Path) -> None:
    """Without a tokenizer of its own: the base's is used."""
    base = R.save_causal_lm(folder.parent / "base")
    adapter_of(base, "CAUSAL_LM", transformers.AutoModelForCausalLM).save_pretrained(folder)


def classifying_adapter(folder: Path) -> None:
    base = R.save_encoder(folder.parent / "encoder")
    adapter_of(base, "SEQ_CLS", transformers.AutoModelForSequenceClassification).save_pretrained(folder)
    R.tokenizer().save_pretrained(folder)
    (folder / "classes.json").write_text(json.dumps({str(n): name for n, name in NAMES["id2label"].items()}))


def whole(model: torch.nn.Module) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        R.tokenizer().save_pretrained(folder)

    return save


def kinds() -> dict[str, Callable[[Path], None]]:
    bert = transformers.BertConfig(**SIZES, **NAMES)
    t5 = transformers.T5Config(**T5, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    llama = transformers.LlamaConfig(**SIZES, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    return {
        "an adapter": causal_adapter,
        "a classifier's adapter": classifying_adapter,
        "a whole causal model": whole(transformers.LlamaForCausalLM(llama)),
        "a whole classifier": whole(transformers.BertForSequenceClassification(bert)),
        "a token classifier": whole(transformers.BertForTokenClassification(bert)),
        "an encoder-decoder": whole(transformers.T5ForConditionalGeneration(t5)),
        "another kind": whole(transformers.BertModel(bert)),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind, with the card that a run writes."""
    root = tmp_path_factory.mktemp("kinds")
    record = Record.of(read_record(model_folder(root / "record")))
    found = {}
    for number, (kind, save) in enumerate(kinds().items()):
        found[kind] = root / f"model-{number}"
        save(found[kind])
        card.write_card(found[kind], record)
    return found


def code_in(folder: Path) -> str:
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]


def said_by(folders: list[Path]) -> dict[str, str]:
    """What the code on each card prints, run beside its folder, all in one fresh process without hf_dp."""
    run = (
        "import json, os, sys\n"
        "for folder, code in json.loads(sys.stdin.read()):\n"
        "    os.chdir(os.path.dirname(folder)); print('==', folder); exec(code, {})\n"
        "print('== all', 'hf_dp' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", run],
        input=json.dumps([(str(f), code_in(f)) for f in folders]),
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["== all False"], done.stderr[-3000:]
    parts = (part.partition("\n") for part in done.stdout.split("== ")[1:])
    return {folder: said.strip() for folder, _, said in parts}


def test_the_code_on_an_adapters_card_runs(folders, monkeypatch, capsys):
    monkeypatch.chdir(folders["an adapter"].parent)
    exec(code_in(folders["an adapter"]), {})
    assert capsys.readouterr().out.split()[0] in R.WORDS


@pytest.mark.slow
def test_the_code_on_each_card_runs_in_a_fresh_process(folders):
    said = said_by([*folders.values()])
    for kind in ("a classifier's adapter", "a whole classifier"):
        assert said[str(folders[kind])] in NAMES["label2id"]
    tagged = said[str(folders["a token classifier"])].splitlines()
    assert tagged
    assert all(line.split(" ", 1)[1] in NAMES["label2id"] for line in tagged)
    assert "BertModel" in said[str(folders["another kind"])]


def test_each_card_says_at_its_head_what_it_is_and_promises(folders):
    epsilon = json.loads((folders["an adapter"] / "privacy.json").read_text())["epsilon"]
    for kind, folder in folders.items():
        loaded = ModelCard.load(folder / "README.md")
        head = loaded.text[:900]
        stated = float(re.search(r"\(epsilon <= ([\d.]+), delta = 0\.0001\)", head)[1])
        assert epsilon <= stated <= epsilon * 1.001, kind
        assert "one record of 1,000" in head
        assert "More Information Needed" not in loaded.text
        assert loaded.data.library_name == ("peft" if "adapter" in kind else "transformers")
        assert {"differential-privacy", "differential_privacy", "dp-sgd"} <= {*loaded.data.tags}
        assert "base_model" not in loaded.data.to_dict()  # a folder here, which the Hub refuses
        order = ["## How to use it", "## Training", "## Privacy"]
        assert sorted(order, key=loaded.text.index) == order
    text = (folders["a classifier's adapter"] / "README.md").read_text()
    assert 'sad, glad, a "third" one' in text
    assert ModelCard(text).data.pipeline_tag == "text-classification"


# ---- whose words they are -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of an adapter's folder."""
    import shutil

    return Path(shutil.copytree(folders["an adapter"], tmp_path / "notes"))


@pytest.fixture
def record(folder):
    return Record.of(read_record(folder))


def test_what_somebody_wrote_around_our_sections_stays_when_they_are_written_again(folder, record):
    readme = folder / "README.md"
    readme.write_text(f"{readme.read_text()}\n## Limits\n\n{OWN}\n")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    for _ in range(2):
        model.save_pretrained(folder)
        card.write_card(folder, record, Described(rows={"optimizer": "sgd"}))
    after = readme.read_text()
    assert OWN in after
    assert "| optimizer | sgd |" in after
    assert after.startswith("---")
    assert after.count("# notes\n") == 1  # the name of the folder that it lies in now
    assert after.count("## How to use it") == 1


def test_a_section_that_somebody_edited_is_theirs(folder, record):
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace("## How to use it\n", f"## How to use it\n\n{OWN}\n"))
    for _ in range(2):
        card.write_card(folder, record, Described(rows={"optimizer": "sgd"}))
    after = readme.read_text()
    assert after.count(OWN) == 1
    assert "# model-0" in after  # all of the edited section stays
    assert "| optimizer | sgd |" in after  # and the other one does not
    assert failures(folder) == ""


@pytest.mark.parametrize("line", ["- **License:** mit", "It purrs.", "## Uses and more"])
def test_one_line_of_ones_own_keeps_a_whole_template(line, folder, record):
    (folder / "README.md").unlink()
    peft.AutoPeftModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    readme = folder / "README.md"
    template = ModelCard.load(readme).text
    assert untouched(template)
    assert not untouched(f"{template}\n{line}\n")
    readme.write_text(f"{readme.read_text()}\n{line}\n")
    card.write_card(folder, record)
    after = readme.read_text()
    assert line in after
    assert "Model Card for Model ID" in after
    assert "## How to use it" not in after
    assert failures(folder) == ""


@pytest.mark.parametrize("name", ["SFT", "Reward"])
def test_trls_template_gives_way_to_the_whole_card(name, tmp_path):
    """Also where it knows no base and cites the paper of its method."""
    template = "rm_model_card.md" if name == "Reward" else "lm_model_card.md"
    known = {
        "base_model": None,
        "model_name": "mine",
        "hub_model_id": None,
        "dataset_name": "texts",
        "trainer_name": name,
        "trainer_citation": "@article{x,\n  year = {2020}\n}",
        "paper_title": "On texts",
        "paper_id": "2305.1",
        "wandb_url": "https://wandb.example/run",
        **dict.fromkeys([f"{of}_version" for of in "trl transformers pytorch datasets tokenizers".split()], "1.2"),
    }
    path = files("trl").joinpath("templates", template)
    text = ModelCard.from_template(ModelCardData(library_name="peft"), template_path=str(path), **known).text
    assert "On texts" in text
    assert untouched(text)
    for line in ("It purrs.", "- **License:** mit", "## Uses"):
        assert not untouched(f"{text}\n{line}\n")


def test_a_lost_card_is_made_again_and_what_the_training_knew_stays_with_the_card(folder, record):
    readme = folder / "README.md"
    card.write_card(folder, record, Described(rows={"optimizer": "sgd"}, license="mit", base="me/base"))
    before = readme.read_text()
    card.write_card(folder, record)  # as `hf-dp card` does
    assert readme.read_text() == before
    front = ModelCard.load(readme).data
    assert (front.license, front.base_model) == ("mit", "me/base")
    readme.unlink()
    card.write_card(folder, record)
    assert "## How to use it" in readme.read_text()
    assert failures(folder) == ""


def test_the_code_loads_by_the_name_on_the_hub_from_the_first_time_that_there_is_one(folder, record):
    readme = folder / "README.md"
    assert 'model_id = "model-0"  # the folder of this card' in readme.read_text()
    card.write_card(folder, record, name="me/private-notes")
    for _ in range(2):
        assert 'model_id = "me/private-notes"\n' in readme.read_text()
        assert "\n# private-notes\n" in readme.read_text()
        card.write_card(folder, record)  # as `hf-dp card` does
    assert failures(folder) == ""


@pytest.mark.parametrize("name", ["out", "checkpoint-20"])
def test_a_folder_whose_name_says_nothing_gives_no_title(name, folder, record):
    card.write_card(folder, record, name=name)
    assert "\n# base, fine-tuned with differential privacy\n" in (folder / "README.md").read_text()


def test_a_bolder_claim_among_the_answers_to_reviewers_is_found_out(folder):
    readme = folder / "README.md"
    head, answers = readme.read_text().split("## In the terms of NIST SP 800-226")
    readme.write_text(f"{head}## In the terms of NIST SP 800-226{re.sub(r'<= [0-9.]+', '<= 0.1', answers)}")
    assert "the claim at the card's head: (epsilon <= 0.1, delta = 0.0001)" in failures(folder)


def test_a_card_that_somebody_else_makes_anew_loses_no_words():
    new = "---\nlicense: mit\ntags: [new]\n---\n# Fresh\n"
    mine = f"---\ntags: [old]\n---\n# Mine\n\n{OWN}\n"
    after = ModelCard(kept(mine, new))
    assert OWN in after.text
    assert "Fresh" not in after.text
    assert (after.data.license, after.data.tags) == ("mit", ["old", "new"])
    assert kept("", new) == new


# ---- what may be claimed --------------------------------------------------------------------------------------------


def test_results_stand_in_the_form_that_the_hub_reads_and_go_with_the_weights(folder, record):
    readme = folder / "README.md"
    card.write_card(folder, record, Described(results={"accuracy": 0.75}, evaluated_on="me/held-out"))
    (result,) = ModelCard.load(readme).data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.75, "me/held-out")
    assert "| accuracy | 0.75 |" in readme.read_text()
    card.write_card(folder, record, Described())  # trained on, and not evaluated since
    assert "accuracy" not in readme.read_text()


def test_a_model_that_was_selected_by_its_results_states_none(folder, record):
    readme = folder / "README.md"
    card.write_card(folder, record, Described(results={"accuracy": 0.75}, evaluated_on="me/held-out"))
    assert "0.75" in readme.read_text()
    chosen = Selection("geometric", 4.0, (record.charged,), 30.0)
    card.write_card(folder, card.with_selection(record, chosen))
    assert "0.75" not in readme.read_text()
    assert "| expected batch size | 50 |" in readme.read_text()
    assert failures(folder) == ""


def test_a_bolder_claim_at_the_head_is_found_out(folder):
    readme = folder / "README.md"
    assert failures(folder) == ""
    readme.write_text(re.sub(r"\(epsilon <= [\d.]+", "(epsilon <= 0.1", readme.read_text()))
    assert "the claim at the card's head: (epsilon <= 0.1, delta = 0.0001)" in failures(folder)


def test_without_noise_the_head_says_so(folder, tmp_path):
    silent = Record.of(read_record(model_folder(tmp_path / "silent", sigma=0.0)))
    card.write_card(folder, silent)
    text = (folder / "README.md").read_text()
    assert "**NOT PRIVATE: no noise was added" in text[:900]
    assert "differential_privacy" not in text
    assert "(epsilon <=" not in text
