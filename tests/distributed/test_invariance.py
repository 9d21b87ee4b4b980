"""One update, whatever the processes, micro-batches, checkpointing and shards, and whatever a run is resumed on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_dp.ledger.ledger import LEDGER_NAME, read_ledger
from tests.distributed import invariance
from tests.distributed.launch import collected, results, run_groups
from tests.support.noise_checks import assert_gaussian, assert_uncorrelated

SHARDS = "launched", "mixing_shards", "trained_shards"
Found = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {world: tmp_path_factory.mktemp(str(world)) for world in (1, 2)}


@pytest.fixture(scope="module")
def found(folders: dict[int, Path]) -> dict[int, Found]:
    """By number of processes: what the quick tests look at, out of one start of Python."""
    names = {
        1: ("same_update", "noise", "noise_again", "discrete", "trained_shards"),
        2: ("same_update", "discrete", "sharded_empty_draws", "refused_shards", *SHARDS),
    }
    sessions = [[world, folders[1], "elastic_full"] for world in (1, 2, 1, 1)]
    statuses, errors = run_groups(*([world, folders[world], *names[world]] for world in names), *sessions)
    assert statuses == [[0], [0, 0], [0], [0, 0], [0], [0]], errors
    return {world: collected(folders[world], world, *names[world]) for world in names}


def check_updates(by_world: dict[int, list[dict[str, torch.Tensor]]], *, all_of_them: bool) -> None:
    """Every way on every process against the first on one process; Llama and GPT-2 apart."""
    references: dict[str, torch.Tensor] = {}
    for world, processes in sorted(by_world.items()):
        expected = {str(way): way.base for way in invariance.ways(world, all_of_them=all_of_them)}
        for updates in processes:
            assert set(updates) == set(expected)
            for way, update in updates.items():
                reference = references.setdefault(expected[way], update)
                assert float(reference.norm()) > 0.05
                # float32 sums of 12 gradients in another order; a record twice, missing or clipped elsewhere gives 0.01
                # or more
                assert float((update - reference).norm() / reference.norm()) < 1e-5, (world, way)


def test_every_way_gives_the_same_update(found: dict[int, Found]) -> None:
    check_updates({world: by_name["same_update"] for world, by_name in found.items()}, all_of_them=False)


def test_sums_of_whole_numbers_are_the_same_to_the_last_bit(found: dict[int, Found]) -> None:
    alone, first, second = (process["hashes"] for world in (1, 2) for process in found[world]["discrete"])
    assert len(alone) == 4
    assert alone == first == second
    other = found[1]["noise"][0]["hashes"]
    assert other != alone


def test_a_sharded_model_takes_as_many_passes_on_every_process(found: dict[int, Found]) -> None:
    """Otherwise it hangs. Their results are dropped: all processes stay together, and every step is charged once."""
    first, last = found[2]["sharded_empty_draws"]
    assert first["hashes"] == last["hashes"]
    assert len(first["hashes"]) == first["charged"] == last["charged"] == 15


def test_accelerates_config_file_shards_the_base_and_leaves_the_adapter_whole(found: dict[int, Found]) -> None:
    """Each block has shards of its own, though peft's policy, which FSDP2 does not know, was set meanwhile."""
    for process in found[2]["launched"]:
        assert process["left whole"]
        assert process["units"] == ["", *(f"base_model.model.{name}" for name in UNITS)]
        assert process["checkpointed"]


UNITS = "model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head"


def test_weights_that_only_one_process_read_and_adapters_are_the_same_on_all(
    found: dict[int, Found], folders: dict[int, Path]
) -> None:
    first, last = found[2]["launched"]
    read = load_file(folders[2] / "launched" / "llama" / "model.safetensors")
    for process in (first, last):
        assert set(process["base"]) == set(read)
        assert all(torch.equal(process["base"][name], weight) for name, weight in read.items())
    assert torch.equal(first["begun"], last["begun"])
    assert first["hashes"] == last["hashes"]
    assert len(set(first["hashes"])) == 2
    assert first["passes"] == last["passes"] > 2


