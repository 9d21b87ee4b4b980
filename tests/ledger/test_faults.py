"""Whole runs under kills, full disks, bad numbers, interruptions and edited files: guarantee and checkpoints stay."""

import contextlib
import json
import math
import os
import pickle
import resource
import signal
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_dp.accounting.epsilon import spent
from hf_dp.errors import CaptureError, LedgerError
from hf_dp.ledger.checkpoints import COMPLETE
from hf_dp.ledger.ledger import LEDGER_NAME, read_ledger
from hf_dp.mechanism import Segment
from hf_dp.sampling.microbatch import micro_batches
from hf_dp.step.run import PrivateRun
from tests.support import models as M
from tests.support import reference, runs
from tests.support.campaign import FAULTS, campaign
from tests.support.children import KILLED, in_child

slow = partial(pytest.param, marks=pytest.mark.slow)
PRIVATE = {"noise_multiplier": 1.0, "target_delta": 1e-3, "expected_batch_size": 8}
SAVING = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 0.01, "max_steps": 4}


class At(TrainerCallback):
    """Does something when an event of a step comes."""

    def __init__(self, event: str, step: int, act: Any) -> None:
        self.event, self.step, self.act = event, step, act

    def _when(self, event: str, state: Any) -> None:
        if event == self.event and state.global_step == self.step:
            self.act()

    def on_step_begin(self, args: Any, state: Any, control: Any, **k: Any) -> None:
        self._when("begin", state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **k: Any) -> None:
        self._when("released", state)

    def on_step_end(self, args: Any, state: Any, control: Any, **k: Any) -> None:
        self._when("end", state)

    def on_save(self, args: Any, state: Any, control: Any, **k: Any) -> None:
        self._when("saved", state)


def train(folder: Path, privacy: dict[str, Any] | None = None, *, resume: bool = False, **settings: Any) -> Any:
    trainer = runs.trainer(folder, None, privacy or PRIVATE, **{**SAVING, **settings})
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def charged(folder: Path) -> int:
    return read_ledger(folder / LEDGER_NAME).num_steps


# ---- the campaign of scripts/faults, in short ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_short_campaign_of_faults_is_clean(fault: str, tmp_path: Path) -> None:
    *_, count = campaign(fault, tmp_path, times=3 if "KILL" in fault else 1, seed=1)
    assert count.planted
    assert count.clean(), count


# ---- F1 in a whole run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["begin", slow("released"), slow("end"), slow("saved")])
def test_a_kill_in_the_middle_of_training_hides_no_step_and_resuming_goes_on(event: str, tmp_path: Path) -> None:
    step = 3 if event in ("end", "saved") else 2
    status = in_child(
        lambda: train(tmp_path, callbacks=[At(event, step, lambda: os.kill(os.getpid(), signal.SIGKILL))])
    )
    assert status == KILLED
    released = {"begin": 2, "released": 3, "end": 3, "saved": 3}[event]
    assert charged(tmp_path) == released
    trainer = train(tmp_path, resume=True)
    assert trainer.state.global_step == 4
    repeated = {"begin": 2, "released": 2, "end": 2, "saved": 3}[event]  # the newest whole checkpoint
    assert charged(tmp_path) == released + 4 - repeated == trainer.privacy_spent().num_steps


# ---- F7: a disk that fills up while a checkpoint is saved ------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_while_saving_leaves_the_older_checkpoint_and_the_count(tmp_path: Path) -> None:
    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))  # the ledger fits, the weights do not

    assert in_child(lambda: train(tmp_path, callbacks=[At("end", 2, fill)])) == 1
    assert (tmp_path / "checkpoint-1" / COMPLETE).is_file()
    assert not (tmp_path / "checkpoint-2" / COMPLETE).exists()
    assert charged(tmp_path) == 2
    trainer = train(tmp_path, resume=True)
    assert trainer.state.global_step == 4
    assert charged(tmp_path) == 2 + 3


# ---- F10: examples that are no numbers -------------------------------------------------------------------------------

LAYERS = [
    "model.embed_tokens",
    "model.layers.0.self_attn",
    "model.layers.0.mlp",
    "model.layers.1",
    "model.norm",
    "lm_head",
]


