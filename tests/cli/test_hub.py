"""The whole way over HTTP: train, push, download in a fresh process, load with plain libraries, verify."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_dp.ledger.fingerprints import KEY_NAME
from tests.support import push_runs
from tests.support.folders import failures
from tests.support.hub_server import TOKEN, HubServer

ROOT = Path(__file__).resolve().parents[2]
CARD = {"README.md", "privacy.json", "privacy_tradeoff.svg", "privacy_ledger.jsonl"}
WEIGHTS = {
    "lora": {"adapter_config.json", "adapter_model.safetensors"},
    "full": {"config.json", "generation_config.json", "model.safetensors"},
}
CHECKPOINT = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "privacy_complete.json"}
STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")
RUNS = [f"{kind}-{strategy}" for kind in WEIGHTS for strategy in STRATEGIES]
QUICK = ["lora-all_checkpoints", "full-end"]
REST = [name for name in RUNS if name not in QUICK]
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
base = sys.argv[1]
for name in sys.argv[2:]:
    if name.startswith("lora"):
        from peft import PeftModel
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "me/" + name)
    else:
        model = AutoModelForCausalLM.from_pretrained("me/" + name)
    print(name, model(input_ids=torch.tensor([[5, 6, 7]])).logits.norm().item())
assert "hf_dp" not in sys.modules
"""
COMMAND = "import sys; from hf_dp.cli import main; sys.argv = ['hf-dp', *sys.argv[1:]]; main()"


def run(hub, home, *arguments, token=TOKEN):
    """A process that takes `hub` for the Hub."""
    environment = hub.environment(home, token) | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


GROUPS = [pytest.param(QUICK, id="some"), pytest.param(REST, id="rest")]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=GROUPS)
def trained(request, tmp_path_factory):
    """Runs, pushed to one server: the server, the folder that stayed, and the names of the runs."""
    folder = tmp_path_factory.mktemp("pushed")
    with HubServer() as hub:
        done = run(hub, folder / "home", "-m", push_runs.__name__, folder, *request.param)
        assert done.returncode == 0, done.stdout + done.stderr
        yield hub, folder, request.param


def test_what_arrives_is_this_list_and_nothing_else(trained):
    hub, _, names = trained
    for name in names:
        kind, strategy = name.split("-")
        expected = CARD | WEIGHTS[kind]
        checkpoint = expected | CHECKPOINT
        folders = {"checkpoint": ["last-checkpoint"], "all_checkpoints": ["checkpoint-2", "checkpoint-4"]}
        expected |= {f"{folder}/{file}" for folder in folders.get(strategy, []) for file in checkpoint}
        assert set(hub.uploaded(f"me/{name}")) == expected, name


def test_another_process_downloads_and_loads_without_hf_dp(trained, tmp_path):
    hub, folder, names = trained
    done = run(hub, tmp_path, "-c", LOAD, folder / "base", *names)
    assert done.returncode == 0, done.stderr
    norms = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith(tuple(names))]
    assert len(norms) == len(set(norms)) == len(names)  # noise is fresh: no two runs end alike


def test_another_process_verifies_what_it_downloads(trained, tmp_path):
    hub, _, names = trained
    done = run(hub, tmp_path, "-c", COMMAND, "verify", f"me/{names[0]}")
    assert done.returncode == 0, done.stderr
    assert "Verified" in done.stdout
    assert "4 steps" in done.stdout  # the ledger came along


def test_every_commit_with_a_model_in_it_has_a_card_that_verifies(trained, tmp_path):
    """In the middle of a training too: record, card and ledger of one step."""
    hub, _, names = trained
    for name in names:
        weights = "adapter_model.safetensors" if name.startswith("lora") else "model.safetensors"
        seen = set()
        for oid, message, files in hub.repos[f"me/{name}"].commits:
            for folder in {path.rpartition(weights)[0] for path in files if path.endswith(weights)}:
                place = tmp_path / name / oid / folder
                place.mkdir(parents=True)
                for file in CARD:
                    assert folder + file in files, f"{message}: {folder}{file} is missing"
                    (place / file).write_bytes(files[folder + file])
                assert failures(place) == "", f"{name}: {message}: {folder}"
                seen.add(json.loads((place / "privacy.json").read_text())["num_steps"])
        assert seen == ({4} if name.endswith("-end") else {2, 4})


def test_no_key_no_token_and_no_private_statistic_leaves(trained):
    """By content and by name, strays in the folder too; grad_norm is that of the released gradient.

    Numbers of the data are looked for in test_secrets.py.
    """
    hub, folder, names = trained
    private = re.compile(rb'"(train_loss|loss|batch_size|num_input_tokens_seen|total_flos)": *(?!0\b|0\.0\b)[\d.e+-]+')
    for name in names:
        key = (folder / name / KEY_NAME).read_bytes()
        for path, contents in hub.uploaded(f"me/{name}").items():
            assert KEY_NAME not in path
            for content in contents:
                for secret in (push_runs.STRAY.encode(), key, key.hex().encode(), TOKEN.encode()):
                    assert secret not in content, path
                if path.endswith(".json"):
                    assert private.search(content) is None, path
