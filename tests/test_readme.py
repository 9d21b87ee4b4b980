"""The code on the pages runs as printed (a tiny model stands in for GPT-2), and the files that they name exist."""

import copy
import json
import re
from pathlib import Path

import datasets
import pytest
import torch
import transformers
import typer

from hf_dp import PrivacyConfig, accounting, cli
from hf_dp.card import writing as card
from hf_dp.demo.base import train_tokenizer
from hf_dp.demo.records import write_records
from hf_dp.mechanism import Segment
from tests.support import reference

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("hf_dp/**/README.md")), ROOT / "scripts/README.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")
WIDTH, LARGEST = 120, 16 * 1024


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


EXAMPLE, RECOMPUTE = blocks("README.md", "python")
(RECIPE,) = blocks("README.md", "yaml")
(OTHER_ADAPTER,) = blocks("hf_dp/recipe/README.md", "yaml")
PEOPLE, OWNERS, PLAIN_LOOP = blocks("hf_dp/training/README.md", "python")
(WITH_TRL,) = blocks("hf_dp/training/README.md", "diff")


@pytest.fixture(params=PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def page(request) -> Path:
    return request.param


def without_blocks(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(page: Path) -> list[str]:
    """Each line of a page's blocks of code, and each span of code between backticks, on one line."""
    inside = re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in inside for line in block.replace("\\\n", " ").splitlines()]
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_blocks(page))]


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A GPT-2 of one small layer, and 600 notes beside it."""
    records = write_records(tmp_path / "records", num_public=600, num_private=1, num_heldout=1).public_train
    notes = [json.loads(line)["note"] for line in records.read_text().splitlines()]
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps({"text": note}) + "\n" for note in notes))
    tokenizer = train_tokenizer(notes)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=256, bos_token_id=1, eos_token_id=1
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_the_example_trains_and_its_card_can_be_computed_again(gpt2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert EXAMPLE.count("openai-community/gpt2") == 2
    names: dict = {}
    exec(EXAMPLE.replace("openai-community/gpt2", str(gpt2)), names)
    record = json.loads(Path("out/notes/privacy.json").read_text())
    spent = names["trainer"].privacy_spent()
    assert 0 < spent.epsilon == record["epsilon"] <= 8
    assert f"PrivacySpent(epsilon={spent.epsilon}" in capsys.readouterr().out
    assert "## Privacy: epsilon" in Path("out/notes/README.md").read_text()
    assert Path("out/notes/adapter_model.safetensors").exists()

    exec(RECOMPUTE.replace("out/demo/private", "out/notes"), {})
    ours_again, stated = map(float, capsys.readouterr().out.split())
    assert stated == spent.epsilon
    assert ours_again == pytest.approx(stated, rel=5e-3)  # another grid than the card's
    segment = Segment(*(record["segments"][0][k] for k in ("sample_rate", "noise_multiplier", "num_steps")))
    assert (
        accounting.spent(
            [segment._replace(joint_noise_multiplier=segment.joint_noise_multiplier * 0.9)], record["delta"]
        ).epsilon
        > 1.05 * stated
    )


def test_the_recipe_trains(gpt2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert RECIPE.count("openai-community/gpt2") == 1
    shorter = RECIPE.replace("max_length: 256", "max_length: 128")  # the most that the small tokenizer takes
    Path("notes.yaml").write_text(shorter.replace("openai-community/gpt2", str(gpt2)))
    typer.main.get_command(cli.app)(["train", "notes.yaml"], standalone_mode=False)
    record = json.loads(Path("out/notes/privacy.json").read_text())
    assert 0 < record["epsilon"] <= 8
    assert f"epsilon {record['epsilon']:.4g} at delta" in capsys.readouterr().out
    assert Path("out/notes/adapter_model.safetensors").exists()


def test_the_recipe_trains_with_another_adapter(gpt2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (line,) = [line for line in RECIPE.splitlines() if line.startswith("lora:")]
    changed = RECIPE.replace(line, OTHER_ADAPTER).replace("max_length: 256", "max_length: 128")
    Path("notes.yaml").write_text(changed.replace("openai-community/gpt2", str(gpt2)))
    typer.main.get_command(cli.app)(["train", "notes.yaml"], standalone_mode=False)
    assert json.loads(Path("out/notes/adapter_config.json").read_text())["peft_type"] == "VERA"


def test_the_plain_loop_learns_within_its_budget(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    torch.manual_seed(0)
    exec(PLAIN_LOOP, names)
    right = (names["model"](names["x"])[:, 0] > 0) == (names["x"].sum(1) > 0)
    assert right.float().mean() > 0.8  # 0.97 measured; a coin gives 0.5
    spent = names["loop"].privacy_spent()
    assert (spent.num_steps, 0.9 < spent.epsilon <= 1.0) == (200, True)
    assert json.loads(Path("out/loop/privacy.json").read_text())["epsilon"] == spent.epsilon
    assert f"epsilon={spent.epsilon}" in capsys.readouterr().out


def test_a_noiseless_step_of_the_plain_loop_is_the_clipped_mean(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noiseless = PLAIN_LOOP.replace("target_epsilon=1.0", "noise_multiplier=0.0, clip_norm=1.6").replace(
        "=10)", "=0.05)"
    )
    prepare, run = noiseless.split("loop = ")
    names: dict = {}
    exec(prepare, names)
    before = copy.deepcopy(names["model"]).double()
    exec("loop = " + run, names)
    batch = {"x": torch.cat([b["0"] for b in names["draw"]]), "labels": torch.cat([b["1"] for b in names["draw"]])}
    batch = {name: values.double() for name, values in batch.items()}
    assert 50 < len(batch["x"]) < 150  # 100, with a deviation of 9.7
    assert names["mechanism"].num_steps == 1

    def loss(model, one):
        return names["example_losses"](model, (one["x"], one["labels"]))[0]

    norms = [float(reference.norm(g)) for g in reference.example_gradients(before, batch, loss)]
    assert min(norms) < 1.6 < max(norms)
    expected = reference.clipped_sum(before, batch, loss, 1.6)
    for name, after in names["model"].named_parameters():
        step = before.get_parameter(name) - after.double()
        assert torch.allclose(step, 2.0 * expected[name] / 100, atol=1e-6)  # float32 weights of about 0.3


def test_a_script_of_trl_becomes_private_by_the_class_and_privacy(gpt2, tmp_path, monkeypatch, capsys):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    old, new = ("".join(f"{n[1:]}\n" for n in WITH_TRL.splitlines() if n[:1] in (" ", sign, "")) for sign in "-+")
    assert len(set(new.splitlines()) - set(old.splitlines())) == 4
    pairs = [{"prompt": "the", "chosen": f" patient {i}", "rejected": " patient"} for i in range(16)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list(pairs))
    monkeypatch.chdir(tmp_path)
    on_cpu = trl.DPOConfig("out", use_cpu=True, bf16=False, report_to="none")
    names: dict = {"on_cpu": on_cpu}
    small = new.replace("Qwen/Qwen3-0.6B", str(gpt2)).replace("=512)", "=8), args=on_cpu")
    exec(small, names)
    assert names["trainer"].privacy_spent().num_steps == 6
    assert names["trainer"].privacy_spent().epsilon <= 8.0
    assert "pair of answers" in capsys.readouterr().out


def test_people_are_protected_with_these_settings():
    config = eval(PEOPLE, {"PrivacyConfig": PrivacyConfig})
    assert (config.unit_column, config.records_per_unit) == ("author", 8)
    config = eval(OWNERS, {"PrivacyConfig": PrivacyConfig})
    assert (config.unit_column, config.contribution_bound) == ("users", 4)


def test_no_page_has_code_that_no_test_runs():
    run = [EXAMPLE, RECOMPUTE, RECIPE, OTHER_ADAPTER, PEOPLE, OWNERS, PLAIN_LOOP, WITH_TRL]
    there = [found for page in PAGES for found in blocks(str(page.relative_to(ROOT)), r"\w+")]
    assert sorted(there) == sorted(run)


def test_every_file_that_a_page_names_is_there(page):
    for name in re.findall(r"`((?:scripts|recipes|hf_dp|tests)/[\w./-]+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name


def test_every_option_that_a_page_gives_a_command_exists(page):
    verbs = typer.main.get_command(cli.app).commands
    for line in commands(page):
        for verb, arguments in re.findall(r"hf-dp (\w+)([^#]*)", line):
            known = {"--help", *(option for parameter in verbs[verb].params for option in parameter.opts)}
            assert set(re.findall(r"--[a-z][\w-]*", arguments)) <= known, line
        for name, arguments in re.findall(r"(scripts/\w+) (-[^#]*)", line):
            assert (source := ROOT / name).exists(), line
            assert all(option in source.read_text() for option in re.findall(r"--[a-z][\w-]*", arguments)), line


def test_every_link_of_a_page_leads_to_a_page_or_a_heading(page):
    for link in LINK.findall(without_blocks(page)):
        path, _, anchor = link.partition("#")
        if path.startswith("https://"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", without_blocks(target), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, link


def test_the_readme_links_every_page():
    linked = {(ROOT / link).resolve() for link in LINK.findall(README) if "://" not in link}
    assert [str(page) for page in PAGES[1:] if page not in linked] == []


def test_the_readme_is_short_and_no_line_but_a_tables_is_wide(page):
    assert page != PAGES[0] or len(README.encode()) < LARGEST
    lines = page.read_text(encoding="utf-8").splitlines()
    wide = [line for line in lines if len(line) > WIDTH and not line.startswith("|")]
    assert wide == []


def test_the_changelog_names_the_version_of_privacy_json_that_is_written():
    assert f"`privacy.json` version {card.SCHEMA_VERSION}**" in README.split("## Changelog")[1]


def test_the_file_tree_is_that_of_the_package():
    tree = README.split("## Files")[1].split("## ")[0]
    inside = [p for p in (ROOT / "hf_dp").iterdir() if not p.name.startswith("__")]
    here = {p.name for p in inside if p.suffix == ".py"} | {
        f"{p.name}/" for p in inside if (p / "__init__.py").exists()
    }
    named = set(re.findall(r"^ {2,4}(\w+(?:\.py|/)) ", tree, re.MULTILINE))
    assert sorted(here - named) == []
    assert sorted(named - here) == []


def test_the_page_of_the_house_has_a_line_for_every_room():
    rooms = {p.parent.name for p in (ROOT / "hf_dp").glob("*/__init__.py")}
    named = re.findall(r"^\| `(\w+)/` \|", (ROOT / "hf_dp/README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(rooms)