def gradient_of(folder: Path, model: nn.Module, rows: list[dict[str, Any]], count: int) -> tuple[Tensor, int]:
    """The released sum over B of one noiseless step on all rows, and what was charged. B stays `count`."""
    seen: list[Tensor] = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **k: Any) -> None:
            seen.append(torch.cat([p.grad.flatten() for p in reference.trainable(model).values()]))

    privacy = {**runs.NOISELESS, "expected_batch_size": len(rows)}
    trainer = runs.trainer(folder, model, privacy, train_dataset=runs.Dataset.from_list(rows), callbacks=[Look()])
    trainer.train()
    return seen[0] * (len(rows) / count), trainer.privacy_spent().num_steps


QUICK = {("model.layers.0.mlp", math.inf), ("lm_head", math.nan)}


@pytest.mark.parametrize(
    ("layer", "bad"),
    [
        (layer, bad) if (layer, bad) in QUICK else slow(layer, bad)
        for layer in LAYERS
        for bad in (math.nan, math.inf, 1e38)
    ],
)
def test_an_example_that_is_no_number_counts_as_zero(layer: str, bad: float, tmp_path: Path) -> None:
    good = [r for r in runs.text_rows(12).to_list() if M.MARK not in r["input_ids"]]
    ill = {"input_ids": [5, M.MARK, 7, 8], "attention_mask": [1] * 4, "labels": [-100, M.MARK, 7, 8]}
    with_it, charge = gradient_of(tmp_path / "a", M.poisoned(layer, bad), [*good[:3], ill, *good[3:]], len(good) + 1)
    without, other_charge = gradient_of(tmp_path / "b", M.poisoned(layer, bad), good, len(good) + 1)
    assert bool(with_it.isfinite().all())
    assert charge == other_charge == 1
    moved = float((with_it - without).norm()) * (len(good) + 1) / 0.1  # in units of C
    assert moved <= 1 + 1e-4  # float32
    if bad != 1e38:  # what is finite may be clipped and counted; the rest is gone
        assert moved < 1e-4


