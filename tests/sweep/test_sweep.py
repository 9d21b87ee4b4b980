"""`hf-dp sweep`: a real little sweep from outside, what it leaves and tells, being cut off, and how it says no."""

import contextlib
import html
import io
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_dp import accounting
from hf_dp.accounting import selection
from hf_dp.accounting.calibration import round_up
from hf_dp.card.report import curves
from hf_dp.errors import ConfigError, HfDpError
from hf_dp.ledger.ledger import LEDGER_NAME, read_ledger
from hf_dp.sweep import folder as folders
from hf_dp.sweep import grid, outcome, run, trial
from tests.support import recipes as R
from tests.support.folders import failures
from tests.support.marks import quick

GRID = ["--grid", "training.learning_rate=1e-2,1", "--grid", "privacy.clip_norm=0.1,1"]
DRAWS = (3, 0, 3)  # combinations of the trials: the second is not trained twice
DELTA = 0.017


@pytest.fixture
def drawn(monkeypatch):
    """The number of trials and their combinations are DRAWS. They stay unknown to the code that trains."""

    def of(*draws):
        left = list(draws)
        monkeypatch.setattr(folders, "random_number", lambda distribution, mean: len(draws))
        monkeypatch.setattr(folders.secrets, "randbelow", lambda count: left.pop(0) % count)

    of(*DRAWS)
    return of


@pytest.fixture
def a_quarter(monkeypatch):
    """Each trial gets a quarter of the total, without a search for the most that it may have."""
    monkeypatch.setattr(selection, "target_of_one_run", lambda total, *_: total / 4)


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


# ---- what works ------------------------------------------------------------------------------------------------------