def test_examples_that_meet_in_a_sharded_model_are_found(found: dict[int, Found]) -> None:
    """Gathering weights goes unseen by the proof; nothing else does."""
    for process in found[2]["mixing_shards"]:
        assert "examples are mixed by mean in base_model.model.model.layers.0" in process["alone"]


def test_the_hooks_that_average_gradients_never_run(found: dict[int, Found]) -> None:
    for process in found[2]["launched"]:
        assert process["hooks"] == {1}  # they are there
        assert process["averaged"] == 0


def test_a_sharded_training_is_saved_whole(found: dict[int, Found], folders: dict[int, Path]) -> None:
    for process in found[2]["launched"]:
        assert process["others"] == []
        for folder in ("launched", "launched/checkpoint-2"):
            saved = load_file(folders[2] / folder / "adapter_model.safetensors")
            weights = {name.replace(".default", ""): w for name, w in process["weights"].items()}
            assert set(saved) == set(weights)
            assert all(torch.equal(saved[name], w) for name, w in weights.items())
    assert (folders[2] / "launched" / "checkpoint-2" / "optimizer.pt").exists()


def test_what_does_not_go_with_shards_is_refused_with_a_way_out(found: dict[int, Found]) -> None:
    for process in found[2]["refused_shards"]:
        tied, beside, discrete, people, split = process["errors"]
        assert "transformer.wte.weight is trained, in shards, and gathered apart in the places that are tied" in tied
        assert (
            "model.embed_tokens.weight is trained and sharded, score.weight is trained and whole: shard all" in beside
        )
        assert "noise='discrete' (one example's whole gradient is rounded): choose 'gaussian-chacha20', or" in discrete
        assert "unit_column='person' (a unit's whole gradient is kept over passes): leave it out, or train an" in people
        assert "weights sharded over tp: tensor, pipeline, expert and context sharding are not supported; load" in split


def test_each_process_adds_the_noise_of_its_shards(found: dict[int, Found]) -> None:
    """Two-sided on every shard; together it is the noise of one process, so that no coordinate has it twice or not."""
    whole = found[1]["trained_shards"][0]["noise"]
    parts = found[2]["trained_shards"]
    size, metrics = whole.shape[1], 2
    seen = torch.cat([part["at"][:-metrics] for part in parts])
    assert torch.equal(seen.sort().values, torch.arange(size - metrics))
    for part in parts:
        assert part["held"] == len(part["at"]) - metrics < 0.6 * size
        ours, its = part["noise"][:, :-metrics], whole[:, part["at"][:-metrics]]
        assert_gaussian(ours.flatten().numpy(), 1.5 * 0.4)
        assert torch.allclose(ours, its, atol=1e-5)  # a sum was taken off again, in float32
    first, last = (part["noise"][:, :3000].flatten().numpy() for part in parts)
    assert_uncorrelated(first, last)


