"""Several processes are one: the same draw, noise and parameters everywhere; a death stops all and hides no step."""

import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from hf_dp.accounting.epsilon import spent
from hf_dp.ledger.ledger import LEDGER_NAME, read_ledger
from hf_dp.sampling.poisson import PoissonSampler
from tests.distributed import worker
from tests.distributed.launch import WORKER, all_alike, collected, finish, free_port, results, run_groups
from tests.support.noise_checks import assert_gaussian, assert_uncorrelated
from tests.support.reference import relative_difference

QUICK = ("one_step", "noise", "slices", "refused", "different")
ALL = (*QUICK, "trajectory", "empty_draws", "counted")
MEMORY = ("scarce", "exhausted")


class Two(NamedTuple):
    """One start of Python for all that the quick tests look at."""

    found: dict[str, list[dict[str, Any]]]
    statuses_of_killed: list[int]
    folder: Path
    folder_of_killed: Path


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Two:
    folder, killed = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("killed")
    statuses, errors = run_groups([2, folder, *QUICK, *MEMORY], [2, killed, "dies"])
    assert statuses[0] == [0, 0], errors
    return Two(collected(folder, 2, *QUICK, *MEMORY), statuses[1], folder, killed)


@pytest.fixture(scope="module")
def two(groups: Two) -> dict[str, list[dict[str, Any]]]:
    return groups.found


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return results(tmp_path_factory.mktemp("three"), 3, *ALL)


