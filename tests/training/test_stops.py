"""A run that ends before its plan claims its plan.

What an end, an interrupt or an older copy leaves behind is never taken for less than was spent.
"""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_dp import durable
from hf_dp.accounting.epsilon import spent
from hf_dp.accounting.plan import claimed
from hf_dp.errors import ConfigError, LedgerError, UnsupportedOptionError
from hf_dp.ledger.format import GENESIS, encode, parse
from hf_dp.ledger.ledger import LEDGER_NAME, Ledger, LedgerHeader, read_ledger
from hf_dp.mechanism import Segment
from hf_dp.randomness.noise import NoiseSource
from hf_dp.sampling.poisson import PoissonSampler
from hf_dp.training.options import check_options
from tests.support import runs
from tests.support.children import in_child, start, status_of
from tests.support.folders import failures
from tests.support.marks import quick

PRIVATE = {"noise_multiplier": 1.0, "target_delta": 1e-3, "expected_batch_size": 8}
STEP = Segment(8 / 24, 1.0, 1)
T = 40


def epsilon(steps: int) -> float:
    return spent([STEP._replace(num_steps=steps)], 1e-3).epsilon


class At(TrainerCallback):
    """Acts once at the end of a step."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **k: Any) -> None:
        if state.global_step == self.step:
            self.act(control)


def stop(control: Any) -> None:
    control.should_training_stop = True


def interrupt(control: Any) -> None:
    raise KeyboardInterrupt


def fail(control: Any) -> None:
    raise RuntimeError("out of memory")


def by_signal(number: int) -> Any:
    return lambda control: os.kill(os.getpid(), number)


def trainer(folder: Path, *callbacks: TrainerCallback, steps: int = T, **settings: Any) -> Any:
    privacy = {**PRIVATE, **settings.pop("privacy", {})}
    return runs.trainer(
        folder, None, privacy, max_steps=steps, callbacks=list(callbacks), learning_rate=0.01, **settings
    )


def stated(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "privacy.json").read_text()))


def assert_the_plan_is_claimed(folder: Path, taken: int) -> None:
    record, ledger = stated(folder), read_ledger(folder / LEDGER_NAME)
    assert (record["num_steps"], ledger.num_steps) == (taken, taken)
    assert record["epsilon"] == epsilon(T) == spent(claimed(ledger.segments, ledger.plans, 1e-3), 1e-3).epsilon
    assert record["epsilon_of_steps_taken"] == epsilon(taken) < record["epsilon"]
    assert failures(folder) == ""
    assert f"Steps taken: {taken} of {T}" in (folder / "README.md").read_text()


# ---- what a run claims that ended by its own outcome -----------------------------------------------------------------

PUBLIC = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "metric_for_best_model": "eval_loss",
    "privacy": {"public_eval": True},
}
ENDS: dict[str, tuple[TrainerCallback, type[BaseException] | None, int]] = {
    "early stopping on public evaluation": (EarlyStoppingCallback(1, early_stopping_threshold=1e9), None, 2),
    "a callback": (At(3, stop), None, 3),
    "an exception": (At(2, fail), RuntimeError, 2),
    "Ctrl-C": (At(2, interrupt), KeyboardInterrupt, 2),
}


@pytest.mark.parametrize("name", quick(("early stopping on public evaluation", "Ctrl-C"), ENDS))
def test_a_run_that_ended_early_claims_its_plan_in_ledger_card_logs_and_answer(name: str, tmp_path: Path) -> None:
    callback, error, taken = ENDS[name]
    public = {**PUBLIC, "eval_dataset": runs.text_rows(4, seed=1)} if "public" in name else {}
    run = trainer(tmp_path, callback, **public)
    if error is None:
        run.train()
    else:
        with pytest.raises(error):
            run.train()
    run.save_model()
    assert_the_plan_is_claimed(tmp_path, taken)
    assert run.privacy_spent() == (epsilon(T), 1e-3, taken)
    logged = [entry for entry in run.state.log_history if "epsilon" in entry]
    assert {entry["epsilon"] for entry in logged} == {epsilon(T)}
    assert all(entry["epsilon_of_steps_taken"] <= epsilon(taken) for entry in logged)


SIGNALS = quick((signal.SIGKILL,), [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_a_run_that_a_signal_ended_claims_its_plan(number: int, tmp_path: Path) -> None:
    def act() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        trainer(tmp_path, At(2, by_signal(number)), save_strategy="steps", save_steps=1).train()

    assert in_child(act) in (-number, 1)
    assert read_ledger(tmp_path / LEDGER_NAME).num_steps == 2
    assert_the_plan_is_claimed(tmp_path / "checkpoint-1", 1)


@pytest.mark.parametrize("target", [3.0, 8.0])
def test_a_target_is_claimed_from_the_first_step_on_and_not_before(target: float, tmp_path: Path) -> None:
    planned = {"noise_multiplier": None, "target_epsilon": target}
    run = trainer(tmp_path, At(1, stop), privacy=planned)
    assert run.privacy_spent().epsilon == 0
    run.train()
    assert 0.99 * target < run.privacy_spent().epsilon <= target


@pytest.mark.slow
def test_a_run_that_is_resumed_claims_the_costliest_of_its_plans(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, At(2, stop), **saving).train()
    shorter = trainer(tmp_path, steps=4, **saving)
    shorter.train(resume_from_checkpoint=True)
    assert shorter.privacy_spent() == (epsilon(T), 1e-3, 4)
    longer = trainer(tmp_path, At(5, stop), steps=T + 1, **saving)
    longer.train(resume_from_checkpoint=True)
    assert longer.privacy_spent() == (epsilon(T + 1), 1e-3, 5)
    longer.save_model()
    assert [plan[0]["num_steps"] for plan in stated(tmp_path)["plans"]] == [T, 4, T + 1]
    assert failures(tmp_path) == ""


def test_a_lower_target_than_an_earlier_plan_claims_is_refused(tmp_path: Path) -> None:
    saving, planned = {"save_strategy": "steps", "save_steps": 1}, {"noise_multiplier": None}
    trainer(tmp_path, At(1, stop), privacy={**planned, "target_epsilon": 8.0}, **saving).train()
    lower = trainer(tmp_path, privacy={**planned, "target_epsilon": 4.0}, **saving)
    with pytest.raises(ConfigError, match=r"the budget is spent: epsilon 7\.9"):
        lower.train(resume_from_checkpoint=True)
    assert read_ledger(tmp_path / LEDGER_NAME).num_steps == lower.privacy_spent().num_steps == 1
    assert 7.9 < lower.privacy_spent().epsilon <= 8.0


def test_a_finished_run_claims_the_steps_that_it_took(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=3)
    run.train()
    run.save_model()
    record = stated(tmp_path)
    assert record["epsilon"] == record["epsilon_of_steps_taken"] == epsilon(3)
    assert "Steps taken" not in (tmp_path / "README.md").read_text()


# ---- the ledger's plans ----------------------------------------------------------------------------------------------

HEADER = LedgerHeader(24, "record", "zero-out", 1e-3)


def steps(count: int) -> tuple[Segment, ...]:
    return (STEP._replace(num_steps=count),)


def test_a_plan_without_a_step_costs_nothing_and_one_that_goes_on_is_the_same(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / LEDGER_NAME, HEADER) as ledger:
        ledger.begin(8 / 24, 1.0, 0.1, 8)
        ledger.plan(steps(9))  # given up
        ledger.plan(steps(5))
        ledger.charge()
        ledger.charge()
        ledger.plan(steps(3))  # as before: 2 + 3
        ledger.plan(steps(7))  # given up
        assert ledger.record().plans == (steps(5),)
    again = read_ledger(tmp_path / LEDGER_NAME)
    assert again.plans == (steps(5),)
    assert [plan.after for plan in again.planned] == [0, 0, 2]


def test_a_ledger_of_version_1_is_read_and_goes_on(tmp_path: Path) -> None:
    path, head, data = tmp_path / LEDGER_NAME, GENESIS, b""
    header = {
        "kind": "header",
        "version": 1,
        "num_examples": 24,
        "unit": "record",
        "relation": "zero-out",
        "delta": 1e-3,
    }
    segment = {
        "kind": "segment",
        "sample_rate": 8 / 24,
        "noise_multiplier": 1.0,
        "clip_norm": 0.1,
        "expected_batch_size": 8,
    }
    for record in (header | {"data_fingerprint": None, "debug": False}, segment, {"kind": "step", "n": 1}):
        line, head = encode(record, head)
        data += line
    path.write_bytes(data)
    assert read_ledger(path).plans == ()
    with Ledger.open(path, HEADER) as ledger:
        ledger.plan(steps(3))
        ledger.charge()
    assert read_ledger(path).plans == (steps(4),)


@pytest.mark.parametrize(
    "planned",
    [
        None,
        {},
        [1],
        [{}],
        [{**STEP.stated(), "num_steps": 0}],
        [{**STEP.stated(), "sample_rate": 2}],
        [{**STEP.stated(), "noise": "x"}],
    ],
)
def test_nonsense_in_a_plan_is_refused_though_the_hash_is_right(planned: Any, tmp_path: Path) -> None:
    with Ledger.open(tmp_path / LEDGER_NAME, HEADER) as ledger:
        line, _ = encode({"kind": "plan", "segments": planned}, ledger.head)
    with pytest.raises(LedgerError, match="line 2"):
        parse((tmp_path / LEDGER_NAME).read_bytes() + line, "forged")


# ---- older copies ----------------------------------------------------------------------------------------------------


def put_back_all(out: Path) -> None:
    """Every ledger in the folder is that of checkpoint 1; only the checkpoints' markers say more."""
    for path in (out, *out.glob("checkpoint-*")):
        (path / "privacy.json").unlink(missing_ok=True)
        if path.name != "checkpoint-1":
            shutil.copy(out / "checkpoint-1" / LEDGER_NAME, path / LEDGER_NAME)


