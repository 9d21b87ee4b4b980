"""`hf-dp report`: one page that needs nothing else, tells nothing private and claims nothing unverified."""

import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_dp.audit.report import AuditRecord
from hf_dp.card.record import Record
from hf_dp.card.report import curves
from hf_dp.card.report.page import page
from hf_dp.card.report.training import losses, trained
from hf_dp.card.schema import read_record
from hf_dp.card.verification import verify
from hf_dp.cli import app
from hf_dp.errors import ConfigError
from hf_dp.pictures.line_chart import Axes, line_chart, ticks
from tests.support import browser
from tests.support.folders import STEPS, model_folder
from tests.support.marks import quick

DATA = Path(__file__).parents[1] / "support" / "data"
HOSTILE = "<script>alert(1)</script>\"'><img src=http://evil.example/x onerror=alert(2)>&amp;$name"
LOSS, EVAL_LOSS = 3.14159, 2.71828


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Epsilon at two points of its curve; each costs two accountants' time."""
    monkeypatch.setattr(curves, "POINTS", 2)


def folder_with_log(folder: Path, *, log: list[dict] | None = None, **settings) -> Path:
    """A model with its adapter's configuration, and a checkpoint with a log of all that must not be told, or may."""
    made = model_folder(folder, **settings)
    adapter = {"base_model_name_or_path": "/home/owner/gpt2", "peft_type": "LORA", "r": 16, "task_type": "CAUSAL_LM"}
    (made / "adapter_config.json").write_text(json.dumps(adapter | {"target_modules": ["q_proj", "k_proj"]}))
    entries = [
        {"step": s, name: value / s, "epsilon": 1.0}
        for s in range(1, STEPS + 1)
        for name, value in (("loss", LOSS), ("eval_loss", EVAL_LOSS))
    ]
    place = made / f"checkpoint-{STEPS}"
    place.mkdir()
    state = {"global_step": STEPS, "log_history": entries if log is None else log}
    (place / "trainer_state.json").write_text(json.dumps(state))
    return made