def test_a_sweep_leaves_one_model_with_the_epsilon_of_the_choice(hf_dp, drawn, tmp_path, monkeypatch):
    recipe = R.write(tmp_path)
    status, out, err = hf_dp("sweep", recipe, *GRID, "--trials", 3)
    assert status == 0, err
    place = tmp_path / "out"
    found, selected = json.loads((place / "sweep.json").read_text()), place / "selected"

    # the least validation loss is kept, and of the others' models nothing
    scores = [t["score"] for t in found["trials"]]
    assert found["selected"] == scores.index(min(scores))
    assert len(set(scores)) == 3  # equal settings, fresh randomness
    assert [tuple(t["combination"].values()) for t in found["trials"]] == [(1, 1), (0.01, 0.1), (1, 1)]
    assert files(place / "trials") == {f"{n:02d}/{name}" for n in (1, 2, 3) for name in folders.KEPT}
    weights = load_file(selected / "adapter_model.safetensors")
    assert any(bool(w.any()) for name, w in weights.items() if "lora_B" in name)

    # the card has the total, which can be verified
    record = json.loads((selected / "privacy.json").read_text())
    stated = record["selection"]
    assert failures(selected) == ""
    assert 8 * 0.98 < record["epsilon"] <= 8 == stated["target_epsilon"]
    assert (stated["distribution"], stated["mean"], len(stated["mechanisms"])) == ("geometric", 3.0, 1)
    assert stated["epsilon_of_one_run"] < record["epsilon"] / 2  # delta is large here, so that the choice costs much
    ledgers = sorted(place.glob(f"trials/*/{LEDGER_NAME}"))
    assert [read_ledger(p).num_steps for p in ledgers] == [2, 2, 2]
    assert (selected / LEDGER_NAME).read_bytes() == ledgers[found["selected"]].read_bytes()

    # what the user is shown, and told to keep
    together = accounting.spent([s for p in ledgers for s in read_ledger(p).segments], DELTA).epsilon
    assert found["epsilon_all_published"] == together
    assert f"Were all 3 trials published: {round_up(together):.5g}." in out
    assert "so many trainings within a budget file (hf-dp budget) cost less than a sweep" in " ".join(
        out.replace("│", " ").split()
    )
    assert "PRIVATE: not covered by the model's epsilon, do not publish" in out.replace("\n", " ")
    assert "(selected)" in out
    assert (place / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    for t in found["trials"]:
        steps, epsilons, losses = zip(*t["curve"], strict=True)
        assert (steps, epsilons[0]) == ((0, 1, 2), 0.0)
        assert epsilons[2] == pytest.approx(t["epsilon"])
        assert losses[-1] == t["score"]

    # nothing of the model's folder tells of the other trials, their number or their scores
    assert not {n for n in files(selected) if n.startswith(("_", "trial", "log", "sweep", "checkpoint"))}
    text = b"".join(p.read_bytes() for p in selected.iterdir() if p.name != LEDGER_NAME)
    assert str(place / "running").encode() in text  # of all trials alike
    assert not any(f"{s}".encode() in text for t in found["trials"] for s in (t["score"], t["curve"][1][2]))
    assert b"trials/" not in text

    # the other commands take it for what it is
    written = (selected / "README.md").read_text()
    monkeypatch.setattr(curves, "POINTS", 2)  # each costs two accountants' time
    assert hf_dp("card", selected)[0] == 0
    assert (selected / "README.md").read_text() == written
    status, out, _ = hf_dp("report", selected, "--output", tmp_path / "page.html")
    assert status == 0, out
    page = (tmp_path / "page.html").read_text()
    assert "best of a random number of runs, geometric with mean 3" in page
    by_hand = page[page.index("import numpy as np") : page.index("  # ", page.index("import numpy as np"))]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(html.unescape(by_hand), {})
    assert float(said.getvalue()) == pytest.approx(record["epsilon"], rel=1e-5)

    # it has ended: no second one here
    before = files(place)
    status, _, err = hf_dp("sweep", recipe, *GRID, "--trials", 3)
    assert (status, "holds a sweep already" in err) == (2, True)
    status, _, err = hf_dp("sweep", recipe, *GRID, "--trials", 3, "--resume")
    assert (status, "has ended" in err) == (2, True)
    assert files(place) == before


@pytest.mark.slow
def test_a_sweep_that_is_cut_off_goes_on_where_it_was(hf_dp, drawn, a_quarter, tmp_path, monkeypatch):
    recipe, train = R.write(tmp_path), trial.run
    calls = []

    def cut_off_in_the_second(asked, kinds, tell=None):
        calls.append(asked.training["learning_rate"])
        found = train(asked, kinds)
        if len(calls) == 2:
            raise HfDpError("the power went")
        return found

    monkeypatch.setattr(run.trials, "run", cut_off_in_the_second)
    command = ("sweep", recipe, *GRID, "--trials", 3)
    status, out, err = hf_dp(*command)
    assert (status, "the power went" in err) == (2, True)
    assert "--resume" in out
    place = tmp_path / "out"
    state = (place / folders.STATE).read_bytes()
    assert (place / folders.STATE).stat().st_mode & 0o077 == 0
    first = (place / "trials" / "01" / "trial.json").read_bytes()

    # only by saying so, and only the same sweep on the same records
    for arguments, message in (
        (command, "go on with it by --resume"),
        ((*command[:-1], 4, "--resume"), "trials: begun with 3.0, now 4.0"),
        ((*command, "training.max_steps=3", "--resume"), "overrides: begun with"),
    ):
        status, _, err = hf_dp(*arguments)
        assert (status, message in err) == (2, True), err
    records = (tmp_path / "validation.jsonl").read_text()
    (tmp_path / "validation.jsonl").write_text(records + records.splitlines()[0] + "\n")
    status, _, err = hf_dp(*command, "--resume")
    assert (status, "not those that the sweep was begun with" in err) == (2, True)
    (tmp_path / "validation.jsonl").write_text(records)
    assert (place / folders.STATE).read_bytes() == state

    drawn()  # nothing is drawn any more
    of_selection = outcome.card.with_selection
    monkeypatch.setattr(outcome.card, "with_selection", lambda *_: (_ for _ in ()).throw(HfDpError("disk full")))
    status, out, err = hf_dp(*command, "--resume")  # cut off once more, between picture and model
    assert (status, "disk full" in err) == (2, True)
    assert "1 trials have ended" in out
    assert not (place / "selected").exists()
    monkeypatch.setattr(outcome.card, "with_selection", of_selection)
    status, out, err = hf_dp(*command, "--resume")
    assert status == 0, err
    assert "3 trials have ended" in out
    assert calls == [1, 0.01, 0.01, 1]  # the second again, the first not
    assert (place / "trials" / "01" / "trial.json").read_bytes() == first
    assert (place / folders.STATE).read_bytes() == state
    assert failures(place / "selected") == ""
    # the one that was cut off spent too, and its model is gone
    assert files(place / "unfinished") == {"01/log.txt", f"01/{LEDGER_NAME}"}
    found = json.loads((place / "sweep.json").read_text())
    assert len(found["trials"]) == 3
    ledgers = [*place.glob(f"trials/*/{LEDGER_NAME}"), *place.glob(f"unfinished/*/{LEDGER_NAME}")]
    all_of_them = accounting.spent([s for p in ledgers for s in read_ledger(p).segments], DELTA)
    assert found["epsilon_all_published"] == all_of_them.epsilon


def test_the_number_drawn_may_be_none(hf_dp, drawn, a_quarter, tmp_path):
    drawn()
    status, out, _ = hf_dp("sweep", R.write(tmp_path), *GRID, "--distribution", "poisson", "--trials", 2)
    assert status == 1
    assert "The number of trials drawn is 0" in out
    assert not (tmp_path / "out" / "selected").exists()


@pytest.mark.slow
def test_a_sweep_over_batches_steps_noise_and_lora_of_a_classifier(hf_dp, drawn, tmp_path):
    """Several kinds of trial, of which each has the same epsilon; the drawn number is real for once."""
    axes = "privacy.expected_batch_size=8,16 training.max_steps=2,4 lora.r=1,2".split()
    drawn(0, 3, 5, 7)
    recipe = R.write_classifier(tmp_path)
    status, out, err = hf_dp(
        "sweep", recipe, *(x for a in axes for x in ("--grid", a)), "--distribution", "logarithmic"
    )
    assert status == 0, err
    selected = tmp_path / "out" / "selected"
    record, found = (json.loads(p.read_text()) for p in (selected / "privacy.json", tmp_path / "out" / "sweep.json"))
    assert failures(selected) == ""
    assert len(record["selection"]["mechanisms"]) == 4
    assert (selected / "classes.json").is_file()
    epsilons = [t["epsilon"] for t in found["trials"]]
    assert max(epsilons) / min(epsilons) < 1.002  # calibration leaves up to 0.1 % unused
    assert "sigma" in out


# ---- what does not ---------------------------------------------------------------------------------------------------

MISTAKES = {
    "no grid": (["--trials", "3"], "expected at least one"),
    "no values": (["--grid", "training.learning_rate"], "expected section.key=value,value"),
    "an unknown key": (["--grid", "training.learning_rat=1,2"], "did you mean 'training.learning_rate'?"),
    "an unknown setting of lora": (["--grid", "lora.rr=1,2"], "lora.rr: there is no such setting"),
    "a wrong type": (
        ["--grid", "training.learning_rate=fast,slow"],
        "training.learning_rate: expected a number, got 'fast'",
    ),
    "a key that makes no other model": (
        ["--grid", "training.output_dir=a,b"],
        "not a setting that trials may differ in",
    ),
    "sigma": (["--grid", "privacy.noise_multiplier=1,2"], "all trials have the same epsilon, and the noise follows"),
    "a value twice": ([*GRID, "--grid", "lora.r=2,4,2"], "2 stands there twice"),
    "a key twice": ([*GRID, "--grid", "privacy.clip_norm=3"], "given twice"),
    "a key that is overridden": ([*GRID, "privacy.clip_norm=3"], "also given as an override"),
    "wrong values": (["--grid", "privacy.clip_norm=0,1,-1"], "clip_norm must be a finite number above 0 (got -1)"),
    "a batch above N": (["--grid", "privacy.expected_batch_size=10,41"], "at most the number of examples, 40"),
    "a distribution": (
        [*GRID, "--distribution", "uniform"],
        "distribution must be one of geometric, logarithmic, poisson",
    ),
    "too few": ([*GRID, "--trials", "0"], "the mean number of trials must be a number from 1"),
    "a fixed sigma": (
        [*GRID, "privacy.target_epsilon=null", "privacy.noise_multiplier=1"],
        "it is the total of a sweep",
    ),
    "a seed": ([*GRID, "privacy.debug_seed=1"], "privacy.debug_seed: not for a sweep"),
    "a budget file": ([*GRID, "privacy.budget_file=b.json"], "privacy.budget_file: not for a sweep"),
    "resuming a trial": (
        [*GRID, "training.resume_from_checkpoint=true"],
        "training.resume_from_checkpoint: not for a sweep",
    ),
    "pushing": ([*GRID, "training.push_to_hub=true"], "training.push_to_hub: not for a sweep"),
    "a tracker": ([*GRID, "training.report_to=tensorboard"], "tensorboard would be told of all trials"),
    "no validation": ([*GRID, "data.validation=null"], "data.validation: missing"),
    "training records": ([*GRID, "data.validation=TRAIN"], "these are the training records"),
    "an epsilon out of reach": ([*GRID, "privacy.target_epsilon=1e-3", "privacy.target_delta=1e-9"], "out of reach"),
    "no such modules": (["--grid", "lora.target_modules=all-linear,nothing"], "peft refuses"),
    "what voids the guarantee": ([*GRID, "training.fp16=true"], "use bf16=True or float32"),
    "nothing to resume": ([*GRID, "--resume"], "holds no sweep to go on with"),
}


@pytest.mark.parametrize("mistake", quick({*[*MISTAKES][::3]}, MISTAKES))
def test_a_mistake_ends_in_a_few_lines_and_leaves_nothing(mistake, hf_dp, tmp_path, monkeypatch):
    arguments, message = MISTAKES[mistake]
    recipe = R.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trial, "run", lambda *_: pytest.fail("something was run"))
    before = files(tmp_path)
    arguments = [a.replace("TRAIN", str(tmp_path / "train.jsonl")) for a in arguments]
    status, out, err = hf_dp("sweep", recipe, "training.output_dir=new/deep", *arguments)
    said = err[err.index("hf-dp: ") :]
    assert status == 2
    assert message in said
    assert len(said.splitlines()) <= 5
    assert "Traceback" not in err + out
    assert files(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_everything_wrong_is_named_at_once(hf_dp, tmp_path):
    arguments = [
        "--grid",
        "lora.r=1,1",
        "--grid",
        "training.logging_steps=1,2",
        "privacy.debug_seed=1",
        "data.validation=null",
    ]
    _, _, err = hf_dp("sweep", R.write(tmp_path), *arguments)
    assert all(
        word in err for word in ("stands there twice", "training.logging_steps", "debug_seed", "data.validation")
    )


def test_a_folder_with_something_in_it_is_left_alone(hf_dp, tmp_path):
    recipe = R.write(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("all of it")
    status, _, err = hf_dp("sweep", recipe, *GRID)
    assert (status, "is not empty" in err) == (2, True)
    assert files(tmp_path / "out") == {"thesis.txt"}


def test_several_processes_are_refused(hf_dp, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "a sweep runs in one process" in hf_dp("sweep", R.write(tmp_path), *GRID)[2]


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_combinations_are_the_product_of_the_grid(tmp_path):
    found = grid.combinations(
        R.write(tmp_path), [], ["lora.r=1,2", 'data.prompt="{mr} ","{mr}: "', "lora.lora_dropout=0"]
    )
    assert [tuple(c.values.values()) for c in found] == [(r, p, 0) for r in (1, 2) for p in ("{mr} ", "{mr}: ")]
    assert [c.recipe.data.prompt for c in found[:2]] == ["{mr} ", "{mr}: "]
    assert found[3].recipe.lora == {"r": 2, "target_modules": "all-linear", "lora_dropout": 0}


@pytest.mark.parametrize(
    ("scores", "chosen"), [((3.0, 1.0, 2.0), 1), ((None, 5.0), 1), ((None, None), 0), ((2.0, 2.0), 0)]
)
def test_the_least_loss_is_the_best_and_none_is_the_worst(scores, chosen):
    assert folders.best([(Path(), {"score": s}) for s in scores]) == chosen


def test_a_folder_in_use_is_refused(tmp_path):
    with (
        folders.locked(tmp_path),
        pytest.raises(ConfigError, match="in use by another sweep"),
        folders.locked(tmp_path),
    ):
        pass


def test_a_trial_that_charges_otherwise_than_planned_does_not_run(drawn, tmp_path, monkeypatch):
    """As when another version of the accountant calibrates another sigma."""
    chosen = grid.combinations(R.write(tmp_path), [], ["privacy.clip_norm=1"])[0].recipe
    asked = trial.as_trial(chosen, 3.0, tmp_path / "out" / "running")
    with pytest.raises(HfDpError, match="none of the planned"):
        trial.run(asked, ())
    assert not list(tmp_path.rglob(LEDGER_NAME))
