"""`hf-dp compare`: both models side by side; what is planted is found without privacy, and what follows is said."""

import json

import pytest
import yaml

from hf_dp.cli.comparing import Leaks, statement
from hf_dp.cli.planted import MOST_BITS
from tests.support import recipes as R

FEW = {"training__per_device_train_batch_size": 128, "training__output_dir": "never-made"}


def test_secrets_that_the_plain_model_knows_by_heart_and_the_private_one_hardly(hf_dp, tmp_path):
    whole = R.sections(
        tmp_path,
        **FEW,
        training__max_steps=30,
        training__learning_rate=0.03,
        privacy__expected_batch_size=20,
        privacy__target_epsilon=0.5,
    )
    del whole["lora"]
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(whole))
    status, out, err = hf_dp("compare", tmp_path / "toy.yaml", "--num-secrets", 4, "--output", tmp_path / "both")
    assert status == 0, err
    found = json.loads((tmp_path / "both" / "comparison.json").read_text())
    private, plain = found["private"], found["without_privacy"]
    assert plain["bits"] > 0.8 * MOST_BITS
    assert plain["exposed"]
    assert private["bits"] < plain["bits"]
    assert plain["loss"] < private["loss"]
    assert found["num_examples"] == 40 - 8 + 4
    assert [step for step, _ in plain["losses"]] == [step for step, _ in private["leaked"]]
    assert (tmp_path / "both" / "comparison.png").stat().st_size > 10_000
    assert "No power" not in out
    assert "no epsilon covers them" in out
    assert "{" not in out
    lines = (
        out.splitlines()
    )  # what comes before depends on chance: a warning that the signal drowns, as wide as it gets
    told = lines[next(i for i, line in enumerate(lines) if line.startswith("With privacy and without")) :]
    assert max(map(len, told)) <= 105
    assert not (tmp_path / "never-made").exists()
    status, _, err = hf_dp("compare", tmp_path / "toy.yaml", "--output", tmp_path / "both")
    assert (status, "exists already" in err) == (2, True)


@pytest.mark.slow
def test_a_classifier_has_no_secrets_to_tell_and_is_asked_who_was_in_its_data(hf_dp, tmp_path):
    recipe = R.write_classifier(tmp_path, **FEW)
    status, out, err = hf_dp("compare", recipe, "--output", tmp_path / "both")
    assert status == 0, err
    found = json.loads((tmp_path / "both" / "comparison.json").read_text())
    assert found["private"]["bits"] is found["without_privacy"]["extracted"] is None
    assert found["num_secrets"] == 0
    assert "who was in the data" in out
    assert "exposure" not in out


def test_pairs_are_refused(hf_dp, tmp_path):
    status, _, err = hf_dp("compare", R.write_preferences(tmp_path), "--output", tmp_path / "both")
    assert (status, "pair" in err) == (2, True)
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize(
    ("private", "plain", "said"),
    [(0, 0, "No power"), (0, 2, "do not find in the private one"), (1, 2, "in the private model too")],
)
def test_what_follows_is_said(private, plain, said):
    quiet = Leaks(1.0, 0.5, 0.4, 1.4, False, 0, [], [])
    assert said in statement(quiet._replace(extracted=private), quiet._replace(extracted=plain))
