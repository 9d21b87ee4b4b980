"""The card: every number, in words, in YAML and in JSON; idempotent; a guest in a README that others write too."""

import json
import os
import stat
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from hf_dp.accounting.epsilon import spent
from hf_dp.card import readme as card_files
from hf_dp.card import writing as card
from hf_dp.errors import ConfigError, LedgerError
from hf_dp.ledger.ledger import ExecutedSegment, LedgerHeader, LedgerRecord
from hf_dp.mechanism import Mechanism, Segment

MECHANISM = Mechanism(
    num_examples=42_061,
    expected_batch_size=1_024,
    num_steps=410,
    noise_multiplier=0.8,
    clip_norm=0.1,
    delta=1e-5,
    target_epsilon=5.2,
)
PLAN = MECHANISM.segments()


def ledger(segments=PLAN, mechanism=MECHANISM, **changed):
    header = {name: getattr(mechanism, name) for name in ("num_examples", "unit", "relation", "delta", "debug")}
    return LedgerRecord(
        header=LedgerHeader(data_fingerprint="must stay at home", **(header | changed)),
        segments=tuple(Segment(*s) for s in segments if s[2]),
        head="ab" * 32,
        num_steps=sum(s[2] for s in segments),
        torn=False,
        executed=tuple(
            ExecutedSegment(q, sigma, mechanism.clip_norm, round(q * 42_061), t, *noise)
            for q, sigma, t, *noise in segments
        ),
    )


def record(segments=PLAN, mechanism=MECHANISM, public_eval=True, **changed):
    return card.privacy_record(
        mechanism,
        ledger(segments, mechanism, **changed),
        libraries={"hf_dp": "0.1.0"},
        declared={"public_eval": public_eval},
    )


def with_readme(folder: Path, text: str) -> str:
    """The README after two writes, which must be the README after one."""
    (folder / "README.md").write_bytes(text.encode())
    card.write_card(folder, record())
    once = (folder / "README.md").read_bytes().decode()
    card.write_card(folder, record())
    assert (folder / "README.md").read_bytes().decode() == once
    return once


# ---- the record ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 205, 409])
def test_from_the_first_step_on_epsilon_is_that_of_the_plan_and_of_the_steps_taken_it_is_said_what_it_is(
    tmp_path, steps
):
    early, whole = record([Segment(MECHANISM.sample_rate, 0.8, steps)]), record()
    for name in ("epsilon", "epsilon_pld", "epsilon_rdp", "epsilon_at", "tradeoff"):
        assert getattr(early, name) == getattr(whole, name)
    assert early.epsilon_of_steps_taken == spent([Segment(MECHANISM.sample_rate, 0.8, steps)], 1e-5).epsilon
    assert (early.num_steps, early.mechanism.num_steps_planned) == (steps, 410)
    card.write_card(tmp_path, early)
    loaded = ModelCard.load(tmp_path / "README.md")
    assert (loaded.data["privacy"]["num_steps"], loaded.data["privacy"]["num_steps_claimed"]) == (steps, 410)
    assert f"**Steps taken: {steps} of 410.**" in loaded.text
    assert "Rogers" in loaded.text


def test_more_steps_than_planned_are_claimed_too():
    more = record([Segment(MECHANISM.sample_rate, 0.8, 411)])
    assert more.epsilon == more.epsilon_of_steps_taken > record().epsilon


def test_the_record_alone_is_enough_to_compute_epsilon_again():
    stored = json.loads(card_files.to_json(record().stated()))
    again = spent([Segment.of(s) for s in stored["segments"]], stored["delta"])
    assert (again.epsilon, again.pld, again.rdp) == (stored["epsilon"], stored["epsilon_pld"], stored["epsilon_rdp"])
    assert stored["ledger"]["head"] == "ab" * 32
    assert stored["mechanism"]["clip_norm"] == 0.1
    assert stored["accountant"]["version"] == card.library_versions(["dp-accounting"])["dp-accounting"]


def test_segments_without_a_step_are_left_out_and_nothing_of_the_data_is_in():
    q = MECHANISM.sample_rate
    written = record([(q, 0.8, 100), (q, 0.9, 0), (q, 1.0, 10)]).stated()
    assert [s["num_steps"] for s in written["segments"]] == [100, 10]
    assert written["segments"][1] == {
        "sample_rate": q,
        "noise_multiplier": 1.0,
        "clip_norm": 0.1,
        "expected_batch_size": 1024,
        "num_steps": 10,
        "noise": "gaussian",
    }
    assert "must stay at home" not in card_files.to_json(written)


