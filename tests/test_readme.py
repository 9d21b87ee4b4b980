"""The README's code runs as it is printed (a tiny model stands in for GPT-2), and what it names is there."""

import copy
import json
import re
from pathlib import Path

import datasets
import pytest
import reference
import torch
import transformers

from hf_dp.accounting import planned as accounting
from hf_dp.demo.base import train_tokenizer
from hf_dp.demo.records import write_records
from hf_dp.mechanism import Segment

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE, PLAIN_LOOP, RECOMPUTE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


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


def test_the_plain_loop_learns_within_its_budget(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    torch.manual_seed(0)
    exec(PLAIN_LOOP, names)
    right = (names["model"](names["x"])[:, 0] > 0) == (names["x"].sum(1) > 0)
    assert right.float().mean() > 0.8  # 0.97 measured; a coin gives 0.5
    spent = names["loop"].privacy_spent()
    assert (spent.num_steps, 0.9 < spent.epsilon <= 1.0) == (200, True)
    assert json.loads(Path("out/loop/privacy.json").read_text())["epsilon"] == spent.epsilon
    assert f"epsilon={spent.epsilon}" in capsys.readouterr().out


def test_a_noiseless_step_of_the_plain_loop_is_the_clipped_mean(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noiseless = PLAIN_LOOP.replace("target_epsilon=1.0", "noise_multiplier=0.0, clip_norm=1.6").replace(
        "=10)", "=0.05)"
    )
    prepare, run = noiseless.split("loop = ")
    names: dict = {}
    exec(prepare, names)
    before = copy.deepcopy(names["model"]).double()
    exec("loop = " + run, names)
    batch = {"x": torch.cat([b["0"] for b in names["draw"]]), "labels": torch.cat([b["1"] for b in names["draw"]])}
    batch = {name: values.double() for name, values in batch.items()}
    assert 50 < len(batch["x"]) < 150  # 100, with a deviation of 9.7
    assert names["mechanism"].num_steps == 1

    def loss(model, one):
        return names["example_losses"](model, (one["x"], one["labels"]))[0]

    norms = [float(reference.norm(g)) for g in reference.example_gradients(before, batch, loss)]
    assert min(norms) < 1.6 < max(norms)
    expected = reference.clipped_sum(before, batch, loss, 1.6)
    for name, after in names["model"].named_parameters():
        step = before.get_parameter(name) - after.double()
        assert torch.allclose(step, 2.0 * expected[name] / 100, atol=1e-6)  # float32 weights of about 0.3


def test_every_file_that_the_readme_names_is_there():
    for name in re.findall(r"`((?:scripts|recipes|hf_dp)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name


def test_the_file_tree_is_that_of_the_package():
    tree = README.split("## Files")[1]
    here = {p.name for p in (ROOT / "hf_dp").iterdir() if p.suffix == ".py" and p.name != "__init__.py"}
    assert sorted(name for name in here if name not in tree) == []
    named = set(re.findall(r"^ {2,4}(\w+\.py) ", tree, re.MULTILINE))
    assert sorted(named - here) == []
