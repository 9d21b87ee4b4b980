"""In a notebook: the table has epsilon and nothing empty, and the notebook among the recipes runs top to bottom."""

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from tests.support import recipes as R
from tests.support import runs
from tests.support.marks import quick

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = json.loads((ROOT / "recipes" / "notebook.ipynb").read_text(encoding="utf-8"))
PRIVATE = {"noise_multiplier": 1.0, "target_delta": 1e-3}
WITH_IPYTHON = ("transformers.utils.notebook", "hf_dp.training.notebook")


@pytest.fixture
def shown(monkeypatch) -> Iterator[list[str]]:
    """What a stand-in for IPython was given to display, page after page."""
    pages: list[str] = []
    ipython, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    output = types.SimpleNamespace(update=pages.append)
    vars(display).update(HTML=str, display=lambda page, **_: pages.append(page) or output)
    vars(ipython).update(display=display)
    for module in (ipython, display):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in WITH_IPYTHON:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield pages
    for name in WITH_IPYTHON:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("evaluated", quick((True,), [False, True]))
def test_the_table_shows_epsilon_and_no_empty_column(evaluated, shown, tmp_path):
    from transformers.utils.notebook import NotebookProgressCallback

    held_out = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": runs.text_rows(4)} if evaluated else {}
    trainer = runs.trainer(
        tmp_path, privacy=PRIVATE, callbacks=[NotebookProgressCallback], max_steps=2, disable_tqdm=False, **held_out
    )
    trainer.train()
    table = shown[-1].partition("<table")[2]
    assert f"{trainer.privacy_spent().epsilon:.3f}</td>" in table
    assert "<td>2</td>" in table
    assert ("Validation Loss" in table) is evaluated
    assert "Training Loss" not in table
    assert "no log" not in table.lower()


def test_the_notebook_runs_top_to_bottom(tmp_path, monkeypatch, capsys):
    base = R.save_causal_lm(tmp_path / "base")
    texts = [" ".join(note.values()) for note in R.notes(60)]
    R.write_lines(tmp_path / "notes.jsonl", [{"text": text} for text in texts])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    sources = ["".join(c["source"]) for c in NOTEBOOK["cells"] if c["cell_type"] == "code"]
    small = f"MODEL = {str(base)!r}\nBATCH, EPOCHS, MAX_TOKENS = 20, 1, 16"
    exec("\n\n".join([sources[0], small, *sources[1:]]), {})
    out = capsys.readouterr().out
    assert "3 steps, noise multiplier" in out
    held, of = out.rpartition(" checks hold")[0].split("\n")[-1].split(" of ")
    assert held == of
    assert NOTEBOOK["cells"][1]["metadata"]["tags"] == ["parameters"]
    assert all(cell["outputs"] == [] for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code")
