"""The demo in miniature, from made-up records to its last word: numbers, files, card, and what it will not delete."""

import json
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hf_dp import accounting
from hf_dp.demo import base, records
from hf_dp.demo import run as demo
from hf_dp.demo.folder import MARK, fresh_folder
from hf_dp.demo.report import Result
from hf_dp.errors import ConfigError
from hf_dp.mechanism import Segment

SMALL = demo.Size(
    num_public=96,
    num_private=192,
    num_heldout=16,
    base_steps=6,
    overrides=(
        "training.max_steps=4",
        "training.logging_steps=2",
        "training.eval_steps=2",
        "training.learning_rate=1e-2",
        "privacy.expected_batch_size=16",
        "lora.r=2",
    ),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "small_llama", lambda tokenizer: _tiny(tokenizer))
        return folder, demo.run(folder, SMALL)


def _tiny(tokenizer):
    from transformers import LlamaForCausalLM

    made = _small_llama(tokenizer).config
    made.hidden_size, made.intermediate_size, made.num_hidden_layers = 32, 48, 1
    made.num_attention_heads, made.num_key_value_heads, made.head_dim = 2, 1, 16
    return LlamaForCausalLM(made)


_small_llama = base.small_llama


def test_it_spends_no_more_than_its_target_and_says_so(finished):
    _, result = finished
    assert 0 < result.spent.epsilon <= 8
    assert result.spent.num_steps == result.num_steps == 4


def test_the_losses_in_the_files_are_those_of_the_models(finished):
    folder, result = finished
    written = json.loads((folder / "results.json").read_text())
    assert [written[name] for name in ("base", "private", "non_private")] == [
        result.base,
        result.private,
        result.non_private,
    ]
    assert len({result.base, result.private, result.non_private}) == 3
    assert result.non_private < result.base  # four steps of plain training at this rate are enough for that


def test_the_cards_epsilon_is_what_accounting_gives_from_its_own_record(finished):
    folder, result = finished
    record = json.loads((folder / "private" / "privacy.json").read_text())
    segments = [
        Segment(*(s[name] for name in ("sample_rate", "noise_multiplier", "num_steps"))) for s in record["segments"]
    ]
    assert record["private"] is True
    assert record["epsilon"] == accounting.spent(segments, record["delta"]).epsilon == result.spent.epsilon
    assert [s.num_steps for s in segments] == [4]
    assert segments[0].sample_rate == 16 / 192
    assert record["declared"] == {"public_eval": True}
    card = (folder / "private" / "README.md").read_text()
    assert f"epsilon {result.spent.epsilon:.3g}" in card or f"epsilon {result.spent.epsilon:.2f}" in card


def test_it_leaves_the_picture_and_both_adapters(finished):
    folder, _ = finished
    assert (folder / "loss_and_epsilon.png").read_bytes().startswith(b"\x89PNG")
    for name in ("private", "non-private"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / name)
        assert any("lora_B" in n and p.abs().max() > 0 for n, p in model.named_parameters())


def test_nothing_private_is_in_the_non_private_card(finished):
    folder, _ = finished
    assert not (folder / "non-private" / "privacy.json").exists()


def test_it_starts_over_in_its_own_folder(finished, capsys):
    folder, _ = finished
    (folder / "left").write_text("x")
    assert fresh_folder(folder) is True
    assert [p.name for p in folder.iterdir()] == [MARK]
    assert fresh_folder(folder) is True


def test_it_never_deletes_somebody_elses_folder(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    assert fresh_folder(theirs) is False  # empty: it may be used
    (theirs / MARK).unlink()
    (theirs / "thesis.tex").write_text("years of work")
    for folder in (theirs, theirs / "thesis.tex"):
        with pytest.raises(ConfigError, match="move it away"):
            fresh_folder(folder)
    link = tmp_path / "link"
    link.symlink_to(theirs)
    (theirs / MARK).write_text("")
    with pytest.raises(ConfigError, match="move it away"):
        fresh_folder(link)
    assert (theirs / "thesis.tex").read_text() == "years of work"


def test_the_same_seed_makes_the_same_records_and_no_person_twice(tmp_path):
    sizes = {"num_public": 50, "num_private": 60, "num_heldout": 20}
    one, two, other = (records.write_records(tmp_path / str(i), **sizes, seed=i // 2) for i in (0, 1, 2))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(one, other, strict=True))
    assert [len(p.read_text().splitlines()) for p in one] == [50, 60, 20]
    notes = [json.loads(line)["note"] for p in one for line in p.read_text().splitlines()]
    names = [name for note in notes for name in (f"{f} {i}. {s}" for f, i, s in _people(note))]
    assert len(names) == len(set(names)) == 130


def _people(note):
    words = note.replace(",", " ").split()
    for a, b, c in zip(words, words[1:], words[2:], strict=False):
        if a in records.FIRST_NAMES and len(b) == 2 and b.endswith(".") and c.strip(".:") in records.SURNAMES:
            yield a, b[0], c.strip(".:")
