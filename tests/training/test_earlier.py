"""Weights that were trained privately before: the same records are refused, others are told in plan and card."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from hf_dp import ConfigError, PrivateLoop
from hf_dp.training import earlier
from hf_dp.training.earlier import EARLIER, UNKNOWN
from tests.support import models as M
from tests.support import runs
from tests.training.test_loop import DATA, losses, mechanism

PRIVATE = {"noise_multiplier": 1.0, "target_delta": 1e-5}


def trained(folder: Path, **given: Any) -> Any:
    trainer = runs.trainer(folder, privacy=PRIVATE, **given)
    trainer.train()
    return trainer


def test_a_training_goes_on_in_its_folder_alone(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "a")
    trainer.args.output_dir = str(tmp_path / "b")
    with pytest.raises(ConfigError, match=r"trained on these records before.*go on with output_dir=.*a'"):
        trainer.train()
    assert not list((tmp_path / "b").rglob("*.jsonl"))
    trainer.args.output_dir = str(tmp_path / "a")
    trainer.train()
    assert trainer.privacy_spent().num_steps == 2 * trainer.state.max_steps


@pytest.mark.parametrize("again", ["the same object", "read again"])
def test_another_trainer_of_the_same_weights_and_records_is_refused(again: str, tmp_path: Path) -> None:
    runs.text_rows().save_to_disk(tmp_path / "rows")
    rows = load_from_disk(tmp_path / "rows")
    first = trained(tmp_path / "a", train_dataset=rows)
    rows = rows if again == "the same object" else load_from_disk(tmp_path / "rows")
    second = runs.trainer(tmp_path / "b", model=first.model, privacy=PRIVATE, train_dataset=rows)
    with pytest.raises(ConfigError, match="or load the model anew"):
        second.train()
    trained(tmp_path / "c", train_dataset=rows)  # the remedy


def test_other_records_are_told_in_plan_and_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = trained(tmp_path / "a")
    others = runs.text_rows().select(range(23))
    second = runs.trainer(
        tmp_path / "b",
        model=first.model,
        privacy={**PRIVATE, "expected_batch_size": 23},
        train_dataset=others,
        log_level="info",
    )
    second.train()
    told = f"epsilon {first.privacy_spent().epsilon:.4g} at delta 1e-05 for a record"
    assert told in " ".join(capsys.readouterr().out.split())
    second.save_model()
    card = (tmp_path / "b" / "README.md").read_text()
    assert EARLIER in card
    assert f"{told}; it adds to this one for whoever is in both" in card


def test_a_private_base_on_the_disk_is_told(tmp_path: Path) -> None:
    base = trained(tmp_path / "base", model=M.llama())
    base.save_model()
    model = M.llama().from_pretrained(tmp_path / "base")
    privacy = {**PRIVATE, "expected_batch_size": 23}
    second = runs.trainer(
        tmp_path / "b", model=model, privacy=privacy, train_dataset=runs.text_rows().select(range(23))
    )
    second.train()
    assert second.about[EARLIER].startswith(f"epsilon {base.privacy_spent().epsilon:.4g} at delta")
    fresh = trained(tmp_path / "c", model=M.llama())
    assert EARLIER not in fresh.about


def merged(first: Any) -> nn.Module:
    return get_peft_model(first.model.merge_and_unload(), LoraConfig(target_modules=["q_proj"]))


def with_its_state(first: Any) -> nn.Module:
    model = M.with_lora(M.llama)
    model.load_state_dict(first.model.state_dict())
    return model


def loaded(first: Any) -> nn.Module:
    first.save_model()
    model: nn.Module = PeftModel.from_pretrained(M.llama(), first.args.output_dir, is_trainable=True)
    return model


@pytest.mark.parametrize("again", [merged, with_its_state, loaded, lambda first: copy.deepcopy(first.model)])
def test_the_same_weights_are_known_wherever_they_come_from(again: Callable[[Any], nn.Module], tmp_path: Path) -> None:
    rows = runs.text_rows()
    first = trained(tmp_path / "a", model=M.with_lora(M.llama), train_dataset=rows, learning_rate=0.1)
    second = runs.trainer(tmp_path / "b", model=again(first), privacy=PRIVATE, train_dataset=rows)
    with pytest.raises(ConfigError, match="trained on these records before"):
        second.train()
    trained(tmp_path / "c", model=M.with_lora(M.llama), train_dataset=rows)


def test_another_adapter_on_the_base_as_it_was_is_new(tmp_path: Path) -> None:
    rows = runs.text_rows()
    first = trained(tmp_path / "a", model=M.with_lora(M.llama), train_dataset=rows, learning_rate=0.1)
    model = get_peft_model(first.model.unload(), LoraConfig(target_modules=["q_proj"]))
    assert EARLIER not in trained(tmp_path / "b", model=model, train_dataset=rows).about


def test_an_adapter_that_was_loaded_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trained(tmp_path / "a", model=M.with_lora(M.llama))
    first.save_model()
    monkeypatch.setattr(earlier, "_TRAINED", [])  # as in another process
    model = PeftModel.from_pretrained(M.llama(), tmp_path / "a", is_trainable=True)
    second = runs.trainer(tmp_path / "b", model=model, privacy=PRIVATE)
    second.train()
    second.save_model()
    assert f"{UNKNOWN}; it adds to this one" in (tmp_path / "b" / "README.md").read_text()
    for init in (True, "gaussian", "pissa"):
        adapter = LoraConfig(target_modules=["q_proj"], init_lora_weights=init)
        fresh = trained(tmp_path / str(init), model=get_peft_model(M.llama(), adapter))
        assert EARLIER not in fresh.about


def test_a_loop_on_weights_that_hold_a_training_on_the_same_records_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loop = PrivateLoop(model, optimizer, losses, mechanism(), tmp_path / "a")
    for draw in loop.draws(DATA):
        loop.backward(draw)
        optimizer.step()
    again = PrivateLoop(model, torch.optim.SGD(model.parameters(), lr=0.1), losses, mechanism(), tmp_path / "b")
    with pytest.raises(ConfigError, match="trained on these records before"):
        next(again.draws(DATA))
