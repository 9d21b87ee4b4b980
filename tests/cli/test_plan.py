"""`hf-dp plan`: its numbers by another road, what it imports, and its picture."""

import dataclasses
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from dp_accounting.pld import privacy_loss_distribution as pld

from hf_dp import accounting
from hf_dp.accounting import advice
from hf_dp.accounting.curve import curve_of, plot_epsilon, sizes_of
from hf_dp.config import PrivacyConfig
from hf_dp.mechanism import Mechanism, Segment
from tests.support.marks import quick

PUBLISHED = "--num-examples 42061 --expected-batch-size 1024 --epochs 10 --target-delta 8e-6".split()


@pytest.fixture
def plan(hf_dp):
    def run(*arguments):
        status, out, err = hf_dp("plan", *arguments)
        return SimpleNamespace(returncode=status, stdout=out, stderr=err)

    return run


def number(text, name):
    return float(re.search(rf"│ {name} +│ ([\d.e,+-]+) ", text)[1].replace(",", ""))


def test_the_published_setting_is_planned_within_the_target(plan):
    done = plan(*PUBLISHED, "--target-epsilon", 8)
    assert done.returncode == 0, done.stderr
    sigma, q = number(done.stdout, "noise multiplier sigma"), 1024 / 42061
    assert number(done.stdout, "steps T") == 410
    by_grid = pld.from_gaussian_mechanism(sigma, sampling_prob=q, value_discretization_interval=1e-4)
    epsilon = by_grid.self_compose(410).get_epsilon_for_delta(8e-6)
    assert 8 * 0.995 <= epsilon <= 8
    assert number(done.stdout, "epsilon") == pytest.approx(epsilon, rel=1e-3)  # the grids differ
    assert number(done.stdout, "epsilon by RDP") > number(done.stdout, "epsilon by PLD")


def test_the_table_fits_80_columns_and_begins_with_what_matters(plan, monkeypatch):
    monkeypatch.delenv("COLUMNS")
    lines = plan(*SETTINGS).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split()[1] for line in lines if line.startswith("│") and line[2] != " "]
    assert rows[:3] == ["epsilon", "delta", "steps"]


def test_a_noise_multiplier_gives_its_epsilon(plan):
    done = plan(*PUBLISHED, "--noise-multiplier", 1)
    assert number(done.stdout, "noise multiplier sigma") == 1
    assert 1 < number(done.stdout, "epsilon") < 8
    done = plan(*PUBLISHED, "--noise-multiplier", 0)
    assert "NOT PRIVATE" in done.stdout


def test_steps_in_place_of_epochs(plan):
    done = plan("--num-examples", 1000, "--expected-batch-size", 100, "--max-steps", 7, "--target-epsilon", 3)
    assert number(done.stdout, "steps T") == 7
    assert number(done.stdout, "delta") == 5e-4  # 1000**-1.1 = 5.01e-4, rounded down


SETTINGS = "--num-examples 1000 --expected-batch-size 10 --epochs 1 --noise-multiplier 1".split()
HEAVY = ("torch", "transformers", "peft", "datasets", "matplotlib")