def test_an_example_without_targets_or_with_one_token_is_an_example(tmp_path: Path) -> None:
    rows = runs.text_rows(6).to_list()
    rows += [{"input_ids": [5], "attention_mask": [1], "labels": [5]}]
    rows += [{"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [-100, -100]}]
    torch.manual_seed(0)
    with_them, _ = gradient_of(tmp_path / "a", M.with_lora(M.llama), rows, 8)
    torch.manual_seed(0)
    without, _ = gradient_of(tmp_path / "b", M.with_lora(M.llama), rows[:6], 8)
    assert float((with_them - without).norm()) < 1e-6 * float(without.norm())  # nothing to predict: a gradient of zero


def test_a_record_too_long_for_the_model_stops_training_and_the_step_counts(tmp_path: Path) -> None:
    """Who tokenises the records cuts them; here nothing of the step leaves, and what it might have cost is charged."""
    rows = [*runs.text_rows(6).to_list(), {name: [5] * 33 for name in ("input_ids", "attention_mask", "labels")}]

    def longer(features: list[dict[str, Any]]) -> dict[str, Tensor]:  # which a look through the records can't tell
        return runs.collate([{n: v * 2 if len(v) == 33 else v for n, v in f.items()} for f in features])

    privacy = {**PRIVATE, "expected_batch_size": 7}
    data = {"train_dataset": runs.Dataset.from_list(rows), "data_collator": longer}
    trainer = runs.trainer(tmp_path, M.with_lora(M.gpt2), privacy, **data)
    before = {name: p.clone() for name, p in reference.trainable(trainer.model).items()}
    with pytest.raises(CaptureError, match="could not be brought to a loss"):  # the model has 64 positions
        trainer.train()
    assert charged(tmp_path) == 1
    assert all(torch.equal(p, before[name]) for name, p in reference.trainable(trainer.model).items())
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["_privacy_fingerprint.key", LEDGER_NAME]


def test_a_data_set_of_one_record(tmp_path: Path) -> None:
    """Q = 1, its gradient clipped to C, and the noise is all that hides it."""
    privacy = {"target_epsilon": 3.0, "target_delta": 1e-3, "expected_batch_size": 1}
    trainer = train(tmp_path, privacy, train_dataset=runs.text_rows(1), max_steps=3)
    assert trainer.mechanism.sample_rate == 1
    assert trainer.privacy_spent().num_steps == charged(tmp_path) == 3
    exact = spent([Segment(1.0, trainer.mechanism.noise_multiplier, 3)], 1e-3).epsilon
    assert 2.9 < trainer.privacy_spent().epsilon == exact <= 3.0


@pytest.mark.slow
def test_one_record_many_times_counts_each_time(tmp_path: Path) -> None:
    """The unit is the record. A copy is another record, clipped by itself: k copies move the sum by at most k C."""
    row = runs.text_rows(1).to_list()
    torch.manual_seed(0)
    once, _ = gradient_of(tmp_path / "a", M.with_lora(M.llama), row, 1)
    torch.manual_seed(0)
    often, _ = gradient_of(tmp_path / "b", M.with_lora(M.llama), row * 3, 1)
    assert float((often - 3 * once).norm()) < 1e-5 * float(once.norm())  # float32
    assert float(often.norm()) == pytest.approx(3 * 0.1, rel=1e-5)  # C = 0.1, and each of them is clipped


# ---- F16: another place ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_whose_folder_was_moved_goes_on(tmp_path: Path) -> None:
    interrupted(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    trainer = train(tmp_path / "there", resume=True, max_steps=3)
    assert trainer.state.global_step == trainer.privacy_spent().num_steps == charged(tmp_path / "there") == 3


# ---- F11: empty draws ------------------------------------------------------------------------------------------------


def test_empty_draws_are_charged_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes: list[int] = []
    rows = runs.text_rows(600)

    class Watched(runs.DPTrainer):
        def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
            sizes.append(sum(len(m["labels"]) for m in micro_batches(inputs)))
            return super().training_step(model, inputs, num_items_in_batch)

    config = runs.PrivacyConfig(noise_multiplier=1.0, expected_batch_size=1, target_delta=1e-4)
    settings = {"train_dataset": rows, "data_collator": runs.collate, "privacy": config}
    args = runs.arguments(tmp_path, max_steps=12, learning_rate=0.01, logging_strategy="no")
    trainer = Watched(M.with_lora(M.llama), args, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert len(sizes) == trainer.privacy_spent().num_steps == charged(tmp_path) == 12
    assert 0 in sizes  # fails by chance once in 400,000 runs: none of 12 is empty with probability 0.63**12
    told = [str(w.message) for w in caught if "empty" in str(w.message).lower() or "batch" in str(w.message).lower()]
    assert told == []
    assert "empty" not in capsys.readouterr().err.lower()


# ---- F14: edited settings and files ----------------------------------------------------------------------------------


class Stop(Exception):
    pass


def _stop() -> None:
    raise Stop


def interrupted(folder: Path, **settings: Any) -> None:
    """Two steps and two checkpoints, then an exception."""
    with pytest.raises(Stop):
        train(folder, callbacks=[At("begin", 2, _stop)], **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"noise_multiplier": 2.0}, (8 / 24, 2.0, 0.1, 8, 2)),
        slow({"clip_norm": 0.7}, (8 / 24, 1.0, 0.7, 8, 2)),
        slow({"expected_batch_size": 12}, (0.5, 1.0, 0.1, 12, 2)),
    ],
)
def test_changed_settings_are_a_segment_and_are_composed(
    changed: dict[str, Any], expected: tuple[float, ...], tmp_path: Path
) -> None:
    interrupted(tmp_path)
    trainer = train(tmp_path, {**PRIVATE, **changed}, resume=True)
    record = read_ledger(tmp_path / LEDGER_NAME)
    assert [s[:5] for s in record.executed] == [(8 / 24, 1.0, 0.1, 8, 2), expected]
    begun = [Segment(8 / 24, 1.0, 4)]  # ended by an exception after two of them
    assert trainer.privacy_spent().epsilon == max(spent(s, 1e-3).epsilon for s in (begun, record.segments))
    assert json.loads((tmp_path / "checkpoint-4" / COMPLETE).read_text())["ledger_head"] == record.head


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"target_delta": 1e-4}, "delta"), slow({"debug_seed": 1}, "debug"), slow({}, "num_examples")],
)
def test_a_changed_promise_is_refused(changed: dict[str, Any], named: str, tmp_path: Path) -> None:
    interrupted(tmp_path)
    before = (tmp_path / LEDGER_NAME).read_bytes()
    settings = {"train_dataset": runs.text_rows(23)} if named == "num_examples" else {}
    with pytest.raises(LedgerError, match=f"{named}: the ledger has"):
        train(tmp_path, {**PRIVATE, **changed}, resume=True, **settings)
    assert (tmp_path / LEDGER_NAME).read_bytes() == before