@pytest.mark.parametrize(
    ("segments", "changed", "why"),
    [
        ([(0.1, 0.0, 3)], {}, "no noise"),
        ([(0.1, 1.0, 3), (0.1, 0.0, 1)], {}, "no noise"),
        (PLAN, {"debug": True}, "debugging seed"),
    ],
)
def test_without_noise_or_with_a_fixed_seed_nothing_is_claimed(tmp_path, segments, changed, why):
    written = record(segments, **changed)
    assert not written.private
    assert {written.stated()[k] for k in ("epsilon", "epsilon_pld", "epsilon_rdp")} == {"infinite"}
    (tmp_path / "README.md").write_text("---\ntags: [mine, dp-sgd, differential-privacy]\n---\n")
    card.write_card(tmp_path, written)
    text = (tmp_path / "README.md").read_text()
    assert "NOT PRIVATE" in text
    assert why in text
    assert "carries no privacy guarantee" in text
    assert ModelCard(text).data.tags == ["mine"]
    assert yaml.safe_load(text.split("---")[1])["privacy"]["epsilon"] == "infinite"
    assert json.loads((tmp_path / "privacy.json").read_text())["reason"] == written.reason


def test_a_planned_run_without_noise_is_not_private_even_before_its_first_step():
    silent = Mechanism(**(vars(MECHANISM) | {"noise_multiplier": 0.0, "target_epsilon": None}))
    assert not record([], silent).private


def test_before_the_first_step_epsilon_is_zero(tmp_path):
    card.write_card(tmp_path, record([]))
    block = ModelCard.load(tmp_path / "README.md").data["privacy"]
    assert (block["epsilon"], block["num_steps"], block["noise_multiplier"]) == (0.0, 0, 0.8)


def test_a_ledger_of_another_run_is_refused_and_every_difference_named():
    with pytest.raises(LedgerError, match=r"num_examples is 7 .* delta is 0.001 "):
        record(num_examples=7, delta=1e-3)


# ---- what the Hub reads ----------------------------------------------------------------------------------------------


def test_the_yaml_block_has_every_field_and_numbers_stay_numbers(tmp_path):
    small = Mechanism(**(vars(MECHANISM) | {"delta": 8e-6}))
    card.write_card(tmp_path, record(mechanism=small))
    loaded = ModelCard.load(tmp_path / "README.md")
    block = loaded.data["privacy"]
    assert list(block) == (
        "epsilon delta unit relation mechanism noise_multiplier sample_rate num_steps clip_norm accountant".split()
    )
    assert type(block["delta"]) is float
    assert block["delta"] == 8e-6
    assert block["num_steps"] == 410
    assert block["sample_rate"] == MECHANISM.sample_rate
    assert loaded.data.tags == ["differential-privacy", "differential_privacy", "dp-sgd"]
    assert "delta: 8.0e-06" in loaded.content  # `8e-6` would be a string to YAML 1.1


def test_what_is_shown_of_epsilon_is_never_below_it(tmp_path):
    for steps in range(1, 400, 37):
        written = record([(MECHANISM.sample_rate, 0.8, steps)])
        card.write_card(tmp_path, written)
        loaded = ModelCard.load(tmp_path / "README.md")
        headline = float(loaded.text.split("epsilon ")[1].split()[0])
        assert written.epsilon <= loaded.data["privacy"]["epsilon"] <= written.epsilon * 1.0002
        assert loaded.data["privacy"]["epsilon"] <= headline <= written.epsilon * 1.02


def test_settings_changed_in_the_middle_are_shown_segment_by_segment(tmp_path):
    card.write_card(tmp_path, record([(0.1, 1.0, 5), (0.2, 1.5, 7)]))
    loaded = ModelCard.load(tmp_path / "README.md")
    block = loaded.data["privacy"]
    assert (block["sample_rate"], block["noise_multiplier"], block["num_steps"]) == ([0.1, 0.2], [1.0, 1.5], [5, 7])
    assert "1, then 1.5" in loaded.text


def test_the_section_says_what_is_assumed_and_what_is_not_covered(tmp_path):
    for public, words in ((True, "declared them public"), (False, "not declared public")):
        card.write_card(tmp_path, record(public_eval=public))
        text = (tmp_path / "README.md").read_text()
        for promise in (
            words,
            "floating-point",
            "Side channels",
            "is public",
            "privacy.json",
            "one record: whoever is in several",
        ):
            assert promise in text
        assert "$" not in text  # every place of the template is filled


def test_the_best_attackers_rates_are_told_rounded_up(tmp_path):
    """q .02435, sigma .678, 410 steps: advantage .43271; true positives .04327, .15206, .46799 at .001, .01, .1."""
    card.write_card(tmp_path, record([(MECHANISM.sample_rate, 0.678, 410)]))
    text = ModelCard.load(tmp_path / "README.md").text
    for words in (
        "**71.7 % of",
        "at most 43.3 %",
        "| 1 in 1,000 | 4.4 % |",
        "| 1 in 100 | 15.3 % |",
        "| 1 in 10 | 46.8 % |",
    ):
        assert words in text
    assert "(privacy_tradeoff.svg)" in text