def put_back_but_privacy_json(out: Path) -> None:
    put_back_all(out)
    (out / "checkpoint-3" / "privacy_complete.json").unlink()


def lose_the_copies(out: Path) -> None:
    shutil.copy(out / "checkpoint-1" / LEDGER_NAME, out / LEDGER_NAME)
    for copy in out.glob(f"checkpoint-*/{LEDGER_NAME}"):
        copy.unlink()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    run = trainer(out, steps=3, save_strategy="steps", save_steps=1)
    run.train()
    run.save_model()
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.mark.parametrize("act", [put_back_all, put_back_but_privacy_json, lose_the_copies])
@pytest.mark.parametrize("checkpoint", ["checkpoint-1", "checkpoint-2", "checkpoint-3"])
def test_a_ledger_put_back_with_all_its_copies_is_missed_by_what_else_names_it(
    act: Any, checkpoint: str, out: Path
) -> None:
    act(out)
    header = read_ledger(out / LEDGER_NAME).header
    assert read_ledger(out / LEDGER_NAME).num_steps == 1
    with pytest.raises(LedgerError, match=r"has 1 steps and is not its continuation.*Put the newest ledger back"):
        Ledger.open(out / LEDGER_NAME, header)
    if checkpoint == "checkpoint-3" and act is put_back_all:  # and so it is in a whole run
        with pytest.raises(LedgerError, match="steps would go uncounted"):
            trainer(out, steps=4).train(resume_from_checkpoint=str(out / checkpoint))