def check_against_one_process(found: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    for name, tolerance in (("one_step", 1e-5), ("trajectory", 1e-4)):  # float32 sums in another order, over 20 steps
        if name not in found:
            continue
        alone = worker.SCENARIOS[name](folder / name)
        for result in found[name]:
            assert relative_difference({"w": result["weights"]}, {"w": alone["weights"]}) < tolerance
            assert result["charged"] == alone["charged"]
            assert np.allclose(result["logged"], alone["logged"], rtol=1e-4)  # as above
            assert len(result["logged"]) == (20 if name == "trajectory" else 0)
            assert result["world"] == len(found[name])
            assert alone["world"] == 1


def check_parameters_are_alike(found: dict[str, list[dict[str, Any]]]) -> None:
    steps_of = {"one_step": 1, "trajectory": 20, "empty_draws": 15, "noise": 2}
    for name in found.keys() & steps_of:
        hashes, steps = [r["hashes"] for r in found[name]], steps_of[name]
        assert len(hashes[0]) == steps
        assert all_alike(hashes)  # bit by bit, after every step
        assert all_alike([r["epsilon"] for r in found[name]])


def check_noise_is_added_once(found: dict[str, list[dict[str, Any]]]) -> None:
    """Two-sided: sqrt(2) times as much (once a process) or as little (shared out, seeds alike) would be far outside."""
    noise = found["noise"][0]["noise"].numpy()
    assert noise.shape == (2, 102_080)
    for step in noise:
        assert_gaussian(step, 1.5 * 0.4)
    assert_uncorrelated(noise[0], noise[1])
    for other in found["noise"][1:]:
        assert np.abs(other["noise"].numpy() - noise).max() < 1e-5  # float32: both subtract the sum again


def check_slices_are_the_draw(found: dict[str, list[dict[str, Any]]]) -> None:
    drawn = [r["drawn"] for r in found["slices"]]
    sampler = PoissonSampler(40, 8 / 40, 5, key=3)  # the debug seed is the key
    for number, parts in enumerate(zip(*drawn, strict=True)):
        assert sorted(i for part in parts for i in part) == sampler.draw(number).tolist()
    assert len(drawn[0]) == 20


def check_one_all_reduce_a_step(found: dict[str, list[dict[str, Any]]]) -> None:
    """From a step's beginning to its end; as large as the plan says."""
    for result in found["counted"]:
        assert result["collectives"] == ["c10d::allreduce_"] * 4
        assert result["sizes"] == [result["planned"]] * 4


def check_one_plan_and_one_data_set(found: dict[str, list[dict[str, Any]]]) -> None:
    """Noise for C = 0.1 under a sum clipped at 5 would protect next to nothing: nobody begins."""
    last = len(found["different"]) - 1
    assert all_alike([r["errors"] for r in found["different"]])
    plan, data = found["different"][0]["errors"]
    assert f"clip_norm is 5.0 on process {last}, 0.1 on 0. Give all" in plan
    assert f"ConfigError: all processes need one plan and the same data; the records of process {last} are not" in data
    assert not any(r["ledger"] for r in found["different"])


def check_empty_slices_do_not_hang_and_are_charged(found: dict[str, list[dict[str, Any]]]) -> None:
    assert [r["charged"] for r in found["empty_draws"]] == [15] * len(found["empty_draws"])


def check_everybody_is_told(found: dict[str, list[dict[str, Any]]]) -> None:
    errors = [r["error"] for r in found["refused"]]
    assert all_alike(errors)
    assert errors[0].startswith("LedgerError: ")
    assert "holds what another training in this folder spent" in errors[0]


def test_two_processes_go_where_one_goes(two: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    check_against_one_process(two, tmp_path)


@pytest.mark.slow
def test_pairs_on_two_processes_train_as_on_one(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    found = results(tmp_path / "two", 2, "on_trls_trainers")["on_trls_trainers"]
    alone = worker.SCENARIOS["on_trls_trainers"](tmp_path / "one")
    for result in found:
        assert (result["world"], alone["world"]) == (2, 1)
        for name in ("dpo", "reward"):
            assert relative_difference({"w": result[name]}, {"w": alone[name]}) < 1e-5


def test_all_processes_have_the_same_parameters_after_every_step(two: dict[str, list[dict[str, Any]]]) -> None:
    check_parameters_are_alike(two)


def test_noise_is_added_once_whatever_the_number_of_processes(two: dict[str, list[dict[str, Any]]]) -> None:
    check_noise_is_added_once(two)


def test_the_slices_together_are_one_draw(two: dict[str, list[dict[str, Any]]]) -> None:
    check_slices_are_the_draw(two)


def test_processes_with_different_plans_or_data_are_refused(two: dict[str, list[dict[str, Any]]]) -> None:
    check_one_plan_and_one_data_set(two)


def test_what_process_0_refuses_stops_all_with_its_message(two: dict[str, list[dict[str, Any]]]) -> None:
    check_everybody_is_told(two)


@pytest.mark.slow
@pytest.mark.parametrize(
    "check",
    [
        check_parameters_are_alike,
        check_noise_is_added_once,
        check_slices_are_the_draw,
        check_everybody_is_told,
        check_one_all_reduce_a_step,
        check_empty_slices_do_not_hang_and_are_charged,
        check_one_plan_and_one_data_set,
    ],
)
def test_three_processes(check: Any, three: dict[str, list[dict[str, Any]]]) -> None:
    check(three)


@pytest.mark.slow
def test_three_processes_go_where_one_goes(three: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    check_against_one_process(three, tmp_path)


def check_ledger(folder: Path) -> None:
    """Two steps were seen; the third, in which a process failed, is charged and none after it."""
    assert (folder / "observed.0").stat().st_size == 2
    record = read_ledger(folder / LEDGER_NAME)
    assert record.num_steps == 3
    assert spent(record.segments, 1e-3).epsilon > 0


def test_a_killed_process_stops_all_and_hides_no_step(groups: Two) -> None:
    first, last = groups.statuses_of_killed
    assert last == -signal.SIGKILL
    assert first != 0
    told = torch.load(groups.folder_of_killed / "dies.0.pt", weights_only=True)
    assert told["error"].startswith("ReleaseError: process 0 of 2 lost another one in this step: it has ended")
    assert "The step is charged, nothing was released. Mend what ended it and go on with resume_from" in told["error"]
    check_ledger(groups.folder_of_killed / "dies")


def test_a_process_without_memory_for_one_example_stops_all_at_once(groups: Two) -> None:
    """Not by the time-out of half an hour: it takes part in the step's all-reduce and says that it failed."""
    first, last = groups.found["exhausted"]
    assert last["error"].startswith("ConfigError: one example by itself does not fit in memory: truncate")
    assert first["error"].startswith("ReleaseError: 1 of 2 processes could not release this step")
    check_ledger(groups.folder / "exhausted")


def test_a_process_with_little_memory_takes_smaller_parts_alone(two: dict[str, list[dict[str, Any]]]) -> None:
    first, last = two["scarce"]
    assert (first["largest"], last["largest"]) == (4, 2)
    assert first["hashes"] == last["hashes"]
    assert (first["charged"], last["charged"]) == (1, 1)
    expected = two["one_step"][0]["weights"]
    assert relative_difference({"w": first["weights"]}, {"w": expected}) < 1e-5  # float32 sums in another order


@pytest.mark.slow
def test_a_process_that_does_not_come_stops_all_after_the_time_out(tmp_path: Path) -> None:
    statuses, errors = run_groups([2, tmp_path, "stopped"])
    assert 0 not in statuses[0], errors
    told = torch.load(tmp_path / "stopped.0.pt", weights_only=True)
    assert "did not come within the time-out (ddp_timeout)" in told["error"]
    assert 2 < told["waited"] < 10  # the time-out is 3 s, the other process sleeps for 15
    check_ledger(tmp_path / "stopped")


@pytest.mark.slow
def test_the_number_of_processes_may_change_between_resumes(tmp_path: Path) -> None:
    """q, and so what is charged, stays; the ledger counts all sessions together."""
    for session, world in enumerate((2, 1, 3), start=1):
        found = results(tmp_path, world, "resumed")["resumed"]
        assert all_alike([r["hashes"] for r in found])
        assert {r["charged"] for r in found} == {2 * session}
        assert {r["world"] for r in found} == {world}
    record = read_ledger(tmp_path / "resumed" / LEDGER_NAME)
    assert [(s.sample_rate, s.num_steps) for s in record.executed] == [(8 / 24, 6)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--mixed_precision", "no"],
    ],
    ids=["torchrun", "accelerate launch"],
)
def test_the_launchers_that_people_use(launcher: list[str], tmp_path: Path) -> None:
    module, *options = launcher
    if module.startswith("accelerate"):
        options += ["--main_process_port", str(free_port()), "--num_machines", "1", "--dynamo_backend", "no"]
    done = finish([sys.executable, "-m", module, *options, WORKER, str(tmp_path), "trajectory"])[0]
    assert done.returncode == 0, done.stderr[-2000:]
    found = {"trajectory": [torch.load(tmp_path / f"trajectory.{r}.pt", weights_only=True) for r in range(2)]}
    assert {r["world"] for r in found["trajectory"]} == {2}
    alone = worker.trajectory(tmp_path / "alone")
    for result in found["trajectory"]:
        assert relative_difference({"w": result["weights"]}, {"w": alone["weights"]}) < 1e-4  # float32, 20 steps
