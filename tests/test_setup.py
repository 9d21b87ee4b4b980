"""The shell scripts parse, do nothing twice, and say what to do when they cannot go on. Nothing is installed here."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [p for p in (*sorted((ROOT / "scripts").iterdir()), ROOT / ".ci" / "run") if p.is_file()]
SHELL = [p for p in SCRIPTS if p.read_text().startswith("#!/usr/bin/env bash")]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """scripts/setup with a stand-in for python3 that writes down what it is asked for, and makes a venv of itself."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "bin").mkdir()
    _executable(
        tmp_path / "bin" / "python3",
        'echo "$*" >>"$CALLS"\n'
        'case "$*" in\n'
        '  "-m venv --clear .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;\n'
        '  "-m pip --version") ;;\n'
        '  *pip*+cpu*) exit "${NO_CPU_BUILD:-0}" ;;\n'
        '  *pip*install*) exit "${NO_NETWORK:-0}" ;;\n'
        '  "-c import torch") exit 1 ;;\n'
        "esac\n",
    )
    _executable(tmp_path / "bin" / "nvidia-smi", 'exit "${NO_GPU:-1}"\n')
    return tmp_path


def _executable(path: Path, body: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{body}")
    path.chmod(0o755)


def setup(clone: Path, *arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What scripts/setup says, and what it asked of Python."""
    calls = clone / "calls"
    calls.write_text("")
    path = {"PATH": f"{clone / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls), "PYTHON": "python3"}
    done = subprocess.run(
        ["bash", clone / "scripts" / "setup", *arguments],
        env={**os.environ, **path, **environment},
        capture_output=True,
        text=True,
    )
    return done, calls.read_text().splitlines()


@pytest.mark.parametrize("script", SHELL, ids=lambda p: p.name)
def test_scripts_parse_stop_at_errors_and_can_be_run(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert "set -euo pipefail" in script.read_text()
    assert script.stat().st_mode & stat.S_IXUSR


def test_the_scripts_that_the_readme_names_are_there() -> None:
    assert {"setup", "test", "check", "demo", "run"} <= {p.name for p in SHELL}


def test_setting_up_again_does_nothing(clone: Path) -> None:
    first, calls = setup(clone)
    assert first.returncode == 0, first.stderr
    assert sum("pip" in call and "install" in call for call in calls) == 2
    again, calls = setup(clone)
    assert again.stdout == "scripts/setup: .venv is ready.\n"
    assert not any("install" in call for call in calls)


def test_what_the_tests_need_is_installed_for_them_alone(clone: Path) -> None:
    """And then serves everything: the demo finds a .venv that is ready."""

    def extras(calls: list[str]) -> list[str]:
        return [call.split()[-1] for call in calls if "install" in call and "-e" in call.split()]

    assert extras(setup(clone)[1]) == ["."]
    assert extras(setup(clone, "test")[1]) == [".[test]"]
    for arguments in ([], ["test"]):
        again, calls = setup(clone, *arguments)
        assert again.stdout == "scripts/setup: .venv is ready.\n"
        assert not any("install" in call for call in calls)


def test_another_argument_is_refused_before_anything_is_installed(clone: Path) -> None:
    done, calls = setup(clone, "tests")
    assert done.returncode == 2
    assert done.stderr == "scripts/setup: expected no argument or test, got tests.\n"
    assert calls == []


def test_other_dependencies_are_installed_into_the_same_venv(clone: Path) -> None:
    setup(clone)
    with (clone / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    _, calls = setup(clone)
    assert any("install" in call for call in calls)
    assert "-m venv --clear .venv" not in calls


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({}, ["torch==2.13.0+cpu"]),
        ({"NO_CPU_BUILD": "1"}, ["torch==2.13.0+cpu", "torch==2.13.0"]),
        ({"NO_GPU": "0"}, ["torch==2.13.0"]),
        ({"HF_DP_TORCH": "torch==2.9.0+cpu"}, ["torch==2.9.0+cpu"]),
    ],
)
def test_torch_is_the_cpu_build_where_there_is_no_gpu(
    clone: Path, environment: dict[str, str], asked: list[str]
) -> None:
    done, calls = setup(clone, **environment)
    assert done.returncode == 0, done.stderr
    assert [call.split()[-1] for call in calls if "install" in call and call.split()[-1].startswith("torch")] == asked


@pytest.mark.parametrize(
    ("environment", "remedy"),
    [
        ({"PYTHON": "python-that-is-not-there"}, "set PYTHON"),
        ({"NO_CPU_BUILD": "1", "NO_NETWORK": "1"}, "HF_DP_TORCH"),
        ({"NO_NETWORK": "1"}, "check the network"),
    ],
)
def test_a_set_up_that_fails_says_what_to_do_and_starts_over_next_time(
    clone: Path, environment: dict[str, str], remedy: str
) -> None:
    done, _ = setup(clone, **environment)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("scripts/setup: ")
    assert remedy in done.stderr
    assert not (clone / ".venv" / "made-from").exists()
    assert setup(clone)[0].returncode == 0
