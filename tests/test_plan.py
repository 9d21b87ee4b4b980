"""`hf-dp plan`: its numbers by another road, its speed, and its picture."""

import os
import re
import subprocess
import sys
import time

import pytest
from dp_accounting.pld import privacy_loss_distribution as pld

COMMAND = [sys.executable, "-c", "from hf_dp.cli import main; main()", "plan"]
PUBLISHED = "--num-examples 42061 --expected-batch-size 1024 --epochs 10 --target-delta 8e-6".split()


def plan(*arguments):
    start = time.perf_counter()
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    return done, time.perf_counter() - start


def number(text, name):
    return float(re.search(rf"│ {name} +│ ([\d.e,+-]+) ", text)[1].replace(",", ""))


def test_the_published_setting_is_planned_within_seconds_and_within_the_target():
    done, seconds = plan(*PUBLISHED, "--target-epsilon", 8)
    assert done.returncode == 0, done.stderr
    # 5 s on a machine of its own; 2.5 s measured. A machine that others use as well gets three times as long.
    assert seconds < (15 if os.getloadavg()[0] > 1 else 5)
    sigma, q = number(done.stdout, "noise multiplier sigma"), 1024 / 42061
    assert number(done.stdout, "steps T") == 410
    by_grid = pld.from_gaussian_mechanism(sigma, sampling_prob=q, value_discretization_interval=1e-4)
    epsilon = by_grid.self_compose(410).get_epsilon_for_delta(8e-6)
    assert 8 * 0.995 <= epsilon <= 8
    assert number(done.stdout, "epsilon") == pytest.approx(epsilon, rel=1e-3)  # the grids differ
    assert number(done.stdout, "epsilon by RDP") > number(done.stdout, "epsilon by PLD")


def test_a_noise_multiplier_gives_its_epsilon():
    done, _ = plan(*PUBLISHED, "--noise-multiplier", 1)
    assert number(done.stdout, "noise multiplier sigma") == 1
    assert 1 < number(done.stdout, "epsilon") < 8
    done, _ = plan(*PUBLISHED, "--noise-multiplier", 0)
    assert "NOT PRIVATE" in done.stdout


def test_steps_in_place_of_epochs():
    done, _ = plan("--num-examples", 1000, "--expected-batch-size", 100, "--max-steps", 7, "--target-epsilon", 3)
    assert number(done.stdout, "steps T") == 7
    assert number(done.stdout, "delta") == 5e-4  # 1000**-1.1 = 5.01e-4, rounded down


def test_help_comes_at_once():
    done, seconds = plan("--help")
    assert "--target-epsilon" in done.stdout
    assert seconds < (3 if os.getloadavg()[0] > 1 else 1)  # 0.3 s measured on two busy cores


def test_planning_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['hf-dp', 'plan', '--num-examples', '1000', '--expected-batch-size', '10', '--epochs', '1', "
        "'--noise-multiplier', '1']\n"
        "from hf_dp.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print('heavy:', *[m for m in ('torch', 'transformers', 'peft', 'datasets', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
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
    ],
)
def test_mistakes_end_in_a_few_lines(arguments, message):
    done, _ = plan(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_picture(tmp_path):
    size = "--num-examples 1000 --expected-batch-size 50 --max-steps 40 --target-epsilon 3".split()
    done, _ = plan(*size, "--plot", tmp_path / "p.svg")
    assert done.returncode == 0, done.stderr
    assert "epsilon" in (tmp_path / "p.svg").read_text()
    done, _ = plan(*size, "--plot", tmp_path / "p.word")
    assert done.returncode == 2
    assert "cannot write the picture" in done.stderr