def test_the_picture_is_a_small_svg_that_needs_nothing_else_and_is_the_same_twice(tmp_path):
    import xml.etree.ElementTree as ET

    card.write_card(tmp_path, record())
    picture = tmp_path / "privacy_tradeoff.svg"
    first = picture.read_bytes()
    names = {element.tag.rpartition("}")[2] for element in ET.fromstring(first).iter()}
    assert names == {"svg", "title", "rect", "path", "text", "g"}
    assert first.count(b"http") == 1  # the name space
    assert len(first) < 6_000
    card.write_card(tmp_path, record())
    assert picture.read_bytes() == first
    card.write_card(tmp_path, record([(0.1, 0.0, 3)]))
    assert not picture.exists()  # nothing is claimed, nothing is drawn


def test_epsilon_is_stated_at_several_deltas_and_rises_as_they_fall():
    written = record()
    assert [at.delta for at in written.epsilon_at] == pytest.approx([1e-5, 1e-6, 1e-7, 1e-8])
    assert written.epsilon_at[0].epsilon == written.epsilon
    epsilons = [at.epsilon for at in written.epsilon_at]
    assert epsilons == sorted(epsilons)


def test_the_best_guessers_chance_is_the_one_that_epsilon_allows():
    from hf_dp.card.words import _in_words

    assert _in_words(0.0, 0.0)["accuracy"] == "50.00 %"
    assert _in_words(1.0, 0.0)["accuracy"] == "73.11 %"  # e / (1 + e) = 0.731058..., rounded up
    assert _in_words(8.0, 1e-5)["accuracy"] == "99.97 %"
    assert _in_words(5_000.0, 1e-5)["accuracy"] == "100.00 %"


# ---- a guest in the README -------------------------------------------------------------------------------------------

OTHERS = {
    "empty": "",
    "body only": "# My model\n\nMy words.\n",
    "no newline at the end": "# My model",
    "front matter only": "---\nlicense: mit\n---\n",
    "empty front matter": "---\n\n---\nWords\n",
    "comments and odd spacing": "---\n# mine\nlicense:   mit # really\ntags:\n  - zeta\n  - alpha\n\n# last\n"
    "base_model: x\n---\nWords\n\n",
    "not a number": "---\nlicense: mit\nscore: .nan\n---\n",
    "flow tags": "---\ntags: [a,\n  b]\nlicense: mit\n---\nWords\n",
    "one tag": "---\ntags: a\nlicense: mit\n---\nWords\n",
    "windows": "---\r\nlicense: mit\r\ntags:\r\n- a\r\n---\r\nWords\r\n",
    "old block in the middle": "---\nlicense: mit\nprivacy:\n  epsilon: 1.0\n  old: [1,\n 2]\n# mine\n"
    "base_model: x\n---\nWords\n",
    "rule in the body": "Words\n\n---\n\nprivacy: none\n\n---\n",
}


@pytest.mark.parametrize("text", OTHERS.values(), ids=OTHERS)
def test_everything_of_others_stays_and_a_second_write_changes_nothing(tmp_path, text):
    after = with_readme(tmp_path, text)
    old, new = ModelCard(text, ignore_metadata_errors=True), ModelCard(after)
    assert old.text.strip() in new.text
    kept = {k: v for k, v in old.data.to_dict().items() if k not in ("privacy", "tags")}
    assert str(kept) == str({k: new.data.to_dict()[k] for k in kept})  # as text, so that NaN equals NaN
    tags = old.data.tags or []
    ours = ["differential-privacy", "differential_privacy", "dp-sgd"]
    assert new.data.tags == ([tags] if isinstance(tags, str) else tags) + ours
    for comment in ("# mine", "# last", "license:   mit # really"):
        assert text.count(comment) == after.count(comment)
    assert ("\r\n" in text) == ("\r\n" in after)
    assert "\r\n" not in text or after.count("\n") == after.count("\r\n")


