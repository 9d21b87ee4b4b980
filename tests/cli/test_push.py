"""`hf-dp push` against a Hub on loopback: what leaves, and that a failure is told and costs nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_dp.accounting.selection import Selection
from hf_dp.card.what_leaves import CARD_FILES
from hf_dp.mechanism import Segment
from tests.support.folders import failures, model_folder
from tests.support.hub_server import READ_ONLY_TOKEN, TOKEN, HubServer, Repo
from tests.support.marks import quick

ROOT = Path(__file__).resolve().parents[2]
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
    return command(hub, folder.parent, "push", str(folder), repository, *options, token=token, **variables)


def command(hub, place, *arguments, token=TOKEN, **variables):
    """`hf-dp` in a process that takes `hub` for the Hub: exit status, stdout, stderr."""
    environment = hub.environment(place / "home", token) | {"PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        env=environment,
        cwd=place,
        capture_output=True,
        text=True,
        timeout=900,
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


STRAYS = {
    ".env": "TOKEN=a secret",
    "id_rsa": "a secret key",
    "train.jsonl": '{"text": "a secret record"}',
    "records.safetensors": "secret activations",
    "model-of-a-friend.safetensors": "secret weights",
    "training_args.bin": "a secret path",
    "trainer_state.json": '{"a": "secret"}',
    "optimizer.pt": "a secret state",
    "config.json.bak": "an old secret",
    "wandb/run-1/output.log": "a secret log",
    "runs/events.out": "a secret curve",
    "old/adapter_model.safetensors": "another secret model",
    "additional_chat_templates/notes.txt": "a secret note",
}
MODEL = ["config.json", "tokenizer.json", "chat_template.jinja", "additional_chat_templates/tools.jinja", "merges.txt"]


def test_what_else_lies_in_the_folder_is_left_behind_and_named(hub, folder, tmp_path):
    for path, content in {**STRAYS, **dict.fromkeys(MODEL, "of the model")}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "vocab.txt").write_text("a secret list")
    (folder / "vocab.txt").symlink_to(tmp_path / "outside" / "vocab.txt")
    (folder / "vocab.json").symlink_to(folder / ".env")
    (folder / "linked").symlink_to(tmp_path / "outside")
    status, out, err = push(hub, folder, "me/strays")
    assert status == 0, err
    arrived = hub.files("me/strays")
    assert set(arrived) == {"adapter_model.safetensors", *CARD_FILES, *MODEL}
    assert not any(
        text.encode() in content for text in [*STRAYS.values(), "a secret list"] for content in arrived.values()
    )
    told = out[out.index("Left behind") :].splitlines()[0]
    named = {path.partition("/")[0] + ("/" if "/" in path else "") for path in STRAYS}
    named = named - {"additional_chat_templates/"} | {"additional_chat_templates/notes.txt"}
    for name in (*named, "vocab.txt", "vocab.json", "linked/", "checkpoint-2/", "_privacy_fingerprint.key"):
        assert name in told, name


@pytest.mark.parametrize("name", quick(("privacy.json",), ["README.md", "privacy.json", "adapter_model.safetensors"]))
def test_a_model_is_not_uploaded_without_its_card_or_the_card_without_its_model(name, hub, folder, tmp_path):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    status, _, err = push(hub, folder, "me/linked")
    assert status == 2
    assert "symbolic links are not followed" in err
    assert "me/linked" not in hub.repos


def test_a_folder_that_does_not_verify_is_not_uploaded(hub, folder):
    record = json.loads((folder / "privacy.json").read_text())
    (folder / "privacy.json").write_text(json.dumps(record | {"epsilon": record["epsilon"] / 2}))
    status, _, err = push(hub, folder, "me/liar")
    assert status == 2
    assert "nothing was uploaded" in err
    assert "me/liar" not in hub.repos


@pytest.mark.slow
def test_a_model_that_a_sweep_selected_arrives_with_the_epsilon_of_the_choice(hub, tmp_path):
    selection = Selection("geometric", 4.0, ((Segment(0.05, 1.0, 12),),), 30.0)
    whole = model_folder(tmp_path / "selected", selection=selection)
    (whole / "adapter_model.safetensors").write_bytes(str(tmp_path).encode() * 100)
    status, _, err = push(hub, whole, "me/selected")
    assert status == 0, err
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in hub.files("me/selected").items():
        (copy / name).write_bytes(content)
    assert failures(copy) == ""
    stated = json.loads((copy / "privacy.json").read_text())
    assert stated["selection"]["distribution"] == "geometric"
    one_run = json.loads((model_folder(tmp_path / "alone") / "privacy.json").read_text())
    assert stated["epsilon"] > one_run["epsilon"]


FAILURES = {
    "a wrong token": ("me/none", {"token": "hf_wrong"}, "hf auth login"),
    "no token": ("me/none", {"token": None}, "hf auth login"),
    "a token that may only read": ("me/none", {"token": READ_ONLY_TOKEN}, "the token may write there"),
    "somebody else's name": ("other/none", {}, "an account of yours"),
    "no network": ("me/none", {"HF_ENDPOINT": NOBODY}, "network"),
    "a name that is none": ("a b/c/d", {}, "USER/MODEL"),
}


@pytest.mark.parametrize("name", quick(("a wrong token",), FAILURES))
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", [pytest.param("cut", marks=pytest.mark.slow), "refuse"]
)  # cut: the client tries on for half a minute
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


# ---- reading: verify and report of a repository ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory):
    """A private repository with a model, its configuration, and a log in its checkpoint."""
    made = model_folder(tmp_path_factory.mktemp("published") / "model")
    files = {p.name: p.read_bytes() for p in made.iterdir()}
    files["adapter_config.json"] = b'{"base_model_name_or_path": "gpt2", "peft_type": "LORA", "r": 4}'
    log = {"global_step": 2, "log_history": [{"step": 1, "eval_loss": 3.5}, {"step": 2, "eval_loss": 3.0}]}
    files["last-checkpoint/trainer_state.json"] = json.dumps(log).encode()
    hub.repos["me/private"] = Repo(private=True)
    hub.repos["me/private"].commits.append(("ab" * 20, "model", files))
    return "me/private"


UNREADABLE = {
    "a private one, without a token": ("me/private", {"token": None}, ["401", "hf auth login"]),
    "a private one, with a wrong token": ("me/private", {"token": "hf_wrong"}, ["401", "hf auth login"]),
    "none of this name": ("me/none", {}, ["404", "See that the name is right"]),
    "no network": ("me/private", {"HF_ENDPOINT": NOBODY}, ["network and the Hub"]),
    "offline by a setting": ("me/private", {"HF_HUB_OFFLINE": "1"}, ["network and the Hub"]),
    "a name that is none": ("a b/c/d", {}, ["neither a folder nor a repository"]),
}


@pytest.mark.parametrize("verb", quick(("verify",), ["verify", "report"]))
@pytest.mark.parametrize("name", quick(("none of this name",), UNREADABLE))
def test_a_repository_that_cannot_be_read_is_told_in_a_few_lines(name, verb, hub, published, tmp_path):
    repository, changed, words = UNREADABLE[name]
    status, out, err = command(hub, tmp_path, verb, repository, **changed)
    assert status == 2, err
    assert out.strip() == "False"  # no torch, and no verdict
    for word in [*words, repository, "hf-dp: "]:
        assert word in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 2, err
    assert "hf_wrong" not in err
    assert [p.name for p in tmp_path.iterdir() if p.name != "home"] == []


def test_a_repository_has_a_report_with_its_base_and_the_log_of_its_checkpoint(hub, published, tmp_path):
    status, out, err = command(hub, tmp_path, "report", published)
    assert status == 0, err
    assert out.split()[:2] == ["Report:", "me_private-privacy.html"]
    page = (tmp_path / "me_private-privacy.html").read_text(encoding="utf-8")
    for words in ("Privacy report: me/private", "Verified.", "gpt2", "LoRA of rank 4", "evaluation loss"):
        assert words in page
    assert str(tmp_path) not in page


def test_a_repository_without_a_record_is_told(hub, tmp_path):
    hub.repos["me/plain"] = Repo(private=False)
    status, _, err = command(hub, tmp_path, "verify", "me/plain")
    assert status == 2
    assert "me/plain has no privacy.json" in err