@pytest.mark.slow
def test_an_edited_trainer_state_cannot_hide_steps(tmp_path: Path) -> None:
    interrupted(tmp_path)
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["global_step"], state["log_history"] = 0, []
    path.write_text(json.dumps(state))
    trainer = train(tmp_path, resume=True)
    assert trainer.privacy_spent().num_steps == charged(tmp_path) == 2 + 4


def test_an_edited_checkpoint_copy_or_marker_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path)
    copy = tmp_path / "checkpoint-2" / LEDGER_NAME
    copy.write_bytes(copy.read_bytes().replace(b'"noise_multiplier":1.0', b'"noise_multiplier":9.0'))
    with pytest.raises(LedgerError, match=r"checkpoint-2.*line 2: expected hash"):
        train(tmp_path, resume=True)


@pytest.mark.slow
def test_a_resumed_run_has_fresh_noise_and_fresh_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replayed noise would subtract away: no two steps of any session have any in common, at any step number."""
    noises, keys = [], []
    release, opened = PrivateRun.release, PrivateRun.open

    def noted(self: PrivateRun, clipped_sum: Tensor, draw_number: int) -> Tensor:
        part = clipped_sum.clone()
        noisy = release(self, clipped_sum, draw_number)
        noises.append(noisy - part)
        return noisy

    monkeypatch.setattr(PrivateRun, "release", noted)

    def noted_open(*a: Any) -> PrivateRun:
        run = opened(*a)
        keys.append(run.sampling_key)
        return run

    monkeypatch.setattr(PrivateRun, "open", noted_open)
    interrupted(tmp_path)
    train(tmp_path, resume=True)
    assert len(noises) == 4
    assert len(set(keys)) == 2
    correlation = torch.corrcoef(torch.stack(noises)) - torch.eye(4)
    assert float(correlation.abs().max()) < 5 / math.sqrt(len(noises[0]))  # five standard errors


# ---- F17: the end of the budget --------------------------------------------------------------------------------------


def test_training_stops_before_the_step_that_would_exceed_the_target(tmp_path: Path) -> None:
    interrupted(tmp_path)  # two steps at sigma 1 that nobody planned for
    step = Segment(8 / 24, 1.0, 1)
    target = spent([step._replace(num_steps=7)], 1e-3).epsilon * 1.0001
    planned = {**PRIVATE, "noise_multiplier": None, "target_epsilon": target}
    trainer = train(tmp_path, planned, resume=True, max_steps=9)  # seven more, at the sigma of nine within the target
    record = read_ledger(tmp_path / LEDGER_NAME)
    spent_at_the_end = trainer.privacy_spent()
    assert 2 < spent_at_the_end.num_steps < 9  # in the middle: an epoch has three steps
    assert spent_at_the_end.epsilon == spent(record.segments, 1e-3).epsilon <= target
    sigma = trainer.mechanism.noise_multiplier
    assert spent([*record.segments, step._replace(joint_noise_multiplier=sigma)], 1e-3).epsilon > target


# ---- F18: interruptions ----------------------------------------------------------------------------------------------


def broken(*args: Any, **kwargs: Any) -> None:
    raise Stop


def breaking_collator(features: list[dict[str, Any]]) -> Any:
    if any(M.MARK in f["input_ids"] and len(f["input_ids"]) == 2 for f in features):
        raise Stop
    return runs.collate(features)


def interrupt(name: str, folder: Path) -> None:
    rows = runs.text_rows(24).to_list()
    rows[0] = {"input_ids": [M.MARK, M.MARK], "attention_mask": [1, 1], "labels": [-100, M.MARK]}
    settings: dict[str, Any] = {"max_steps": 40, "save_strategy": "no", "train_dataset": runs.Dataset.from_list(rows)}
    if name == "collator":
        settings["data_collator"] = breaking_collator
    elif name == "SIGINT":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
        settings["callbacks"] = [At("released", 3, lambda: os.kill(os.getpid(), signal.SIGINT))]
    elif name in ("begin", "released", "end"):
        settings["callbacks"] = [At(name, 3, broken)]
    trainer = runs.trainer(folder, None, PRIVATE, **{**SAVING, **settings})
    if name == "forward":
        begun = folder / LEDGER_NAME  # what is looked at beforehand passes
        trainer.model.register_forward_pre_hook(lambda *a: broken() if begun.exists() else None)
    trainer.train()


@pytest.mark.parametrize("name", ["collator", slow("forward"), slow("begin"), slow("released"), slow("end"), "SIGINT"])
def test_an_interruption_is_charged_leaves_nothing_private_and_lets_go_of_the_ledger(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[int] = []
    release = PrivateRun.release
    monkeypatch.setattr(PrivateRun, "release", lambda *a: (released.append(1), release(*a))[1])
    fails = name in ("forward", "collator")  # that a pass or the collator fails tells of its draw, so it is charged
    with pytest.raises(CaptureError if fails else (Stop, KeyboardInterrupt)):
        interrupt(name, tmp_path)
    assert charged(tmp_path) == len(released) + fails
    assert len(released) >= {"begin": 3, "released": 4, "end": 3, "SIGINT": 4}.get(name, 0)
    left = sorted(p.name for p in tmp_path.rglob("*") if p.is_file())
    assert left == ["_privacy_fingerprint.key", LEDGER_NAME]
    assert in_child(lambda: _reopen(tmp_path)) == 0


def _reopen(folder: Path) -> None:
    from hf_dp.ledger.ledger import Ledger

    Ledger.open(folder / LEDGER_NAME, read_ledger(folder / LEDGER_NAME).header).close()


def test_sigterm_ends_the_process_and_the_steps_are_counted(tmp_path: Path) -> None:
    status = in_child(
        lambda: train(tmp_path, callbacks=[At("released", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    )
    assert status == -signal.SIGTERM
    assert charged(tmp_path) == 3


def test_the_model_can_be_used_after_an_exception(tmp_path: Path) -> None:
    """No stand-ins are left in it, and its next gradient is a plain one."""
    model = M.with_lora(M.llama)
    with pytest.raises(Stop):
        runs.trainer(tmp_path, model, PRIVATE, callbacks=[At("released", 0, broken)]).train()
    model.zero_grad()
    reference.causal_lm_loss(model, runs.collate([runs.text_rows(1)[0]])).backward()
    assert all(p.grad is not None for p in reference.trainable(model).values())
    model.save_pretrained(tmp_path / "saved")


# ---- F19: files that would run as code -------------------------------------------------------------------------------


class Sentinel:
    """Pickled code that leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return (partial(Path.write_text, Path(self.path)), ("executed",))


@pytest.mark.parametrize(
    "name",
    ["rng_state.pth", *map(slow, ("optimizer.pt", "scheduler.pt", "training_args.bin", "pytorch_model.bin"))],
)
def test_a_malicious_pickle_in_a_checkpoint_is_not_executed(name: str, tmp_path: Path) -> None:
    out, sentinel = tmp_path / "out", tmp_path / "executed"
    interrupted(out)
    for content in (pickle.dumps(Sentinel(sentinel)), _saved_by_torch(Sentinel(sentinel), tmp_path)):
        (out / "checkpoint-2" / name).write_bytes(content)
        with contextlib.suppress(pickle.UnpicklingError):  # torch's refusal; files that nobody reads are let pass
            train(out, resume=True, max_steps=2)
        assert not sentinel.exists()
    pickle.loads(pickle.dumps(Sentinel(sentinel)))
    assert sentinel.exists()  # it would have worked


def _saved_by_torch(value: Any, folder: Path) -> bytes:
    torch.save({"state": value}, folder / "made.pt")
    return (folder / "made.pt").read_bytes()