@pytest.mark.parametrize("name", ["weights", "optimizer.pt"])
@pytest.mark.parametrize("resumed", [True, "by name"])
def test_weights_of_another_run_in_a_checkpoint_are_refused(
    name: str, resumed: bool | str, out: Path, tmp_path: Path
) -> None:
    newest = max(out.glob("checkpoint-*"))
    name = next(iter(newest.glob("*.safetensors"))).name if name == "weights" else name
    (newest / name).write_bytes((newest / name).read_bytes()[:-1] + b"x")
    before = (out / LEDGER_NAME).read_bytes()
    with pytest.raises(LedgerError, match=f"{name} in .* is not what was saved there.*resume from another checkpoint"):
        trainer(out, steps=4).train(resume_from_checkpoint=True if resumed is True else str(newest))
    assert (out / LEDGER_NAME).read_bytes() == before


def test_a_checkpoint_of_an_earlier_version_resumes(out: Path) -> None:
    marker = max(out.glob("checkpoint-*")) / "privacy_complete.json"
    told = json.loads(marker.read_text())
    marker.write_text(json.dumps({"ledger_head": told["ledger_head"]}))
    trainer(out, steps=4).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("spoilt", [None, "{", '{"ledger": 3}'])
def test_a_new_training_where_a_model_lies_whose_ledger_is_lost_is_refused_and_the_card_stays(
    spoilt: str | None, out: Path
) -> None:
    (out / LEDGER_NAME).unlink()
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    if spoilt is not None:
        (out / "privacy.json").write_text(spoilt)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(
        LedgerError, match=r"privacy.json states what a training in this folder spent.*is missing.*another output_dir"
    ):
        trainer(out, steps=2).train()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


# ---- interrupts ------------------------------------------------------------------------------------------------------


