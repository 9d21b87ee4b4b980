"""A budget file for several runs on the same data is never exceeded by runs that start, die, are copied or resume."""

import json
import math
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from transformers import TrainerCallback
from typer.testing import CliRunner

from hf_dp import durable
from hf_dp.accounting.epsilon import spent
from hf_dp.cli import app
from hf_dp.errors import BudgetError, ConfigError, HfDpError
from hf_dp.ledger import budget, budget_file
from hf_dp.ledger.budget import TOKEN_NAME, BudgetSubject
from hf_dp.ledger.ledger import LEDGER_NAME, Ledger, LedgerHeader, read_ledger
from hf_dp.mechanism import Segment
from tests.ledger.test_faults import PRIVATE, SAVING, At, Stop, _stop
from tests.support import runs
from tests.support.campaign import REFUSED, WENT_ON, Victim
from tests.support.children import KILLED, in_child, start, status_of

DELTA = 1e-5
PLAN = Segment(0.1, 2.0, 100)
OF = BudgetSubject("f" * 64, 1000, "record", "zero-out")
ROOM_FOR_THREE = spent([PLAN._replace(num_steps=300)], DELTA).epsilon * (1 + 1e-9)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A budget that holds three runs of PLAN and not one step more."""
    budget.create(tmp_path / "budget.json", ROOM_FOR_THREE, DELTA)
    return tmp_path / "budget.json"


def take(
    path: Path, name: str, asked: Segment = PLAN, *charged: Segment, of: BudgetSubject = OF, new: bool = True
) -> int:
    """A reservation for the run in the folder `name` beside the budget."""
    folder = path.parent / name
    folder.mkdir(exist_ok=True)
    (folder / LEDGER_NAME).touch()  # what tells a folder that was left from one that is there
    return budget.reserve(path, folder, of, charged=charged, asked=[asked], is_new=new)


def steps(count: int, sigma: float = PLAN.joint_noise_multiplier) -> Segment:
    return Segment(PLAN.sample_rate, sigma, count)


def total(path: Path) -> float:
    return spent(budget.read(path).segments(), DELTA).epsilon


# ---- reserving -------------------------------------------------------------------------------------------------------


def test_all_runs_are_composed_and_the_one_that_does_not_fit_is_told_why(path: Path) -> None:
    for name in "abc":
        assert take(path, name) == 100
    assert total(path) <= ROOM_FOR_THREE < 3 * spent([PLAN], DELTA).epsilon  # one composition, no sum of epsilons
    before = path.read_bytes()
    with pytest.raises(
        BudgetError, match=r"3 runs \(3 of them not ended\).*room for no such step.*Nothing was trained"
    ):
        take(path, "d", steps(1))
    assert path.read_bytes() == before
    assert not (path.parent / "d" / TOKEN_NAME).exists()


def test_the_refusal_says_what_would_fit(path: Path) -> None:
    take(path, "a", steps(220))
    with pytest.raises(BudgetError) as refused:
        take(path, "b")
    e = [spent([steps(n)], DELTA).epsilon for n in (220, 100, 320)]
    for part in (
        f"{e[0]:.4g} is spent or reserved by 1 runs",
        f"asks {e[1]:.4g}",
        f"come to {e[2]:.4g}",
        "room for 80 ",
    ):
        assert part in str(refused.value)
    assert take(path, "b", steps(80)) == 80


def test_segments_of_other_noise_are_composed_too(path: Path) -> None:
    take(path, "a", steps(100, sigma=1.5))
    more = steps(1000, sigma=5.0)
    expected = spent([steps(100, sigma=1.5), more], DELTA).epsilon
    assert (expected <= ROOM_FOR_THREE) == _is_granted(path, "b", more)
    assert total(path) <= ROOM_FOR_THREE


def _is_granted(path: Path, name: str, asked: Segment) -> bool:
    try:
        return take(path, name, asked) == asked.num_steps
    except BudgetError:
        return False


def test_a_run_that_ended_gives_back_what_it_did_not_take(path: Path) -> None:
    take(path, "a")
    take(path, "b", steps(200))
    budget.settle(path, path.parent / "a", [steps(40)])
    ended = budget.read(path).known(path.parent / "a")
    assert ended is not None
    assert (ended.ended, ended.charged, ended.segments) == (True, 40, (steps(40),))
    with pytest.raises(BudgetError, match="room for 60 such steps of the 61"):
        take(path, "c", steps(61))
    assert take(path, "c", steps(60)) == 60


def test_a_run_that_was_killed_keeps_its_part_until_it_goes_on_and_takes_no_second_one(path: Path) -> None:
    take(path, "a", steps(300))
    with pytest.raises(BudgetError, match="1 of them not ended"):
        take(path, "b", steps(1))
    # 120 steps are in its ledger and its last checkpoint is of step 100: the 20 that are lost are charged again
    assert take(path, "a", steps(200), steps(120), new=False) == 180
    assert [run.segments for run in budget.read(path).runs] == [(steps(300),)]  # 120 charged and 180 to come


def test_a_run_that_ended_and_goes_on_reserves_the_whole_of_it(path: Path) -> None:
    take(path, "a")
    budget.settle(path, path.parent / "a", [PLAN])
    with pytest.raises(BudgetError, match="room for 200 "):
        take(path, "a", steps(201), PLAN, new=False)
    assert take(path, "a", steps(200), PLAN, new=False) == 200
    assert [run.segments for run in budget.read(path).runs] == [(steps(300),)]


def test_a_new_run_in_the_folder_of_an_old_one_is_another(path: Path) -> None:
    take(path, "a")
    take(path, "a")  # the ledger of the first is gone
    assert [run.segments for run in budget.read(path).runs] == [(PLAN,), (PLAN,)]


def test_a_copied_folder_is_another_run_and_a_moved_one_the_same(path: Path) -> None:
    take(path, "a")
    shutil.copytree(path.parent / "a", path.parent / "copy")
    assert take(path, "copy", steps(50), steps(50), new=False) == 50
    assert len(budget.read(path).runs) == 2
    (path.parent / "a").rename(path.parent / "moved")
    assert take(path, "moved", steps(50), steps(50), new=False) == 50
    assert [Path(run.folder).name for run in budget.read(path).runs] == ["copy", "moved"]


# ---- what may use it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "named"),
    [
        (
            OF._replace(data="e" * 64, num_examples=900),
            r"other training records \(1,000 of them; this run has 900\).*--any-data",
        ),
        (OF._replace(unit="author"), "counts one record under zero-out, the run one author"),
        (OF._replace(relation="replace-one"), "the run one record under replace-one"),
        (OF._replace(num_examples=100_000), r"delta is 1e-05, and must be below 1 / N = 1e-05"),
    ],
)  # fmt: skip
def test_a_run_about_something_else_is_refused(of: BudgetSubject, named: str, path: Path) -> None:
    take(path, "a", steps(10))
    before = path.read_bytes()
    with pytest.raises(BudgetError, match=named):
        take(path, "b", steps(10), of=of)
    assert path.read_bytes() == before


def test_runs_on_other_forms_of_the_data_draw_on_it_where_that_is_said(path: Path) -> None:
    take(path, "a", steps(150))
    budget.allow_any_data(path)
    other = OF._replace(data="e" * 64, num_examples=900)
    assert take(path, "b", steps(150), of=other) == 150
    with pytest.raises(BudgetError, match="no such step"):
        take(path, "c", steps(1), of=other)


def test_an_older_ledger_is_refused(path: Path) -> None:
    take(path, "a")
    take(path, "a", steps(10), steps(50), new=False)
    with pytest.raises(BudgetError, match="its ledger has 49 steps, and the budget knows of 50"):
        take(path, "a", steps(10), steps(49), new=False)
    with pytest.raises(BudgetError, match="its ledger has 49 steps, and the budget knows of 50"):
        budget.settle(path, path.parent / "a", [steps(49)])


# ---- the file --------------------------------------------------------------------------------------------------------


def test_a_budget_is_made_once_and_its_numbers_are_numbers(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(BudgetError, match="exists already"):
        budget.create(path, 100.0, DELTA)
    assert path.read_bytes() == before
    for epsilon, delta in ((math.nan, DELTA), (-1.0, DELTA), (1.0, 1.0), (1.0, math.nan), (math.inf, 2.0)):
        with pytest.raises(BudgetError):
            budget.create(path.with_name("other.json"), epsilon, delta)
    with pytest.raises(BudgetError, match="choose a folder that exists"):
        budget.create(path.parent / "nowhere" / "budget.json", 1.0, DELTA)
    assert sorted(p.name for p in path.parent.iterdir()) == ["budget.json"]


def test_a_budget_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"no budget at .*creates one"):
        take(tmp_path / "budget.json", "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_every_flipped_bit_is_refused_and_the_file_left_alone(path: Path) -> None:
    take(path, "a")
    sound = path.read_bytes()
    for place in range(len(sound)):
        bad = bytearray(sound)
        bad[place] ^= 1 << (place % 8)
        path.write_bytes(bad)
        with pytest.raises(BudgetError, match="not as hf_dp wrote it"):
            budget.read(path)
    with pytest.raises(BudgetError, match="not as hf_dp wrote it"):
        take(path, "b")
    assert path.read_bytes() == bytes(bad)


@pytest.mark.parametrize("left", [b"", b"null", b"[]", b"{}", b"3", b"\xff\xfe", b'{"version": 1}', b"[" * 100_000])
def test_what_is_no_budget_is_refused(left: bytes, path: Path) -> None:
    path.write_bytes(left)
    with pytest.raises(BudgetError, match="not as hf_dp wrote it"):
        budget.read(path)
    assert path.read_bytes() == left


@pytest.mark.parametrize("cut", [1, 40, 300])
def test_a_file_cut_short_is_refused(cut: int, path: Path) -> None:
    take(path, "a")
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(BudgetError, match="not as hf_dp wrote it"):
        take(path, "b")


@pytest.mark.parametrize(
    "change",
    [
        {"target_epsilon": math.nan}, {"target_epsilon": 0}, {"target_delta": 1.5}, {"version": 2},
        {"runs": [("num_steps", -100)]}, {"runs": [("num_steps", 1.5)]}, {"runs": [("noise_multiplier", math.inf)]},
        {"runs": [("sample_rate", 0)]}, {"runs": [("noise", "none")]}, {"target_epsilon": 99.0},
    ],
)  # fmt: skip
def test_nonsense_is_refused_whatever_its_hash(change: dict[str, Any], path: Path) -> None:
    take(path, "a")
    said = json.loads(path.read_bytes())
    for name, value in change.items():
        if name == "runs":
            said["runs"][0]["segments"][0].update(value)
        else:
            said[name] = value
    path.write_text(json.dumps(said, indent=1) + "\n")
    with pytest.raises(BudgetError, match="not as hf_dp wrote it"):
        budget.read(path)


# ---- several processes -----------------------------------------------------------------------------------------------


def slowly(patch: pytest.MonkeyPatch) -> None:
    """A long way between reading and writing, so that who does not wait is seen to."""
    replace = durable.replace
    patch.setattr(durable, "replace", lambda at, data: (time.sleep(0.05), replace(at, data))[1])


def test_of_many_that_start_at_once_as_many_start_as_fit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slowly(monkeypatch)
    total(path)  # dp_accounting is imported before the fork
    spent([PLAN], DELTA)

    def one(number: int) -> None:
        try:
            take(path, f"run-{number}")
        except BudgetError:
            os._exit(REFUSED)

    children = [start(lambda n=n: one(n)) for n in range(7)]
    ended = [status_of(child) for child in children]
    assert sorted(ended) == [0, 0, 0, *[REFUSED] * 4]
    found = budget.read(path)
    assert {Path(run.folder).name for run in found.runs} == {
        f"run-{n}" for n, status in enumerate(ended) if status == 0
    }
    assert total(path) <= ROOM_FOR_THREE


@pytest.mark.parametrize(("which", "when"), [(1, "before"), (1, "after"), (2, "before"), (2, "after")])
def test_a_kill_while_reserving_leaves_a_whole_file_and_no_lock(
    which: int, when: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, calls = durable.replace, iter(range(1, 9))

    def killed(at: Path, data: bytes) -> None:
        due = next(calls) == which
        if due and when == "before":
            os.kill(os.getpid(), 9)
        replace(at, data)
        if due:
            os.kill(os.getpid(), 9)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "replace", killed)
        assert in_child(lambda: take(path, "a")) == KILLED
    assert len(budget.read(path).runs) == ((which, when) == (2, "after"))
    assert take(path, "a", new=False) == 100
    assert len(budget.read(path).runs) == 1
    assert total(path) == spent([PLAN], DELTA).epsilon


def test_waiting_for_the_lock_has_an_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_file, "LOCK_SECONDS", 0.1)
    ready = path.parent / "ready"

    def hold() -> None:
        with FileLock(path.with_name(f"_{path.name}.lock")):
            ready.touch()
            time.sleep(60)

    child = start(hold)
    while not ready.exists():
        time.sleep(0.01)
    with pytest.raises(BudgetError, match="in use by another process"):
        take(path, "a")
    assert status_of(child, kill_after=0.0) == KILLED
    assert take(path, "a") == 100  # the lock died with its process


# ---- whole runs ------------------------------------------------------------------------------------------------------

STEP = Segment(8 / 24, 1.0, 1)  # of PRIVATE


def for_steps(path: Path, count: int) -> Path:
    """A budget that holds so many steps of PRIVATE."""
    budget.create(path, spent([STEP._replace(num_steps=count)], 1e-3).epsilon * (1 + 1e-9), 1e-3)
    return path


def train(
    folder: Path, path: Path, *, resume: bool = False, privacy: dict[str, Any] | None = None, **settings: Any
) -> Any:
    drawing = {**PRIVATE, **(privacy or {}), "budget_file": str(path)}
    trainer = runs.trainer(folder, None, drawing, **{**SAVING, "save_strategy": "no", **settings})
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


class StopsAfterTwo(TrainerCallback):
    """Ends training early, as a callback may."""

    def on_step_end(self, args: Any, state: Any, control: Any, **k: Any) -> None:
        control.should_training_stop = state.global_step == 2


def test_runs_share_a_budget_and_the_one_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    path = for_steps(tmp_path / "budget.json", 9)
    train(tmp_path / "a", path, callbacks=[StopsAfterTwo()])  # took 2, and why it stopped there nobody knows
    assert [(r.ended, r.charged, r.segments) for r in budget.read(path).runs] == [
        (True, 2, (STEP._replace(num_steps=4),))
    ]
    train(tmp_path / "b", path)
    begun: list[int] = []
    with pytest.raises(BudgetError, match=r"room for 1 such steps of the 4"):
        train(tmp_path / "c", path, callbacks=[At("begin", 0, lambda: begun.append(1))])
    assert begun == []
    assert [p for p in (tmp_path / "c").rglob("*") if p.is_file()] == []
    train(tmp_path / "c", path, max_steps=1)  # and after the refusal the folder can be used
    assert len(budget.read(path).runs) == 3


@pytest.mark.slow
def test_a_killed_run_keeps_its_part_and_goes_on_within_the_total(tmp_path: Path) -> None:
    path, out = for_steps(tmp_path / "budget.json", 4), tmp_path / "out"
    saving = {"save_strategy": "steps"}
    die = At("begin", 2, lambda: os.kill(os.getpid(), 9))
    assert in_child(lambda: train(out, path, callbacks=[die], **saving)) == KILLED
    assert [(r.ended, r.segments) for r in budget.read(path).runs] == [(False, (STEP._replace(num_steps=4),))]
    with pytest.raises(BudgetError, match="no such step"):
        train(tmp_path / "other", path, max_steps=1)
    shutil.rmtree(out / "checkpoint-2")  # a step is lost, and there is no room to take it again
    trainer = train(out, path, resume=True, **saving)
    assert trainer.state.global_step == 3
    assert read_ledger(out / LEDGER_NAME).num_steps == trainer.privacy_spent().num_steps == 4
    assert [(r.ended, r.segments) for r in budget.read(path).runs] == [(True, (STEP._replace(num_steps=4),))]


@pytest.mark.parametrize(("step", "claimed"), [(0, ()), (1, (STEP._replace(num_steps=4),))])
def test_a_run_that_failed_keeps_its_part_until_it_is_settled_and_claims_its_plan_from_the_first_step_on(
    step: int, claimed: tuple[Segment, ...], tmp_path: Path
) -> None:
    path, out = for_steps(tmp_path / "budget.json", 7), tmp_path / "out"
    with pytest.raises(Stop):
        train(out, path, callbacks=[At("begin", step, _stop)])
    assert not budget.read(path).runs[0].ended
    told = CliRunner().invoke(app, ["budget", str(path), "--settle", str(out)])
    assert told.exit_code == 0, told.exception
    assert [(r.ended, r.segments) for r in budget.read(path).runs] == [(True, claimed)]
    assert train(tmp_path / "next", path, max_steps=3).privacy_spent().num_steps == 3


def test_a_run_that_began_with_a_budget_does_not_go_on_without_it(tmp_path: Path) -> None:
    path, out = for_steps(tmp_path / "budget.json", 4), tmp_path / "out"
    train(out, path, max_steps=1, save_strategy="steps")
    before = (out / LEDGER_NAME).read_bytes()
    trainer = runs.trainer(out, None, PRIVATE, **{**SAVING, "max_steps": 2})
    with pytest.raises(BudgetError, match="would not see its further steps: give budget_file"):
        trainer.train(resume_from_checkpoint=True)
    assert (out / LEDGER_NAME).read_bytes() == before


@pytest.mark.slow
def test_other_data_and_runs_without_noise_are_refused(tmp_path: Path) -> None:
    path = for_steps(tmp_path / "budget.json", 9)
    with pytest.raises(BudgetError, match="infinite epsilon"):
        train(tmp_path / "a", path, privacy={"noise_multiplier": 0.0})
    with pytest.raises(BudgetError, match="infinite epsilon"):
        train(tmp_path / "a", path, privacy={"debug_seed": 1})
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["budget.json"]
    train(tmp_path / "a", path, max_steps=1)
    with pytest.raises(BudgetError, match="other training records"):
        train(tmp_path / "b", path, max_steps=1, train_dataset=runs.text_rows(24, seed=5))
    train(tmp_path / "b", path, max_steps=1)


def test_a_budget_that_went_away_does_not_cost_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = for_steps(tmp_path / "budget.json", 4)
    trainer = train(tmp_path / "out", path, callbacks=[At("end", 4, path.unlink)])
    assert trainer.privacy_spent().num_steps == 4
    told = capsys.readouterr().err
    assert "still counts this run's whole plan" in told
    assert "--settle" in told


@pytest.mark.slow
def test_every_process_learns_the_refusal(tmp_path: Path) -> None:
    path = for_steps(tmp_path / "budget.json", 2)
    victim = Victim(tmp_path / "run", random.Random(0))
    drawing = {"budget_file": str(path)}
    victim.run(REFUSED, steps=4, processes=2, privacy=drawing)  # a process that waits in vain hangs
    assert victim.statuses == [REFUSED, REFUSED]
    assert not victim.ledger.exists()
    assert victim.run(WENT_ON, steps=2, processes=2, privacy=drawing) == WENT_ON
    assert victim.count.clean(), victim.count
    assert [(r.ended, r.charged) for r in budget.read(path).runs] == [(True, 2)]


# ---- the command -----------------------------------------------------------------------------------------------------


def hf_dp(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["budget", *map(str, arguments)])


def test_the_command_makes_a_budget_and_shows_it(tmp_path: Path) -> None:
    path = tmp_path / "budget.json"
    made = hf_dp(path, "--target-epsilon", 3, "--target-delta", 1e-5)
    assert made.exit_code == 0, made.exception
    assert "Together: epsilon 0 of 3." in made.output
    take(path, "first")
    take(path, "second", steps(50))
    budget.settle(path, path.parent / "first", [steps(40)])
    shown = hf_dp(path).output
    for part in ("ended", "reserved", "40 at q 0.1, sigma 2", "50 at q 0.1, sigma 2", "epsilon 3 at delta 1e-05"):
        assert part in " ".join(shown.split()), part
    together = float(shown.split("Together: epsilon ")[1].split()[0])
    assert 0 <= together - total(path) <= 1e-4 * together  # rounded up


@pytest.mark.parametrize(
    ("arguments", "error"),
    [(["--target-epsilon", "3"], ConfigError), ([], BudgetError), (["--any-data"], BudgetError)],
)
def test_mistakes_are_told(arguments: list[str], error: type[HfDpError], tmp_path: Path) -> None:
    told = hf_dp(tmp_path / "budget.json", *arguments)
    assert isinstance(told.exception, error)
    assert list(tmp_path.iterdir()) == []


def test_settling_needs_a_ledger_that_nobody_writes_and_a_run_that_is_known(path: Path) -> None:
    folder = path.parent / "a"
    assert isinstance(hf_dp(path, "--settle", folder).exception, HfDpError)  # no ledger
    header = LedgerHeader(1000, "record", "zero-out", DELTA, None, False)
    with Ledger.open(folder / LEDGER_NAME, header) as ledger:
        ledger.begin(0.1, 2.0, 1.0, 100)
        assert budget.reserve(path, folder, OF, charged=(), asked=[PLAN], is_new=True) == 100
        ledger.charge()
        assert "in use by another process" in str(hf_dp(path, "--settle", folder).exception)
    assert hf_dp(path, "--settle", folder).exit_code == 0
    assert [(r.ended, r.segments) for r in budget.read(path).runs] == [(True, (steps(1),))]
    (folder / TOKEN_NAME).unlink()
    assert "knows of no run" in str(hf_dp(path, "--settle", folder).exception)
