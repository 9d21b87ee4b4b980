"""The README's code runs as it is printed (a tiny model stands in for GPT-2), and what it names is there."""

import json
import re
from pathlib import Path

import datasets
import pytest
import transformers

from hf_dp import accounting
from hf_dp.demo.base import train_tokenizer
from hf_dp.demo.records import write_records
from hf_dp.mechanism import Segment

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE, RECOMPUTE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A GPT-2 of one small layer, and 600 notes beside it."""
    records = write_records(tmp_path / "records", num_public=600, num_private=1, num_heldout=1).public_train
    notes = [json.loads(line)["note"] for line in records.read_text().splitlines()]
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps({"text": note}) + "\n" for note in notes))
    tokenizer = train_tokenizer(notes)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=256, bos_token_id=1, eos_token_id=1
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_the_example_trains_and_its_card_can_be_computed_again(gpt2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert EXAMPLE.count("openai-community/gpt2") == 2
    names: dict = {}
    exec(EXAMPLE.replace("openai-community/gpt2", str(gpt2)), names)
    record = json.loads(Path("out/notes/privacy.json").read_text())
    spent = names["trainer"].privacy_spent()
    assert 0 < spent.epsilon == record["epsilon"] <= 8
    assert f"PrivacySpent(epsilon={spent.epsilon}" in capsys.readouterr().out
    assert "## Privacy: epsilon" in Path("out/notes/README.md").read_text()
    assert Path("out/notes/adapter_model.safetensors").exists()

    exec(RECOMPUTE.replace("out/demo/private", "out/notes"), {})
    ours_again, stated = map(float, capsys.readouterr().out.split())
    assert stated == spent.epsilon
    assert ours_again == pytest.approx(stated, rel=5e-3)  # another grid than the card's
    segment = Segment(*(record["segments"][0][k] for k in ("sample_rate", "noise_multiplier", "num_steps")))
    assert (
        accounting.spent([segment._replace(noise_multiplier=segment.noise_multiplier * 0.9)], record["delta"]).epsilon
        > 1.05 * stated
    )


def test_every_file_that_the_readme_names_is_there():
    for name in re.findall(r"`((?:scripts|recipes|hf_dp)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name


def test_the_file_tree_is_that_of_the_package():
    tree = README.split("## Files")[1]
    here = {p.name for p in (ROOT / "hf_dp").iterdir() if p.suffix == ".py" and p.name != "__init__.py"}
    assert sorted(name for name in here if name not in tree) == []
    named = set(re.findall(r"^ {2,4}(\w+\.py) ", tree, re.MULTILINE))
    assert sorted(named - here) == []
