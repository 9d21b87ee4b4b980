"""The command line from outside: what it prints, what it leaves, and how it says no."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import TrainerCallback

from hf_dp.training import MetricsFile
from tests.support import recipes as R


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


# ---- what works ------------------------------------------------------------------------------------------------------


def test_what_other_libraries_advise_is_not_printed_and_their_errors_are(hf_dp):
    assert hf_dp("recipe", "--keys")[0] == 0
    for name in ("transformers.trainer", "datasets.builder", "bitsandbytes.backends.cpu.ops"):
        assert not logging.getLogger(name).isEnabledFor(logging.WARNING), name
        assert logging.getLogger(name).isEnabledFor(logging.ERROR), name


def test_a_recipe_trains_and_the_adapter_loads_with_peft_alone(hf_dp, tmp_path):
    status, out, err = hf_dp("train", R.write(tmp_path), "training.logging_steps=1")
    assert status == 0, err
    assert "Private training" in out
    assert "nats per character" in out
    assert "after 2 noisy steps" in out
    assert "not covered" in out
    folder = tmp_path / "out"
    record = json.loads((folder / "privacy.json").read_text())
    assert record["num_steps"] == 2
    assert 7.9 < record["epsilon"] <= 8
    assert f"epsilon {record['epsilon']:.4g} at delta {record['delta']:g}" in out
    assert ModelCard.load(folder / "README.md").data.privacy["epsilon"] == pytest.approx(record["epsilon"])
    code = (
        "import sys; from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as T;"
        f"m = M.from_pretrained({str(folder)!r}); t = T.from_pretrained({str(folder)!r});"
        "b = t('name pub |', return_tensors='pt'); m.generate(input_ids=b.input_ids, max_new_tokens=3);"
        "print('hf_dp' in sys.modules, sum('lora' in n for n, _ in m.named_parameters()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert done.stdout.split() == ["False", "28"], done.stderr


def test_a_classifier_trains_with_its_head(hf_dp, tmp_path):
    status, out, err = hf_dp("train", R.write_classifier(tmp_path), "privacy.public_eval=true")
    assert status == 0, err
    assert "accuracy" in out
    assert "not covered" not in out
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "classifier" in saved["modules_to_save"]
    from peft import AutoPeftModelForSequenceClassification
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as weights:
        assert any("classifier" in name for name in weights.keys())  # noqa: SIM118 (no mapping)
    classes = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert sorted(classes) == ["0", "1"]
    assert f"num_labels={len(classes)}" in out
    AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=len(classes))


def test_preferences_train_with_the_pair_as_the_unit(hf_dp, tmp_path):
    pytest.importorskip("trl", reason="trl is not installed")
    recipe = R.write_preferences(tmp_path)
    status, out, err = hf_dp("train", recipe, "training.micro_batch_tokens=64")
    assert status == 0, err
    assert "unit: one pair of answers" in " ".join(out.split())
    assert "rewards" in out
    assert "margins" in out
    assert hf_dp("verify", tmp_path / "out")[0] == 0
    wrong = R.write_preferences(tmp_path, data__max_length=None, data__label="good")
    status, _, err = hf_dp("check", wrong)
    assert status == 2
    assert "data.max_length: missing; the task preference needs it" in err
    assert "data.label: not for the task preference" in err


def test_full_fine_tuning_without_a_validation_set(hf_dp, tmp_path):
    overrides = ["lora=null", "data.validation=null", "training.micro_batch_tokens=40"]
    status, out, err = hf_dp("train", R.write(tmp_path), *overrides)
    assert status == 0, err
    assert "On the validation set" not in out
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_without_noise_it_says_so(hf_dp, tmp_path):
    _, out, _ = hf_dp("train", R.write(tmp_path), "privacy.target_epsilon=null", "privacy.noise_multiplier=0.0")
    assert "NOT PRIVATE: epsilon is infinite" in out


def test_check_shows_every_parameter_trains_nothing_and_leaves_nothing(hf_dp, tmp_path, monkeypatch):
    recipe = R.write(tmp_path)
    before = files(tmp_path)
    monkeypatch.chdir(tmp_path)
    status, out, err = hf_dp("check", recipe, "training.output_dir=out/deep")
    assert status == 0, err
    assert files(tmp_path) == before
    assert "layers.0-1.self_attn.q_proj.lora_A" in out
    assert "28 trainable tensors" in out
    assert "data.train: 40 records of mr (text), ref (text)" in out
    assert "WARNING (shown here alone): 40 of 40 records have the words of another record's" in " ".join(out.split())
    assert "noise multiplier sigma" in out
    assert "Self-check passed" in out


def test_check_of_a_classifier_lists_the_head(hf_dp, tmp_path):
    _, out, _ = hf_dp("check", R.write_classifier(tmp_path))
    assert "classifier.modules_to_save.default.weight" in out
    assert "classifier.modules_to_save.default.bias" in out


def test_check_says_which_way_of_drawing_peoples_records_has_the_least_noise(hf_dp, tmp_path):
    few = ["privacy.unit_column=mr", "privacy.expected_batch_size=2", "privacy.target_delta=0.01"]
    status, out, err = hf_dp("check", R.write(tmp_path), *few, "training.max_steps=2")
    assert status == 0, err
    assert "Ways to draw (shown here alone): equal epsilon, steps, records a step" in out
    for setting in ("records_per_unit=1", "contribution_bound=4"):
        assert setting in out


def test_check_of_records_with_several_owners_says_what_each_bound_keeps(hf_dp, tmp_path):
    recipe = R.write(tmp_path)
    users = [["ann", "bob"], ["ann"], ["bob", "cid"], ["cid"]] * 10
    lines = [{**note, "users": names} for note, names in zip(R.notes(40), users, strict=True)]
    R.write_lines(tmp_path / "train.jsonl", lines)
    asked = ["privacy.unit_column=users", "privacy.expected_batch_size=2", "privacy.target_delta=0.01"]
    status, _, err = hf_dp("check", recipe, *asked, "training.max_steps=2")
    assert status == 2
    assert "set contribution_bound=G, and leave records_per_unit out" in " ".join(err.split())
    status, out, err = hf_dp("check", recipe, *asked, "privacy.contribution_bound=4", "training.max_steps=2")
    assert status == 0, err
    words = " ".join(out.split())
    assert "who owns which record is fixed and not protected" in words
    assert "records_per_unit" not in words
    for bound in (1, 4, 16):
        assert f"contribution_bound={bound}" in words
    assert not {"ann", "bob", "cid"} & {*words.split()}


def test_check_takes_split_documents(hf_dp, tmp_path):
    """Each is a unit of its own, which no column of the data names."""
    status, out, err = hf_dp("check", R.write(tmp_path), "data.split=chunks", "data.max_length=16")
    assert status == 0, err
    assert "Ways to draw" not in out
    assert "Self-check passed" in out


# ---- what does not ---------------------------------------------------------------------------------------------------

MISTAKES = {
    "a typo": (["training.learning_rat=1"], "did you mean 'learning_rate'?"),
    "a missing file": (["data.train=gone.jsonl"], "the file gone.jsonl does not exist"),
    "an unknown column": (["data.target={reff}"], "no column 'reff' (there are 'mr', 'ref'); did you mean 'ref'?"),
    "an unknown column, and rows too long": (["data.target={reff}", "data.max_length=64"], "no column 'reff'"),
    "an unknown validation column": (["data.validation=OTHER"], "data.prompt on data.validation: no column 'mr'"),
    "both": (["privacy.noise_multiplier=1"], "exactly one of target_epsilon and noise_multiplier (got both)"),
    "neither": (["privacy.target_epsilon=null"], "exactly one of target_epsilon and noise_multiplier (got neither)"),
    "fp16": (["training.fp16=true"], "use bf16=True or float32"),
    "accumulation": (["training.gradient_accumulation_steps=8"], "choose the logical batch with expected_batch_size"),
    "an epsilon out of reach": (["privacy.target_epsilon=1e-12", "privacy.target_delta=1e-12"], "out of reach"),
    "a batch above N": (["privacy.expected_batch_size=41"], "at most the number of examples, 40"),
    "no model there": (["model.name=../gone/base"], "the folder ../gone/base does not exist"),
    "no network": (["model.name=nobody/nothing"], "check the name and the network"),
    "no such modules": (["lora.target_modules=[nothing]"], "lora: peft refuses"),
    "a malformed line": (["data.train=BROKEN"], "line 2: "),
    "an empty file": (["data.train=EMPTY"], "holds no records"),
    "an override that is none": (["training"], "expected section.key=value"),
    "transformers says no": (["training.eval_strategy=steps", "data.validation=null"], "eval"),
    "no budget": (["privacy.budget_file=gone.json"], "creates one"),
    "rows too long": (["data.max_length=64"], "at most 32, which the model takes; got 64"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_a_few_lines_and_leaves_nothing(mistake, hf_dp, tmp_path, monkeypatch):
    overrides, message = MISTAKES[mistake]
    recipe = R.write(tmp_path)
    R.write_lines(tmp_path / "OTHER.jsonl", [{"ref": "x"}])
    (tmp_path / "BROKEN.jsonl").write_text('{"mr": "a", "ref": "b"}\n{"mr": \n')
    (tmp_path / "EMPTY.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    overrides = [o + ".jsonl" if o.endswith(("OTHER", "BROKEN", "EMPTY")) else o for o in overrides]
    status, out, err = hf_dp("train", recipe, "training.output_dir=new/deep/out", *overrides)
    said = err[err.index("hf-dp: ") :]
    assert status == 2
    assert message in said
    assert len(said.splitlines()) <= 4
    assert "Traceback" not in err + out
    assert files(tmp_path) == before


@pytest.mark.slow
def test_a_recipe_draws_on_a_budget_until_it_is_spent(hf_dp, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe, drawing = R.write(tmp_path), "privacy.budget_file=all.json"
    assert hf_dp("budget", "all.json", "--target-epsilon", "9", "--target-delta", "0.017")[0] == 0
    status, out, _ = hf_dp("check", recipe, drawing)
    assert status == 0
    assert "all.json has room for this plan: 0 runs and this one would come to epsilon 7." in out.replace("\n", " ")
    assert hf_dp("train", recipe, drawing)[0] == 0
    left = files(tmp_path)
    status, _, err = hf_dp("check", recipe, drawing)
    assert (status, "does not hold this run" in err) == (2, True)
    status, _, err = hf_dp("train", recipe, drawing, "training.output_dir=second")
    assert status == 2
    assert "does not hold this run. Of epsilon 9 at delta 0.017" in err
    assert files(tmp_path) == left
    assert hf_dp("budget", "all.json")[1].count("ended") == 1


def test_a_folder_with_a_ledger_is_left_alone(hf_dp, tmp_path):
    recipe = R.write(tmp_path)
    assert hf_dp("train", recipe)[0] == 0
    left = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    status, _, err = hf_dp("train", recipe)
    assert status == 2
    assert "holds the ledger of another training. Choose another folder (training.output_dir=FOLDER)" in err
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == left


@pytest.mark.slow
def test_resuming_a_finished_run_says_that_the_budget_is_spent(hf_dp, tmp_path):
    recipe = R.write(tmp_path, training__save_strategy="steps", training__save_steps=1)
    assert hf_dp("train", recipe)[0] == 0
    status, _, err = hf_dp("train", recipe, "training.resume_from_checkpoint=true")
    assert status == 2
    assert "the budget is spent: epsilon 7.99" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "line 2, column 1: expected YAML"),
        ("a: 1\n", "there is no such section"),
        ("", "expected a mapping"),
    ],
)
def test_wrong_yaml(text, message, hf_dp, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    status, _, err = hf_dp("check", tmp_path / "r.yaml")
    assert status == 2
    assert message in err


def test_unknown_verbs_and_missing_arguments(hf_dp):
    assert hf_dp("tran", "x")[0] == 2
    status, _, err = hf_dp("train")
    assert status == 2
    assert "RECIPE" in err.upper()
    status, out, _ = hf_dp("--help")
    assert status == 0
    assert all(verb in out for verb in ("train", "check", "plan"))


@pytest.mark.parametrize("saved", [True, False])
def test_ctrl_c_says_what_is_charged_and_how_to_go_on(hf_dp, tmp_path, monkeypatch, saved):
    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(MetricsFile, "on_step_begin", interrupt)
    settings = ["training.max_steps=4", *(["training.save_strategy=steps", "training.save_steps=1"] if saved else [])]
    status, _, err = hf_dp("train", R.write(tmp_path), *settings)
    assert status == 130
    assert f"Interrupted: 2 steps are charged in {tmp_path / 'out'}" in err
    assert ("resume with training.resume_from_checkpoint=true" in err) == saved
    assert ("there is no checkpoint to resume from" in err) != saved
    if saved:
        monkeypatch.setattr(MetricsFile, "on_step_begin", TrainerCallback.on_step_begin)
        assert hf_dp("train", tmp_path / "toy.yaml", *settings, "training.resume_from_checkpoint=true")[0] == 0
