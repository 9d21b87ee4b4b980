"""`hf-dp push` against a Hub on loopback: what leaves, and that a failure is told and costs nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from folders import failures, model_folder
from hub_server import READ_ONLY_TOKEN, TOKEN, HubServer

HERE = Path(__file__).parent
COMMAND = """
import sys
from hf_dp.cli import main
sys.argv = ["hf-dp", *sys.argv[1:]]
try:
    main()
finally:
    print("torch" in sys.modules)
"""
NOBODY = "http://127.0.0.1:9"  # the port of `discard`, where nothing listens


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    made = model_folder(tmp_path / "model")
    (made / "adapter_model.safetensors").write_bytes(str(tmp_path).encode() * 100)  # not on the server already
    (made / "_privacy_fingerprint.key").write_bytes(b"a key that stays")
    (made / "checkpoint-2").mkdir()
    (made / "checkpoint-2" / "optimizer.pt").write_bytes(b"a state")
    return made


def push(hub, folder, repository, *options, token=TOKEN, **variables):
    environment = hub.environment(folder.parent / "home", token) | {"PYTHONPATH": f"{HERE.parent}", **variables}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "push", str(folder), repository, *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def snapshot(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_model_with_its_card_leaves_and_nothing_else(hub, folder, tmp_path):
    status, out, err = push(hub, folder, "me/pushed", "--private")
    assert status == 0, err
    assert "Pushed: " in out
    assert out.split()[-1] == "False"
    assert hub.repos["me/pushed"].private
    arrived = hub.files("me/pushed")
    expected = {
        "adapter_model.safetensors",
        "README.md",
        "privacy.json",
        "privacy_ledger.jsonl",
        "privacy_tradeoff.svg",
    }
    assert set(arrived) == expected
    copy = tmp_path / "copy"
    copy.mkdir()
    for path, content in arrived.items():
        (copy / path).write_bytes(content)
    assert failures(copy) == ""


def test_a_folder_that_does_not_verify_is_not_uploaded(hub, folder):
    record = json.loads((folder / "privacy.json").read_text())
    (folder / "privacy.json").write_text(json.dumps(record | {"epsilon": record["epsilon"] / 2}))
    status, _, err = push(hub, folder, "me/liar")
    assert status == 2
    assert "nothing was uploaded" in err
    assert "me/liar" not in hub.repos


FAILURES = {
    "a wrong token": ("me/none", {"token": "hf_wrong"}, "hf auth login"),
    "no token": ("me/none", {"token": None}, "hf auth login"),
    "a token that may only read": ("me/none", {"token": READ_ONLY_TOKEN}, "the token may write there"),
    "somebody else's name": ("other/none", {}, "an account of yours"),
    "no network": ("me/none", {"HF_ENDPOINT": NOBODY}, "network"),
    "a name that is none": ("a b/c/d", {}, "USER/MODEL"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_told_in_a_few_lines_and_the_folder_stays_as_it_was(name, hub, folder):
    repository, changed, remedy = FAILURES[name]
    before = snapshot(folder)
    status, _, err = push(hub, folder, repository, **changed)
    assert status == 2, err
    assert remedy in err
    assert "Traceback" not in err
    assert "hf_" not in err.replace("hf_dp", "")
    assert snapshot(folder) == before
    assert repository not in hub.repos


@pytest.mark.parametrize("fault", ["cut", "refuse"])
def test_an_interrupted_upload_is_told_or_goes_on_and_the_next_one_completes_it(fault, hub, folder):
    before, repository = snapshot(folder), f"me/after-{fault}"
    hub.faults[:] = [fault] * 20
    status, _, err = push(hub, folder, repository)
    hub.faults.clear()
    assert status == 2, err
    assert "was not pushed" in err
    assert "Traceback" not in err.splitlines()[-1]
    assert hub.files(repository) == {}
    assert snapshot(folder) == before
    assert push(hub, folder, repository)[0] == 0
    assert "adapter_model.safetensors" in hub.files(repository)
