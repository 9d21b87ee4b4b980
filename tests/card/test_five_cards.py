"""The cards of five real trainings: accepted by the Hub's library, their code runs, and a browser shows them whole."""

import base64
import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from hf_dp.cli import app
from tests.card.test_whole_card import said_by
from tests.support import browser
from tests.support import recipes as R
from tests.support.folders import failures

pytestmark = pytest.mark.slow
LIKE_THE_HUB = """
:root { --ground: #fff; --ink: #1f2328; --line: #d1d9e0; --code: #f6f8fa; --link: #0969da }
@media (prefers-color-scheme: dark) {
  :root { --ground: #0d1117; --ink: #f0f6fc; --line: #3d444d; --code: #151b23; --link: #4493f8 } }
body { background: var(--ground); color: var(--ink); font: 16px/1.5 sans-serif; margin: 0; padding: 16px }
a { color: var(--link) } img { max-width: 100% }
table { border-collapse: collapse; display: block; overflow: auto; width: max-content; max-width: 100% }
td, th { border: 1px solid var(--line); padding: 6px 13px }
pre, code { background: var(--code); overflow: auto } pre { padding: 16px }
"""


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders as `hf-dp train` and `hf-dp merge` leave them."""
    root, found = tmp_path_factory.mktemp("five"), {}
    told = {"training__eval_strategy": "epoch", "privacy__public_eval": True}
    writers = {"adapter": R.write, "classifier": R.write_classifier, "full": R.write, "preference": R.write_preferences}
    for kind, write in writers.items():
        (root / kind).mkdir()
        recipe = write(root / kind, **({} if kind == "preference" else told))
        if kind == "full":
            whole = yaml.safe_load(recipe.read_text())
            del whole["lora"]
            recipe.write_text(yaml.safe_dump(whole))
        run("train", recipe)
        found[kind] = root / kind / "out"
    run("merge", found["adapter"])
    return {**found, "merged": root / "adapter" / "out-merged"}


def run(*arguments: object) -> None:
    done = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_the_hubs_library_takes_them_and_they_name_no_place_on_this_machine(cards):
    for kind, folder in cards.items():
        text = (folder / "README.md").read_text()
        loaded = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
        stated = json.loads((folder / "privacy.json").read_text())
        assert loaded.data.privacy["epsilon"] >= stated["epsilon"]
        assert f"(epsilon <= {loaded.data.privacy['epsilon']:.3f}"[:16] in loaded.text[:400], kind
        assert str(folder.parent) not in text
        assert not re.search(r'"\.{1,2}"|\{\'|None|nan\b', text), kind
        assert not re.search(r"^# out", text, re.MULTILINE)
        assert failures(folder) == ""
    for kind in ("classifier", "full"):
        index = yaml.safe_load((cards[kind] / "README.md").read_text().split("---")[1])["model-index"]
        assert model_index_to_eval_results(index)[1]


def test_the_code_on_each_runs_in_a_fresh_process(cards):
    said = said_by([*cards.values()])
    assert said[str(cards["classifier"])] in ("sad", "glad")
    for kind in ("adapter", "merged", "full", "preference"):
        assert len(said[str(cards[kind])].split()) > 5, kind


@pytest.mark.parametrize("kind", ["adapter", "merged", "classifier", "full", "preference"])
def test_a_browser_shows_each_whole_narrow_and_wide_light_and_dark(kind, cards, tmp_path):
    measured, complaints = browser.look(as_page(cards[kind]), tmp_path)
    assert not complaints
    assert {frame["dark"] for frame in measured} == {True, False}
    for frame in measured:
        assert frame["scroll"] <= frame["width"], frame
        assert frame["worst"][0] >= 4.5, frame


def as_page(folder: Path) -> str:
    """The card as a page, with the picture in it."""
    text = (folder / "README.md").read_text().split("---\n", 2)[2]
    picture = base64.b64encode((folder / "privacy_tradeoff.svg").read_bytes()).decode()
    body = MarkdownIt("gfm-like", {"linkify": False}).render(text)
    body = body.replace('src="privacy_tradeoff.svg"', f'src="data:image/svg+xml;base64,{picture}"')
    return f'<!DOCTYPE html><meta charset="utf-8"><style>{LIKE_THE_HUB}</style>{body}'