def test_an_old_section_is_replaced_where_it_stands(tmp_path):
    first = with_readme(tmp_path, "# Mine\n\nBefore.\n")
    (tmp_path / "README.md").write_text(first + "\nAfter.\n")
    card.write_card(tmp_path, record([(0.1, 2.0, 3)]))
    text = (tmp_path / "README.md").read_text()
    assert text.index("Before.") < text.index(card_files.START) < text.index(card_files.END) < text.index("After.")
    assert text.count("## Privacy") == 1
    assert "| steps charged | 3 " in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "UTF-8"),
        (b"---\na: [1\n---\n", "expected YAML"),
        (b"---\n- a\n---\n", "`key: value`"),
        (b"---\n{a: 1, tags: [b]}\n---\n", "expected YAML"),
        (f"words\n{card_files.START}\nhalf".encode(), "one start and one end mark, got start"),
    ],
)
def test_a_readme_that_cannot_be_edited_safely_is_left_alone(tmp_path, content, message):
    (tmp_path / "README.md").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        card.write_card(tmp_path, record())
    assert (tmp_path / "README.md").read_bytes() == content
    assert json.loads((tmp_path / "privacy.json").read_text())["private"]


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    card.write_card(tmp_path, record([(0.1, 2.0, 3)]))
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        card.write_card(tmp_path, record())
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_a_symbolic_link_is_replaced_and_not_followed(tmp_path):
    shared = tmp_path / "cache"
    shared.write_text("# Somebody else's\n")
    (tmp_path / "README.md").symlink_to(shared)
    card.write_card(tmp_path, record())
    assert shared.read_text() == "# Somebody else's\n"
    assert "Somebody else's" in (tmp_path / "README.md").read_text()


def test_files_can_be_read_by_those_whom_the_umask_lets(tmp_path):
    old = os.umask(0o022)
    try:
        card.write_card(tmp_path, record())
    finally:
        os.umask(old)
    assert {stat.S_IMODE(f.stat().st_mode) for f in tmp_path.iterdir()} == {0o644}


# ---- the others who write the card -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter():
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.fixture
def trainer(adapter, tmp_path):
    from transformers import Trainer, TrainingArguments

    return Trainer(
        model=adapter,
        args=TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True),
    )


def ours_is_there(folder: Path) -> str:
    loaded = ModelCard.load(folder / "README.md")
    assert {"differential-privacy", "dp-sgd"} <= set(loaded.data.tags)
    assert loaded.data["privacy"]["num_steps"] == 410
    assert loaded.text.count("## Privacy") == 1
    assert loaded.data.library_name == "peft"
    return loaded.text


def test_peft_may_write_before_and_after(adapter, tmp_path):
    for _ in range(2):
        adapter.create_or_update_model_card(str(tmp_path))
        card.write_card(tmp_path, record())
        ours_is_there(tmp_path)
    adapter.create_or_update_model_card(str(tmp_path))  # rewrites the tags, and has the last word
    last = ModelCard.load(tmp_path / "README.md")
    assert last.data["privacy"]["delta"] == 1e-5
    assert last.text.count("## Privacy") == 1


def test_trainer_may_write_before_and_after(trainer, adapter, tmp_path):
    adapter.save_pretrained(tmp_path)
    for _ in range(2):
        trainer.create_model_card(tags=["mine"])
        card.write_card(tmp_path, record())
        assert "Framework versions" in ours_is_there(tmp_path)


def test_a_hand_written_part_survives_three_saves(adapter, tmp_path):
    adapter.save_pretrained(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text() + "\n## Written by hand\n\nIt purrs.\n")
    for _ in range(3):
        adapter.save_pretrained(tmp_path)
        card.write_card(tmp_path, record())
        assert "## Written by hand\n\nIt purrs.\n" in ours_is_there(tmp_path)


def test_a_real_run_writes_one_card_into_folder_and_checkpoints_and_goes_on_doing_so(tmp_path):
    from tests.support import runs

    trainer = runs.trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    trainer.train()
    trainer.save_model()
    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text() + "\n## Written by hand\n\nIt purrs.\n")
    written = card_files.section_of(readme.read_text())
    for _ in range(3):
        trainer.model.save_pretrained(tmp_path)
        trainer.create_model_card(tags=["mine"], model_name="mine")
        readme.write_text(readme.read_text() + "\nMore by hand.\n")
        trainer.save_model()
        loaded = ModelCard.load(readme)
        assert "More by hand." in loaded.text
        assert card_files.section_of(loaded.content) == written
        assert loaded.data["privacy"]["num_steps"] == 2
    last, first = (ModelCard.load(tmp_path / f"checkpoint-{n}" / "README.md") for n in (2, 1))
    assert card_files.section_of(last.content) == written
    assert (last.data["privacy"], last.data.library_name) == (loaded.data["privacy"], "peft")
    assert first.data["privacy"]["num_steps"] == 1


def test_the_yaml_survives_the_hubs_own_types(tmp_path):
    card.write_card(tmp_path, record())
    loaded = ModelCard.load(tmp_path / "README.md")
    again = ModelCardData(**yaml.safe_load(loaded.data.to_yaml()), ignore_metadata_errors=False)
    assert again.to_dict() == loaded.data.to_dict()
    assert again["privacy"]["delta"] == 1e-5
    loaded.save(tmp_path / "README.md")
    assert card_files.yaml_of((tmp_path / "README.md").read_text())["privacy"] == loaded.data["privacy"]
    card.write_card(tmp_path, record())
    assert ModelCard.load(tmp_path / "README.md").text.count("## Privacy") == 1


def test_the_card_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, hf_dp, hf_dp.card; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
