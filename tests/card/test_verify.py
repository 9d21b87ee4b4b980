"""Verification believes nothing: a sound folder passes, and every tampered one is named for what is wrong with it."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_dp.card import writing as card
from hf_dp.card.verification import verify
from hf_dp.cli import app
from hf_dp.ledger.ledger import LEDGER_NAME
from tests.support.folders import N, failures, model_folder
from tests.support.marks import quick

Edit = Callable[[dict], object]


@pytest.mark.parametrize("settings", [{}, {"sigma": 0.0}, {"debug": True}, {"steps": 0}, {"steps": 3}])
def test_what_a_run_leaves_is_verified(settings: dict, tmp_path: Path) -> None:
    assert failures(model_folder(tmp_path, **settings)) == ""


def test_without_the_ledger_the_rest_is_verified_and_that_is_said(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    (folder / LEDGER_NAME).unlink()
    assert failures(folder) == ""
    assert any(c.name == "the ledger" and "not in this folder" in c.found for c in verify(folder))


def segment(name: str, value: object) -> Edit:
    return lambda r: r["segments"][0].update({name: value})


def field(name: str, value: object) -> Edit:
    return lambda r: r.update({name: value})


def setting(name: str, value: object) -> Edit:
    return lambda r: r["mechanism"].update({name: value})


JSON_EDITS: dict[str, tuple[Edit, str]] = {
    "epsilon-lower": (lambda r: r.update(epsilon=r["epsilon"] * 0.9), "epsilon, computed again"),
    "epsilon-a-little-lower": (lambda r: r.update(epsilon=r["epsilon"] * 0.9999), "epsilon, computed again"),
    "epsilon-higher": (lambda r: r.update(epsilon=r["epsilon"] * 1.5), "epsilon, computed again"),
    "epsilon-pld": (lambda r: r.update(epsilon_pld=0.1), "epsilon_pld, computed again"),
    "epsilon-rdp": (lambda r: r.update(epsilon_rdp=0.1), "epsilon_rdp, computed again"),
    "epsilon-nan": (field("epsilon", math.nan), "epsilon: 'NaN' is not"),
    "epsilon-a-word": (field("epsilon", "infinite"), "epsilon: 'infinite' is not of type 'number'"),
    "epsilon-missing": (lambda r: r.pop("epsilon"), "'epsilon' is a required property"),
    "delta": (field("delta", 5e-4), "epsilon, computed again"),
    "delta-too-large": (field("delta", 0.01), "delta is below 1 / N"),
    "delta-negative": (field("delta", -1e-4), "delta: -0.0001 is less than"),
    "sigma": (segment("noise_multiplier", 2.0), "epsilon of the steps taken, computed again"),
    "sigma-negative": (segment("noise_multiplier", -1.0), "noise_multiplier: -1.0 is less than"),
    "sigma-nan": (segment("noise_multiplier", math.nan), "segments.0.noise_multiplier: 'NaN' is not"),
    "q": (segment("sample_rate", 0.01), "q = B / N in every segment"),
    "q-and-b": (
        lambda r: r["segments"][0].update(sample_rate=0.01, expected_batch_size=10),
        "epsilon of the steps taken, computed again",
    ),
    "steps": (segment("num_steps", 3), "steps of the segments add up"),
    "steps-everywhere": (
        lambda r: (r.update(num_steps=3), r["segments"][0].update(num_steps=3)),
        "steps in the ledger and in privacy.json",
    ),
    "plan-shorter": (lambda r: r["plans"][0][0].update(num_steps=3), "plans in the ledger"),
    "plan-dropped": (lambda r: r["plans"].clear(), "steps taken have a plan"),
    "plan-without-steps": (lambda r: r["plans"][0].clear(), "plans.0: [] should be non-empty"),
    "epsilon-of-steps": (lambda r: r.update(epsilon_of_steps_taken=0.1), "epsilon of the steps taken, computed again"),
    "clip-norm": (segment("clip_norm", 5.0), "segments in the ledger"),
    "clip-norm-zero": (segment("clip_norm", 0.0), "segments.0.clip_norm: 0.0 is less than or equal"),
    "segment-dropped": (lambda r: r["segments"].clear(), "steps of the segments add up"),
    "segment-field": (lambda r: r["segments"][0].pop("clip_norm"), "segments.0: 'clip_norm' is a required"),
    "examples": (setting("num_examples", 10 * N), "q = B / N in every segment"),
    "examples-a-word": (setting("num_examples", "many"), "mechanism.num_examples: 'many' is not of type 'integer'"),
    "target": (setting("target_epsilon", 0.5), "epsilon is within the target"),
    "unit": (field("unit", "user"), "N, unit, relation, delta"),
    "relation": (field("relation", "replace-one"), "the neighbouring relation"),
    "private-off": (field("private", False), "epsilon: 'infinite' was expected"),
    "schema": (field("schema_version", 99), "schema_version is 99, at most 4 is known here"),
    "unknown-field": (field("epsilon_true", 1.0), "'epsilon_true' was unexpected"),
    "ledger-head": (lambda r: r["ledger"].update(head="00" * 32), "head of the ledger"),
    "assumptions": (lambda r: r["assumptions"].clear(), "assumptions: [] should be non-empty"),
    "not-covered": (lambda r: r["not_covered"].pop(), "the card's section in words"),
}


@pytest.mark.parametrize("name", quick({*[*JSON_EDITS][::3]}, JSON_EDITS))
def test_an_edited_record_is_caught(name: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    path = folder / card.PRIVACY_JSON
    edit, what = JSON_EDITS[name]
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))
    assert what in failures(folder)


def test_a_record_edited_with_card_and_all_is_caught_by_the_ledger(tmp_path: Path) -> None:
    """Epsilon, segments, card, YAML all made to fit twice the noise: only the ledger tells."""
    folder, other = model_folder(tmp_path / "a"), model_folder(tmp_path / "b", sigma=2.0)
    for name in (card.PRIVACY_JSON, card.PICTURE, "README.md"):
        (folder / name).write_bytes((other / name).read_bytes())
    assert "segments in the ledger and in privacy.json" in failures(folder)
    (folder / LEDGER_NAME).unlink()
    assert failures(folder) == ""  # without it, no computation can tell: documented in verify's first lines


def test_a_debugging_run_dressed_up_as_private_is_caught(tmp_path: Path) -> None:
    folder, sound = model_folder(tmp_path / "a", debug=True), model_folder(tmp_path / "b")
    for name in (card.PRIVACY_JSON, card.PICTURE, "README.md"):
        (folder / name).write_bytes((sound / name).read_bytes())
    assert "a debugging run claims nothing" in failures(folder)


BEGIN = "<!-- hf_dp: privacy section, start"
README_EDITS = {
    "epsilon-in-yaml": ("epsilon: ", "epsilon: 0."),
    "epsilon-in-words": ("## Privacy: epsilon ", "## Privacy: epsilon 0."),
    "tag": ("differential-privacy", "something"),
    "end-mark": ("<!-- hf_dp: privacy section, end -->", ""),
    "not-covered": ("Side channels", "Nothing"),
    "twice-in-yaml": ("---\n", "---\nprivacy:\n  epsilon: 0.01\n"),
    "another-heading": (
        "<!-- hf_dp: privacy section, start",
        "## Privacy: epsilon 0.01\n\n<!-- hf_dp: privacy section, start",
    ),
    "hidden": (BEGIN, f"<details hidden>\n\n{BEGIN}"),
}


@pytest.mark.parametrize("name", README_EDITS)
def test_an_edited_card_is_caught(name: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    old, new = README_EDITS[name]
    text = (folder / "README.md").read_text()
    assert old in text
    (folder / "README.md").write_text(text.replace(old, new, 1))
    assert "the card's" in failures(folder)


def test_a_missing_card_and_a_card_with_text_of_ones_own(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    readme = folder / "README.md"
    readme.write_text(readme.read_text() + "\n## My own words\n\nA bird model.\n")
    assert failures(folder) == ""
    readme.unlink()
    assert "the card's YAML block" in failures(folder)


@pytest.mark.parametrize("cut", [1, 40, 400])
def test_a_cut_ledger_is_caught(cut: int, tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    path = folder / LEDGER_NAME
    path.write_bytes(path.read_bytes()[:-cut])
    assert "ledger" in failures(folder) or cut == 1  # a missing newline is no missing step


def test_a_flipped_bit_in_the_ledger_is_caught(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    path = folder / LEDGER_NAME
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    assert "the ledger's hash chain holds" in failures(folder)


def test_the_command_says_yes_or_no_and_its_status_too(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    done = CliRunner().invoke(app, ["verify", str(folder)])
    assert done.exit_code == 0
    assert "Verified" in done.output
    record = json.loads((folder / card.PRIVACY_JSON).read_text())
    (folder / card.PRIVACY_JSON).write_text(json.dumps({**record, "epsilon": 0.1}))
    done = CliRunner().invoke(app, ["verify", str(folder)])
    assert done.exit_code == 1
    assert "NOT VERIFIED: epsilon, computed again" in done.output


@pytest.mark.parametrize("what", ["nothing", "broken", "no-such/repository-here"])
def test_what_cannot_be_read_is_a_users_error(what: str, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / card.PRIVACY_JSON).write_text("{")
    model = str(tmp_path / what) if (tmp_path / what).is_dir() else what
    code = "import sys; from hf_dp.cli import main; sys.argv = ['hf-dp', 'verify', sys.argv[1]]; main()"
    done = subprocess.run([sys.executable, "-c", code, model], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("hf-dp: ")


def test_no_torch_is_imported(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    code = (
        f"import sys; from hf_dp.card import verify; from pathlib import Path; verify(Path({str(folder)!r}));"
        "print(*[m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_what_was_found_is_told_in_words(tmp_path):
    folder = model_folder(tmp_path)
    for spoilt in (False, True):
        if spoilt:
            record = json.loads((folder / "privacy.json").read_text())
            record["mechanism"]["clip_norm"] = 0.5
            (folder / "privacy.json").write_text(json.dumps(record))
        told = " ".join(check.found for check in verify(folder))
        assert not re.search(r"[{}\[\]']", told), told
    assert "found clip norm: 0.1, expected clip norm: 0.5" in told
