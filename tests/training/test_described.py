"""What a training tells its card, and that nothing which somebody wrote is lost when Trainer makes a card."""

import json
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers

from hf_dp.training.described import described, license_of, save_classes
from hf_dp.training.progress import EpsilonProgress, print_summary
from tests.support import models as M
from tests.support import runs

OWN = "It purrs."


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with an evaluation on data declared public, and its card."""
    privacy = {"target_epsilon": 8.0, "target_delta": 1e-3, "public_eval": True}
    folder = tmp_path_factory.mktemp("described") / "notes"
    trainer = runs.trainer(folder, None, privacy, max_steps=1, eval_dataset=runs.text_rows(6), learning_rate=1e-3)
    trainer.about["training data"] = "Clinic notes | 2024"
    trainer.about["evaluation data"] = "me/held-out"
    trainer.train()
    trainer.save_model()
    return trainer


def test_the_card_tells_settings_and_after_an_evaluation_its_results(trained):
    readme = Path(trained.args.output_dir) / "README.md"
    assert "## Results" not in readme.read_text()
    found = trained.evaluate()
    trained.write_card()
    text = readme.read_text()
    for row in ("| training data | Clinic notes \\| 2024 |", "| learning rate | 0.001, constant |", "| steps | 1 |"):
        assert row in text
    assert f"| loss | {found['eval_loss']:.4g} |" in text
    assert "name: me/held-out" in text
    assert "runtime" not in text.partition("## Privacy")[0]


def test_results_on_other_data_or_of_other_weights_are_not_stated(trained):
    trained.evaluate()
    assert "loss" in described(trained).results
    trained.state.global_step += 1
    try:
        assert described(trained).results == {}
    finally:
        trained.state.global_step -= 1
    trained.evaluate(runs.text_rows(4))  # not the trainer's own, so nobody declared it public
    assert described(trained).results == {}


def test_trainers_card_takes_nothing_away_that_somebody_wrote(trained):
    readme = Path(trained.args.output_dir) / "README.md"
    readme.write_text(f"{readme.read_text()}\n## Limits\n\n{OWN}\n")
    for _ in range(2):
        trained.create_model_card(license="mit")
        text = readme.read_text()
        assert text.count(OWN) == 1
        assert text.count("## How to use it") == 1
        assert "More information needed" not in text
        assert "license: mit" in text
    readme.unlink()
    trained.create_model_card()
    assert "## How to use it" in readme.read_text()
    assert "More information needed" not in readme.read_text()


def test_the_plan_can_be_silenced_and_says_what_it_is_without_noise(trained, capsys, monkeypatch):
    print_summary(trained)
    said = capsys.readouterr().out
    assert "noise : signal" in said
    assert "learning rate" in said
    monkeypatch.setattr(trained.args, "log_level", "error")
    print_summary(trained)
    assert capsys.readouterr().out == ""


def test_a_line_of_the_log_is_for_people():
    bar = EpsilonProgress()
    lines, ends = [], []
    bar.training_bar = SimpleNamespace(write=lines.append, set_postfix_str=ends.append)
    logs = {"learning_rate": 1.23456e-3, "epsilon": 3.14159, "note": "x" * 1000, "total_flos": 12.0}
    bar.on_log(None, SimpleNamespace(global_step=20, is_world_process_zero=True), None, logs)
    assert lines == [f"step 20: learning_rate 0.001235, epsilon 3.142, note {'x' * 100}"]
    assert ends == ["epsilon 3.142"]


def test_the_licence_is_the_bases_where_its_card_is_here(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    assert license_of(str(tmp_path)) == "apache-2.0"
    for text in ("# Base\n", "---\nlicense: [a, b]\n---\n", "---\na: [\n---\n", "---\n"):
        (tmp_path / "README.md").write_text(text)
        assert license_of(str(tmp_path)) == ""
    assert license_of("nobody/nothing-here") == license_of("") == ""


@pytest.mark.parametrize(("task", "names"), [("SEQ_CLS", 5), ("CAUSAL_LM", 0)])
def test_a_classifiers_adapter_has_the_names_of_its_classes_beside_it(task, names, tmp_path):
    model = peft.get_peft_model(M.bert() if names else M.llama(), peft.LoraConfig(r=2, task_type=task))
    base = model.get_base_model()
    assert isinstance(base, transformers.PreTrainedModel)
    save_classes(SimpleNamespace(model=model, _base_model=lambda: base), tmp_path)
    path = tmp_path / "classes.json"
    assert path.is_file() == bool(names)
    assert not names or len(json.loads(path.read_text())) == names


def test_a_module_without_a_config_is_described_too(trained, monkeypatch):
    monkeypatch.setattr(trained, "_base_model", lambda: torch.nn.Linear(2, 2))
    found = described(trained)
    assert (found.base, found.license) == ("", "")
    assert found.rows["learning rate"] == "0.001, constant"
