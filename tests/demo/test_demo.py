"""The demo in miniature, from made-up records to its last word: numbers, files, card, and what it will not delete."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dp import accounting
from hf_dp.demo import base, compare, records
from hf_dp.demo import run as demo
from hf_dp.demo.folder import MARK, fresh_folder
from hf_dp.demo.report import PICTURE, Result
from hf_dp.demo.secrets import GUESSING, NUM_SECRETS
from hf_dp.errors import ConfigError
from hf_dp.mechanism import Segment
from hf_dp.recipe import recipe as recipes

SMALL = demo.Size(
    num_public=96,
    num_private=192,
    num_heldout=32,
    base_steps=6,
    overrides=(
        "training.max_steps=4",
        "training.logging_steps=2",
        "training.eval_steps=2",
        "training.warmup_steps=0",
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


def test_it_says_how_much_each_model_gives_away(finished):
    folder, result = finished
    written = json.loads((folder / "results.json").read_text())
    lines = (folder / "private_train.jsonl").read_text().splitlines()[-NUM_SECRETS:]
    planted = [int(json.loads(line)["note"][-5:-1]) for line in lines]
    for name, of in (("private", result.private), ("non_private", result.non_private)):
        assert written[name] == of._asdict()
        assert 0 <= of.bits <= GUESSING
        assert len(of.guesses) == NUM_SECRETS
        assert of.extracted == sum(guess == code for guess, code in zip(of.guesses, planted, strict=True))
        assert 0 <= of.membership_low <= of.membership <= 1


def test_the_losses_in_the_files_are_those_of_the_models(finished):
    folder, result = finished
    written = json.loads((folder / "results.json").read_text())
    assert written["losses"] == result.losses._asdict()
    assert len({*result.losses}) == 3
    assert result.losses.non_private < result.losses.base  # four steps of plain training are enough for that


def test_the_losses_are_those_that_come_out_by_hand(finished):
    folder, result = finished
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    lines = [json.loads(line) for line in (folder / "private_heldout.jsonl").read_text().splitlines()]
    for name, stated in zip(("base", "private", "non-private"), result.losses, strict=True):
        model = _loaded(folder, name)
        nats = sum(_nats(model.eval(), tokenizer, record) for record in lines)
        assert stated == pytest.approx(
            nats / sum(len(r["note"]) for r in lines), rel=1e-4
        )  # float32 sums, padded or not


def _loaded(folder, name):
    """As a user of the folder loads it: the private model is an adapter, the others are whole."""
    if name == "private":
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / name)
    return AutoModelForCausalLM.from_pretrained(folder / name)


def _nats(model, tokenizer, record):
    prompt = tokenizer(f"{record['customer']}, {record['topic']}: ")["input_ids"]
    target = [*tokenizer(record["note"])["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum"))


def test_the_picture_starts_at_the_base_model(finished):
    folder, result = finished
    recipe = recipes.read(demo.RECIPE, [*demo._overrides(folder, _halves(folder)), *SMALL.overrides])
    tuned = compare.tune_plain(recipe, folder / "again", lambda model: float(model.training))
    assert [step for step, _ in tuned.losses] == [0, 2, 4]
    assert [step for step, _ in tuned.measured] == [0, 2, 4]
    assert tuned.losses[0][1] == pytest.approx(result.losses.base, rel=1e-6)
    assert tuned.losses[-1][1] == pytest.approx(result.losses.non_private, rel=1e-4)  # the same seed, order and steps


def _halves(folder):
    return records.Halves(*(folder / f"{name}.jsonl" for name in records.Halves._fields))


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


def test_it_leaves_the_picture_and_both_models(finished):
    folder, _ = finished
    assert (folder / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert any("lora_B" in n and p.abs().max() > 0 for n, p in _loaded(folder, "private").named_parameters())
    base = dict(_loaded(folder, "base").named_parameters())
    assert all(not p.equal(base[name]) for name, p in _loaded(folder, "non-private").named_parameters())


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
    names = [json.loads(line)["customer"] for p in one for line in p.read_text().splitlines()]
    assert len(names) == len(set(names)) == 130


def test_notes_as_asked_are_whole_sentences_on_their_topic(tmp_path):
    path = records.write_records(tmp_path, num_public=20, num_private=40, num_heldout=1).private_train
    made = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(records.is_as_asked(record, record["note"]) for record in made)
    first = made[0]
    other = next(record for record in made if record["topic"] != first["topic"])
    wrong = [other["note"], first["note"][:-1], f"{first['note']} The end.", first["note"].replace("the", "thee"), ""]
    assert not any(records.is_as_asked(first, note) for note in wrong if note != first["note"])