def report(folder: Path) -> tuple[int, str]:
    """Exit status and page."""
    output = folder.parent / "page.html"
    done = CliRunner().invoke(app, ["report", str(folder), "--output", str(output)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, output.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def in_words(page: str) -> str:
    return " ".join(Elements(page).text.split())


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_the_page_says_what_was_trained_claimed_and_checked(tmp_path):
    folder = folder_with_log(tmp_path / "model", loss_bound=10.0)
    status, page = report(folder)
    record, text = read_record(folder), in_words(page)
    assert status == 0
    for words in (
        "Verified. All 28 checks passed",
        "epsilon 1.31 at delta 0.0001",
        "gpt2 (a local folder)",
        "LoRA of rank 16 on k_proj, q_proj",
        "training loss, with noise, inside epsilon",
        "evaluation loss, on data declared public",
        record["ledger"]["head"],
        record["mechanism"]["noise_generator"],
        "No audit was run",
        "hf_dp 0",
        "hf-dp verify FOLDER_OR_REPOSITORY",
        "SHA-256 of privacy.json",
        *record["assumptions"],
        *record["covered"],
        *record["not_covered"],
    ):
        assert " ".join(words.split()) in text, words
    assert "/home/" not in page
    assert str(tmp_path) not in page
    assert page.count("FAILED") == 0


def test_the_code_on_the_page_computes_epsilon_without_hf_dp(tmp_path, capsys):
    folder = model_folder(tmp_path / "model")
    _, page = report(folder)
    code = Elements(page).text.split("Google's dp-accounting:")[1].split("# ")[0]
    assert "hf_dp" not in code
    exec(code, {})
    stated = read_record(folder)["epsilon_pld"]
    assert float(capsys.readouterr().out) == pytest.approx(stated, rel=5e-3)  # another grid than the record's


def test_an_audit_in_the_record_is_shown_number_by_number(tmp_path):
    folder = model_folder(tmp_path / "model")
    audit = AuditRecord("gradient", 10, HOSTILE, 0.95, ((1, 1),), 0.5, None, 0.25, 0.0, 1.0, 1.0, False)
    record = replace(Record.of(read_record(folder)), audit=audit)
    text = in_words(page(folder, "model", record, verify(folder)))
    assert "No audit was run" not in text
    assert f"method{HOSTILE} confidence0.95" in text  # two cells each
    assert "epsilon at least0.25" in text


@pytest.mark.parametrize("version", ["schema_1", "schema_1_not_private"])
def test_records_of_version_1_have_a_page_too(version, tmp_path):
    folder = Path(shutil.copytree(DATA / version, tmp_path / version))
    status, page = report(folder)
    assert status == 0
    assert ("NOT PRIVATE" in page) == ("not_private" in version)
    assert ("The best attacker" in page) == ("not_private" not in version)


def test_without_a_guarantee_the_page_says_so_in_red_and_shows_no_number_of_the_training(tmp_path):
    status, page = report(folder_with_log(tmp_path / "model", sigma=0.0, loss_bound=10.0))
    assert status == 0  # the folder says the same
    assert Elements(page).tags[[t for t, _ in Elements(page).tags].index("h1") + 1][1]["class"] == "verdict bad"
    text = in_words(page)
    assert "NOT PRIVATE. This model carries no privacy guarantee: no noise was added" in text
    assert "What is claimed" not in text
    assert "<svg" not in page


def edited(folder: Path, **fields) -> None:
    path = folder / "privacy.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("spoilt", ["epsilon", "form", "ledger", "rates"])
def test_what_is_not_verified_is_said_in_red_on_top_and_nothing_is_claimed(spoilt, tmp_path):
    folder = folder_with_log(tmp_path / "model", loss_bound=10.0)
    if spoilt == "epsilon":
        edited(folder, epsilon=0.5)
    elif spoilt == "form":
        edited(folder, mechanism=HOSTILE, segments=HOSTILE)
    elif spoilt == "rates":
        edited(folder, tradeoff=read_record(folder)["tradeoff"] | {"true_positive_rates": [0.0]})
    else:
        ledger = folder / "privacy_ledger.jsonl"
        ledger.write_bytes(ledger.read_bytes().replace(b'"n":3', b'"n":4'))
    status, page = report(folder)
    assert status == 1
    tags = [t for t, _ in Elements(page).tags]
    assert Elements(page).tags[tags.index("h1") + 1] == ("div", {"class": "verdict bad", "role": "alert"})
    text = in_words(page)
    assert "NOT VERIFIED." in text
    assert "FAILED" in text
    assert "What is claimed" not in text
    assert "<svg" not in page
    assert str(tmp_path) not in page


def test_a_folder_that_is_none_leaves_no_page(tmp_path):
    for model, message in ((tmp_path, "has no privacy.json"), (tmp_path / "none", "neither a folder")):
        done = CliRunner().invoke(app, ["report", str(model), "--output", str(tmp_path / "page.html")])
        assert isinstance(done.exception, ConfigError)
        assert message in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_is_an_error_and_the_old_one_stays(tmp_path, monkeypatch):
    folder, old = model_folder(tmp_path / "model"), tmp_path / "page.html"
    old.write_text("old")
    done = CliRunner().invoke(app, ["report", str(folder), "--output", str(tmp_path / "none" / "page.html")])
    assert isinstance(done.exception, ConfigError)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    done = CliRunner().invoke(app, ["report", str(folder), "--output", str(old)])
    assert isinstance(done.exception, ConfigError)
    assert "No space left" in str(done.exception)
    assert old.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "page.html"]


def test_the_command_needs_no_torch_and_writes_beside_you(tmp_path):
    model_folder(tmp_path / "model")
    code = (
        "import sys; from hf_dp.cli import main; sys.argv = ['hf-dp', 'report', 'model']\n"
        "try: main()\nfinally: print({'torch', 'matplotlib'} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": str(DATA.parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["Report: model-privacy.html", "set()"]
    assert (tmp_path / "model-privacy.html").is_file()


# ---- what it must not say --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_bound", [None, 10.0])
@pytest.mark.parametrize("public_eval", [False, True])
def test_only_noised_and_public_losses_are_drawn(loss_bound, public_eval, tmp_path):
    folder = folder_with_log(tmp_path / "model", loss_bound=loss_bound, public_eval=public_eval)
    found = losses(folder, Record.of(read_record(folder)))
    assert {name.split()[0]: points[0] for name, points in found.lines.items()} == (
        ({"training": (1.0, LOSS)} if loss_bound else {}) | ({"evaluation": (1.0, EVAL_LOSS)} if public_eval else {})
    )
    said = " ".join(found.notes)
    assert ("was not released" in said) == (loss_bound is None)
    assert ("were not declared public" in said) == (not public_eval)
    _, page = report(folder)
    assert ("optimizer step" in page) == bool(found.lines)
    assert all(note in in_words(page) for note in found.notes)


def test_a_log_that_is_not_of_this_run_or_holds_nonsense_is_not_drawn(tmp_path):
    log = [
        {"step": 1, "loss": LOSS},  # of a plain Trainer: no epsilon beside it
        {"step": 2, "loss": math.nan, "epsilon": 1},
        {"step": 3, "loss": HOSTILE, "epsilon": 1},
        {"step": HOSTILE, "loss": 1.0, "epsilon": 1},
        {"step": 4, "eval_loss": EVAL_LOSS, "eval_not_covered_by_privacy": 1.0},
        {"step": 5, "eval_loss": 10**400},
        {"step": 6, "eval_loss": True},
        HOSTILE,
    ]
    folder = folder_with_log(tmp_path / "model", log=log, loss_bound=10.0)
    assert losses(folder, Record.of(read_record(folder))).lines == {}
    assert "The log holds no loss that may be shown." in in_words(report(folder)[1])
    for spoilt in ("{", "[]", '{"global_step": 1, "log_history": 3}', "[" * 100_000):
        (folder / f"checkpoint-{STEPS}" / "trainer_state.json").write_text(spoilt)
        assert (
            losses(folder, Record.of(read_record(folder))).notes[0].startswith("No loss is drawn: neither this folder")
        )


def test_the_log_that_came_furthest_is_drawn(tmp_path):
    folder = folder_with_log(tmp_path / "model")
    late = {"global_step": STEPS + 1, "log_history": [{"step": 13, "eval_loss": 1.5}, {"step": 13, "eval_loss": 1.0}]}
    (folder / "trainer_state.json").write_text(json.dumps(late))
    assert list(losses(folder, Record.of(read_record(folder))).lines.values()) == [[(13.0, 1.0)]]


@pytest.mark.parametrize("broken", [False, True])
def test_every_word_from_a_file_is_escaped(broken, tmp_path):
    folder = model_folder(tmp_path / HOSTILE.replace("/", ":"), loss_bound=10.0)
    clean = Elements(report(model_folder(tmp_path / "clean", loss_bound=10.0))[1])
    names = "base_model_name_or_path peft_type r task_type".split()
    adapter = {name: HOSTILE for name in names} | {"target_modules": [HOSTILE], "modules_to_save": HOSTILE}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "config.json").write_text(json.dumps({"architectures": [HOSTILE]}))
    if broken:
        edited(folder, unit=HOSTILE, relation=HOSTILE, reason=HOSTILE, assumptions=[HOSTILE], libraries={HOSTILE: "1"})
        edited(folder, mechanism=read_record(folder)["mechanism"] | {"released": HOSTILE})
    page = Elements(report(folder)[1])
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in clean.tags}
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count("<script>alert(1)") >= (5 if broken else 4)  # as text, and to the letter
    assert "$name" in page.text


def test_the_page_loads_nothing(tmp_path):
    _, page = report(folder_with_log(tmp_path / "model", loss_bound=10.0))
    loading = {"src", "srcset", "href", "data", "action", "poster", "background", "xlink:href"}
    links = [(tag, a[name]) for tag, a in Elements(page).tags for name in loading & set(a)]
    assert links == [("link", "data:,")]  # the icon, which a browser would ask for
    assert not {"script", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in Elements(page).tags}
    assert not re.search(r"url\(|@import", page)
    assert set(re.findall(r"\w+://[^\s\"<]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert len(page) < 60_000


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("gpt2", "gpt2"),
        ("/home/me/gpt2/", "gpt2 (a local folder)"),
        ("./gpt2", "gpt2 (a local folder)"),
        ("a/b/gpt2", "gpt2 (a local folder)"),
        ("C:\\Users\\me\\gpt2", "gpt2 (a local folder)"),
        (None, "not stated"),
        (7, "not stated"),
    ],
)
def test_of_a_base_in_a_local_folder_only_the_last_name_is_told(name, base, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
    assert trained(tmp_path)["base model"] == base


# ---- how it looks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", quick(("verified",), ["verified", "failed", "long words"]))
def test_a_browser_shows_it_wide_narrow_light_and_dark(kind, tmp_path):
    """WCAG 2.1 AA: contrast of 4.5 and more. Nothing is wider than the window, loaded, cut off, or complained about."""
    folder = folder_with_log(tmp_path / ("m" * 200 if kind == "long words" else "model"), loss_bound=10.0)
    if kind == "failed":
        edited(folder, epsilon=0.5)
    frames, console = browser.look(report(folder)[1], tmp_path)
    assert console == []
    assert [(f["width"], f["dark"]) for f in frames] == [(w, dark) for dark in (False, True) for w in (1280, 390)]
    for frame in frames:
        assert frame["texts"] > 100
        assert frame["worst"][0] >= 4.5, frame
        assert frame["scroll"] <= frame["width"], frame
        assert frame["loaded"] == []
        assert frame["outside"] == []
        assert kind == "failed" or frame["smallest"] >= 12  # pixels of a plot's words, ascenders to descenders


def test_the_browser_sees_what_is_wrong(tmp_path):
    page = (
        '<!DOCTYPE html><p style="color: #999">pale</p><p style="width: 900px">wide</p><img src="file:///none.png">'
        '<svg class="chart" width="20" height="20"><text y="15">cut off</text></svg>'
    )
    narrow = browser.look(page, tmp_path)[0][1]
    assert narrow["worst"][0] == pytest.approx(2.85, abs=0.01)  # (1 + .05) / (.3185 + .05)
    assert narrow["scroll"] > 390
    assert narrow["outside"] == ["cut off"]


@pytest.mark.parametrize("low", [0.0, -0.3, 5.0])
@pytest.mark.parametrize("span", [7e-4, 1.0, 2.4, 8.3, 12.0, 410.0, 20_000.0])
def test_an_axis_has_a_few_round_numbers_within_it(low, span):
    found = ticks(low, low + span)
    assert 2 <= len(found) <= 7
    assert low - 1e-9 <= found[0] < found[-1] <= low + span + 1e-9
    step = found[1] - found[0]
    assert all(b - a == pytest.approx(step) for a, b in pairwise(found))
    assert f"{step:.0e}"[0] in "125"


def test_a_long_line_is_thinned_and_keeps_its_end():
    chart = line_chart({"a": [(float(i), 1.0) for i in range(5001)]}, Axes("t", "x", "y"))
    points = re.search(r'class="line line-0" d="([^"]*)"', chart)[1].split(" L ")
    assert len(points) <= 302
    assert points[-1].split()[0] == "380.0"  # the frame's right side


def test_a_discrete_run_is_computed_again_at_whole_orders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_folder(tmp_path, noise="discrete")
    record = read_record(folder)
    text = html.unescape(page(folder, "model", Record.of(record), verify(folder)))
    code = re.search(r"<pre>(from dp_accounting.*?)</pre>", text, re.DOTALL)[1]
    exec(code, {})
    assert float(capsys.readouterr().out) == pytest.approx(record["epsilon"], rel=1e-6)
    assert "PLDAccountant" not in code
