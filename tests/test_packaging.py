"""The wheel and the sdist: they build, hold what the package needs, and install where nothing of this folder is."""

import importlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import hf_dp
from tests.support.folders import model_folder

ROOT = Path(__file__).resolve().parents[1]
DATA = {"card/card.md", "card/privacy.schema.json", "card/report/page.html", "py.typed", "__main__.py"}


def pip(*arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--no-index", "--quiet"],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def alone(folder: Path, *arguments: object) -> str:
    """What `python ARGUMENTS` prints in a folder that holds nothing, with the package from `folder`."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(folder)},
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", [["-m", "hf_dp"], ["-c", "from hf_dp.cli import main; main()"]])
def test_the_version_is_the_packages(command):
    assert alone(ROOT, *command, "--version") == f"hf_dp {hf_dp.__version__}\n"
    assert f'version = "{hf_dp.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_its_modules_can_be_looked_through(capsys):
    """A tool that imports all modules of a package must not start a command."""
    importlib.import_module("hf_dp.__main__")
    assert capsys.readouterr().out == ""


def test_each_extra_is_named_where_people_install():
    extras = re.search(
        r"\[project.optional-dependencies\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.DOTALL
    )
    names = re.findall(r"^(\w+) = \[", extras[1], re.MULTILINE)
    page = (ROOT / "scripts" / "README.md").read_text()
    assert len(names) > 2
    assert [name for name in names if f".[{name}]" not in page] == []


@pytest.mark.slow
def test_wheel_and_sdist_build_and_what_is_installed_verifies_a_model(tmp_path):
    built, installed = tmp_path / "built", tmp_path / "installed"
    code = (
        "import os, sys; from setuptools import build_meta; _, source, built = sys.argv; os.chdir(source);"
        "build_meta.build_sdist(built); build_meta.build_wheel(built)"
    )
    copy = tmp_path / "copy"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True, timeout=100)
    built.mkdir()
    subprocess.run([sys.executable, "-c", code, str(copy), str(built)], check=True, timeout=250, capture_output=True)
    (sdist,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    with zipfile.ZipFile(wheel) as held:
        names = {*held.namelist()}
    assert {f"hf_dp/{name}" for name in DATA} <= names
    assert not [name for name in names if not name.startswith(("hf_dp/", "hf_dp-"))]
    with tarfile.open(sdist) as held:
        assert any(name.endswith("/hf_dp/card/privacy.schema.json") for name in held.getnames())
    pip("install", "--target", installed, wheel)
    model_folder(tmp_path / "model")
    assert (installed / "bin" / "hf-dp").is_file()
    assert str(installed) in alone(installed, "-c", "import hf_dp; print(hf_dp.__file__)")
    assert "Verified" in alone(installed, installed / "bin" / "hf-dp", "verify", tmp_path / "model")
    assert "Report: " in alone(installed, "-m", "hf_dp", "report", tmp_path / "model")