def test_weights_trained_in_shards_are_those_of_one_process(found: dict[int, Found], folders: dict[int, Path]) -> None:
    """With noise, evaluations and noised figures in the log; saved whole."""
    alone = found[1]["trained_shards"][0]
    for process in found[2]["trained_shards"]:
        for name, weight in process["weights"].items():
            assert torch.allclose(weight, alone["weights"][name], atol=1e-6)
        assert len(process["logged"]) == len(alone["logged"])
        for ours, theirs in zip(process["logged"], alone["logged"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    for world in (1, 2):
        saved = load_file(folders[world] / "trained_shards" / "checkpoint-3" / "model.safetensors")
        weights = found[world]["trained_shards"][0]["weights"]
        assert set(saved) == set(weights)
        assert all(torch.equal(saved[name], weight) for name, weight in weights.items())


@pytest.mark.usefixtures("found")
def test_a_training_of_all_weights_goes_on_in_shards_and_without(folders: dict[int, Path]) -> None:
    """Two steps on one process, two on 2 in shards, two on one again: the weights of six in one session, with Adam."""
    *sessions, at_once = (torch.load(folders[1] / "elastic_full" / f"{n}.0.pt", weights_only=True) for n in range(4))
    assert [s["world"] for s in sessions] == [1, 2, 1]
    assert [s["charged"] for s in sessions] == [2, 4, 6]
    for number, session in enumerate(sessions):
        for ours, theirs in zip(session["updates"], at_once["updates"][2 * number :], strict=False):
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-5  # float32 sums in another order


def test_noise_has_nothing_to_do_with_the_seed_or_the_step_before(found: dict[int, Found]) -> None:
    steps = [step for name in ("noise", "noise_again") for step in found[1][name][0]["noise"].numpy()]
    for i, a in enumerate(steps):
        for b in steps[:i]:
            assert_uncorrelated(a, b)


def check_noise(by_name: Found) -> None:
    for step in by_name["noise"][0]["noise"].numpy():
        assert_gaussian(step, 1.5 * 0.4)


def test_the_noise_of_one_process(found: dict[int, Found]) -> None:
    check_noise(found[1])


@pytest.mark.slow
def test_the_noise_of_four_processes(tmp_path: Path) -> None:
    check_noise(results(tmp_path, 4, "noise"))


@pytest.mark.slow
def test_replicas_of_shards_give_the_same_update(tmp_path: Path) -> None:
    statuses, errors = run_groups(*([world, tmp_path / str(world), "replicas"] for world in (1, 4)))
    assert statuses == [[0], [0] * 4], errors[-2000:]
    alone = collected(tmp_path / "1", 1, "replicas")["replicas"][0]["update"]
    for process in collected(tmp_path / "4", 4, "replicas")["replicas"]:
        assert float((process["update"] - alone).norm() / alone.norm()) < 1e-5  # as above


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_way_gives_the_same_update_in_all_combinations(tmp_path: Path) -> None:
    name = "same_update_in_all_ways"
    groups = {1: name, 2: name, 3: "same_update"}  # three processes take the diagonal
    started = ([world, tmp_path / str(world), names] for world, names in groups.items())
    statuses, errors = run_groups(*started, seconds=1400)
    assert statuses == [[0] * world for world in groups], errors[-2000:]
    found = {world: collected(tmp_path / str(world), world, names)[names] for world, names in groups.items()}
    check_updates({world: found[world] for world in (1, 2)}, all_of_them=True)
    quick = {str(way) for way in invariance.ways(1, all_of_them=False)}
    alone = [{way: update for way, update in found[1][0].items() if way in quick}]
    check_updates({1: alone, 3: found[3]}, all_of_them=False)


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_shards_micro_batches_and_precision(tmp_path: Path) -> None:
    """Two steps on 2 processes in shards, two on one, two on 2 in bfloat16: the weights of six in one session."""
    statuses, errors = run_groups(*([world, tmp_path, "elastic"] for world in (2, 1, 2, 1)))
    assert statuses == [[0, 0], [0], [0, 0], [0]], errors
    *sessions, at_once = (torch.load(tmp_path / "elastic" / f"{n}.0.pt", weights_only=True) for n in range(4))
    for number in (0, 2):
        other = torch.load(tmp_path / "elastic" / f"{number}.1.pt", weights_only=True)
        assert (other["hashes"], other["world"]) == (sessions[number]["hashes"], 2)
    assert [s["charged"] for s in sessions] == [2, 4, 6]
    record = read_ledger(tmp_path / "one run" / LEDGER_NAME)
    assert [(s.sample_rate, s.joint_noise_multiplier, s.num_steps) for s in record.executed] == [(1.0, 0.0, 6)]
    expected = at_once["updates"]
    for number, tolerance in (
        (0, 1e-5),
        (1, 1e-5),
        (2, 1e-2),
    ):  # float32 sums in another order; a forward pass of 8 bits
        for ours, theirs in zip(sessions[number]["updates"], expected[2 * number :], strict=False):
            assert float((ours - theirs).norm() / theirs.norm()) < tolerance
    assert not torch.equal(sessions[2]["updates"][0], expected[4])  # it did run in bfloat16