def raising(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


class AtTheStart(TrainerCallback):
    """Ctrl-C before the first draw."""

    on_train_begin = raising


BEFORE_THE_FIRST_STEP: dict[str, Any] = {
    "while the plan is written": lambda patch: patch.setattr(Ledger, "plan", raising),
    "while keys are drawn": lambda patch: patch.setattr("hf_dp.step.opening.fresh_key", raising),
    "while the plan is printed": lambda patch: patch.setattr("hf_dp.training.trainer.print_summary", raising),
    "while an audit begins": lambda patch: patch.setattr("hf_dp.training.trainer.begin_audit", raising),
    "while the first batch is drawn": lambda patch: patch.setattr(PoissonSampler, "__iter__", raising),
}


@pytest.mark.parametrize("name", quick(("while keys are drawn",), BEFORE_THE_FIRST_STEP))
def test_an_interrupt_before_the_first_step_leaves_the_folder_free(name: str, tmp_path: Path) -> None:
    kept = trainer(tmp_path, steps=2)
    with pytest.MonkeyPatch.context() as patch:
        BEFORE_THE_FIRST_STEP[name](patch)
        with pytest.raises(KeyboardInterrupt):
            kept.train()
    again = trainer(tmp_path, steps=1)
    again.train()  # without resuming: nothing was spent
    assert again.privacy_spent() == (epsilon(1), 1e-3, 1)


def after_the_write(patch: pytest.MonkeyPatch) -> None:
    """The step is on the disk, and nobody has counted it yet."""
    write = durable.write_fully

    def written(descriptor: int, data: bytes) -> None:
        write(descriptor, data)
        if b'"n":2' in data:
            raise KeyboardInterrupt

    patch.setattr(durable, "write_fully", written)


def half_of_the_write(patch: pytest.MonkeyPatch) -> None:
    write = durable.write_fully

    def written(descriptor: int, data: bytes) -> None:
        write(descriptor, data[: len(data) // 2] if b'"n":2' in data else data)
        if b'"n":2' in data:
            raise KeyboardInterrupt

    patch.setattr(durable, "write_fully", written)


def in_the_noise(patch: pytest.MonkeyPatch) -> None:
    gaussian, calls = NoiseSource.gaussian, []

    def drawn(self: NoiseSource, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return raising() if len(calls) == 2 else gaussian(self, *args, **kwargs)

    patch.setattr(NoiseSource, "gaussian", drawn)


def in_the_passes(patch: pytest.MonkeyPatch) -> None:
    from hf_dp.step import PrivateStep

    begun, calls = PrivateStep.sum_up, []

    def summed(self: Any, *batches: Any) -> None:
        calls.append(1)
        begun(self, *batches)
        if len(calls) >= 3:
            raise KeyboardInterrupt

    patch.setattr(PrivateStep, "sum_up", summed)


@pytest.mark.parametrize(
    "act", quick((in_the_noise,), [after_the_write, half_of_the_write, in_the_noise, in_the_passes])
)
def test_an_interrupt_in_a_step_leaves_answer_card_and_ledger_with_the_same_steps(act: Any, tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=5)
    with pytest.MonkeyPatch.context() as patch:
        act(patch)
        with pytest.raises(KeyboardInterrupt):
            run.train()
    charged = read_ledger(tmp_path / LEDGER_NAME).num_steps
    assert run.privacy_spent() == (epsilon(5), 1e-3, charged)
    assert charged >= 1
    run.save_model()
    assert stated(tmp_path)["num_steps"] == charged
    assert failures(tmp_path) == ""


# ---- processes that do not know of each other ------------------------------------------------------------------------


@pytest.mark.parametrize("processes", ["2", "3", "8"])
def test_processes_started_without_use_cpu_are_told_so_and_leave_nothing(
    processes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = runs.arguments(tmp_path / "out")
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(UnsupportedOptionError, match=rf"{processes} processes were started.*use_cpu=True"):
        check_options(arguments, public_eval=False)
    assert not (tmp_path / "out").exists()


def test_each_of_two_real_processes_is_told(tmp_path: Path) -> None:
    def act(rank: str) -> None:
        address = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29731",
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
        }
        os.environ.update(address)
        try:
            trainer(tmp_path / "out", use_cpu=False)
        except UnsupportedOptionError as error:
            os._exit(7 if "use_cpu=True" in str(error) else 8)

    assert [status_of(child) for child in [start(lambda r=r: act(r)) for r in "01"]] == [7, 7]
    assert not (tmp_path / "out").exists()
