"""`hf-dp card`: a lost or spoilt card is made again from privacy.json, and nothing is made of a spoilt record."""

import json

import pytest
from typer.testing import CliRunner

from hf_dp.cli import app
from hf_dp.errors import ConfigError
from tests.support.folders import failures, model_folder

OWN = "# My model\n\nA text of my own.\n"


def test_a_lost_or_spoilt_card_is_made_again_beside_a_text_of_ones_own(tmp_path):
    folder = model_folder(tmp_path)
    before = (folder / "privacy.json").read_bytes()
    (folder / "README.md").write_text(OWN)
    (folder / "privacy_tradeoff.svg").unlink()
    assert failures(folder) != ""
    for _ in range(3):
        done = CliRunner().invoke(app, ["card", str(folder)])
        assert done.exit_code == 0, done.output
        assert failures(folder) == ""
    text = (folder / "README.md").read_text()
    assert OWN in text
    assert text.count("## Privacy: epsilon") == 1
    assert (folder / "privacy.json").read_bytes() == before


@pytest.mark.parametrize("spoilt", ["missing", "no JSON", "another form"])
def test_no_card_is_made_of_a_spoilt_record(spoilt, tmp_path):
    folder = model_folder(tmp_path)
    record = folder / "privacy.json"
    if spoilt == "missing":
        record.unlink()
    else:
        record.write_text("{" if spoilt == "no JSON" else json.dumps(json.loads(record.read_text()) | {"epsilon": -1}))
    before = (folder / "README.md").read_bytes()
    done = CliRunner().invoke(app, ["card", str(folder)])
    assert isinstance(done.exception, ConfigError)
    assert "privacy.json" in str(done.exception)
    assert (folder / "README.md").read_bytes() == before
