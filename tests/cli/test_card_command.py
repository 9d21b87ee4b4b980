"""`hf-dp card`: a lost or spoilt card is made again from privacy.json, and nothing is made of a spoilt record."""

import datetime
import json

import pytest
import yaml
from typer.testing import CliRunner

from hf_dp.cli import app
from hf_dp.errors import ConfigError
from tests.support.folders import failures, model_folder

REGISTRY_FIELDS = {  # of https://github.com/opendp/deployments-registry-data, schemas/deployments-schema.yaml
    "basic": {
        *("name", "data_curators", "intended_use", "data_product_type", "data_product_region", "description"),
        "publication_date",
    },
    "dp_variant": {"variant_name", "data_domain", "unprotected_quantities"},
    "privacy_loss": {"privacy_unit", "privacy_unit_details", "privacy_parameters", "privacy_parameters_details"},
    "deployment_model": {
        *("model_name", "actors", "release_type", "release_type_details", "data_source_type", "access_type"),
    },
    "accounting": {"post_processing", "composition"},
    "implementation": {"preprocessing_and_hyperparameter_tuning", "mechanisms", "justification"},
    "administrative": {"registry_authors"},
}
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


def test_an_entry_for_the_registry_has_its_form_and_what_the_record_knows(tmp_path):
    folder = model_folder(tmp_path / "notes")
    done = CliRunner().invoke(app, ["card", str(folder), "--registry"])
    assert done.exit_code == 0, done.output
    text = (folder / "dp_registry.yaml").read_text()
    entry = yaml.safe_load(text)
    assert (entry["url_slug"], entry["status"], entry["tier"]) == ("notes", "Draft", 3)
    assert {name: set(fields) for name, fields in entry["deployment"].items()} == REGISTRY_FIELDS
    assert all(
        isinstance(v, str | list | dict) and v for fields in entry["deployment"].values() for v in fields.values()
    )
    stated = json.loads((folder / "privacy.json").read_text())
    parameters = entry["deployment"]["privacy_loss"]["privacy_parameters"]
    assert stated["epsilon"] <= parameters["epsilon"] <= 1.001 * stated["epsilon"]
    assert parameters["delta"] == stated["delta"]
    assert entry["deployment"]["deployment_model"]["model_name"] == "Central"
    datetime.date.fromisoformat(entry["deployment"]["basic"]["publication_date"])
    assert failures(folder) == ""
    (folder / "dp_registry.yaml").write_text(text.replace("TO BE FILLED IN: who", "me, who"))
    again = CliRunner().invoke(app, ["card", str(folder), "--registry"])
    assert isinstance(again.exception, ConfigError)
    assert "me, who" in (folder / "dp_registry.yaml").read_text()


def test_a_model_without_a_guarantee_has_no_entry(tmp_path):
    folder = model_folder(tmp_path, sigma=0.0)
    done = CliRunner().invoke(app, ["card", str(folder), "--registry"])
    assert "no noise was added" in str(done.exception)
    assert not (folder / "dp_registry.yaml").exists()