@pytest.mark.parametrize("arguments", [SETTINGS, ["--help"]])
def test_planning_and_its_help_import_nothing_heavy(arguments):
    code = (
        f"import sys; sys.argv = {['hf-dp', 'plan', *arguments]}\n"
        "from hf_dp.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print('heavy:', *[m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert done.stdout.splitlines()[-1] == "heavy:", done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*PUBLISHED], "got neither"),
        ([*PUBLISHED, "--target-epsilon", 8, "--noise-multiplier", 1], "got both"),
        ([*PUBLISHED, "--target-epsilon", -1], "target_epsilon must be a finite number above 0"),
        ([*PUBLISHED, "--target-epsilon", 8, "--max-steps", 5], "exactly one of --epochs and --max-steps"),
        ("--num-examples 10 --expected-batch-size 20 --epochs 1 --noise-multiplier 1".split(), "at most the number of"),
        ([*PUBLISHED[:-1], "1e-12", "--target-epsilon", 1e-9], "out of reach"),
        ([*PUBLISHED, "--target-epsilon", "lots"], "--target-epsilon"),
        ([*PUBLISHED, "--noise-multiplier", 1, "--plot", "/nowhere/at/all.png"], "cannot write the picture"),
        (
            [*PUBLISHED, "--noise-multiplier", 1, "--plot", "a.png", "--against", "time"],
            "expected steps, sigma, batch, delta",
        ),
        ([*PUBLISHED, "--noise-multiplier", 1, "--against", "delta"], "add --plot FILE"),
        (
            [*PUBLISHED, "--noise-multiplier", 0, "--plot", "a.png", "--against", "delta"],
            "without noise it is infinite",
        ),
    ],
)
def test_mistakes_end_in_a_few_lines(plan, arguments, message):
    done = plan(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_picture(plan, tmp_path):
    size = "--num-examples 1000 --expected-batch-size 50 --max-steps 40 --target-epsilon 3".split()
    done = plan(*size, "--plot", tmp_path / "p.svg")
    assert done.returncode == 0, done.stderr
    assert "epsilon" in (tmp_path / "p.svg").read_text()
    done = plan(*size, "--plot", tmp_path / "p.word")
    assert done.returncode == 2
    assert "cannot write the picture" in done.stderr


# ---- what is drawn ---------------------------------------------------------------------------------------------------


PLANNED = Mechanism(
    num_examples=1000,
    expected_batch_size=50,
    num_steps=40,
    noise_multiplier=1.0,
    clip_norm=1.0,
    delta=5e-4,
    target_epsilon=3.0,
)
# epsilon falls with sigma and delta, and rises with steps; at the planned value it is the plan's
FALLS = {"steps": False, "sigma": True, "delta": True}


@pytest.mark.parametrize("against", quick(("steps", "delta"), FALLS))
def test_a_curve_goes_through_the_plan_in_the_right_direction(against):
    curve = curve_of(PLANNED, against)
    values, epsilons = [v for v, _ in curve.points], [e.epsilon for _, e in curve.points]
    assert values == sorted(set(values))
    assert values[0] < curve.planned <= values[-1]
    assert epsilons == sorted(epsilons, reverse=FALLS[against])
    planned = accounting.spent(PLANNED.segments(), PLANNED.delta).epsilon
    if curve.planned in values:  # delta's points are not among the plan's
        assert epsilons[values.index(curve.planned)] == planned
    assert epsilons[0] != epsilons[-1]
    between = [e for v, e in zip(values, epsilons, strict=True) if abs(v - curve.planned) < 0.6 * curve.planned]
    assert min(between) <= planned <= max(between)


@pytest.mark.slow
def test_against_the_batch_size_epsilon_stays_and_larger_batches_are_the_quieter_ones():
    target = accounting.spent(PLANNED.segments(), PLANNED.delta).epsilon
    found = sizes_of(PLANNED, 2.0)
    assert [m.expected_batch_size for m in found][:: len(found) // 2] == [12, 50, 200]
    assert [m.num_steps for m in found][:: len(found) // 2] == [166, 40, 10]  # ceil(2 x round(1000 / B))
    for m in found:
        assert target * 0.99 <= accounting.spent(m.segments(), m.delta).epsilon <= target
    sigmas = [m.noise_multiplier for m in found]
    assert sigmas == sorted(sigmas)
    noises = [advice.loudness(m, 1).of_all_steps for m in found]
    assert noises == sorted(noises, reverse=True)


def test_sigma_is_the_gradients_where_losses_are_released_with_it():
    mechanism = dataclasses.replace(PLANNED, loss_bound=5.0)
    at = dict(curve_of(mechanism, "sigma").points)[1.0]
    assert at == accounting.spent(mechanism.segments(), 5e-4)
    assert at.epsilon > accounting.spent(PLANNED.segments(), 5e-4).epsilon


@pytest.mark.parametrize("against", quick(("sigma",), [*FALLS, "batch"]))
def test_each_picture_says_what_it_is_of(against, tmp_path):
    plot_epsilon(PLANNED, tmp_path / "p.svg", against, 2.0)
    with_text = (tmp_path / "p.svg").read_text()
    axis = {"sigma": "noise multiplier sigma", "batch": "expected batch size"}.get(against, against)
    assert f"<!-- {axis} -->" in with_text


@pytest.mark.parametrize("against", quick(("steps",), FALLS))
def test_a_schedule_goes_on_in_proportion(against):
    privacy = PrivacyConfig(
        noise_multiplier=1.0,
        target_delta=5e-4,
        expected_batch_size=50,
        noise_schedule="step:0.5",
        batch_schedule="step:2",
    )
    mechanism = accounting.plan_mechanism(privacy, 1000, num_train_epochs=0, max_steps=40)
    curve = curve_of(mechanism, against)
    epsilons = [e.epsilon for _, e in curve.points]
    assert epsilons == sorted(epsilons, reverse=FALLS[against])
    planned = accounting.spent([Segment(0.05, 1.0, 20), Segment(0.1, 0.5, 20)], 5e-4)
    if against in ("steps", "sigma"):
        assert dict(curve.points)[curve.planned] == planned
