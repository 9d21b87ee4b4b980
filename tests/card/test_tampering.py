"""Every field of privacy.json changed, alone and with the card rendered again; ledgers cut, edited and hashed again.

Folders of earlier versions are accepted. What cannot be told is listed here by name, as in the first lines of
hf_dp/card/verification.py, and nothing else passes.
"""

import contextlib
import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from hf_dp.accounting.selection import Selection
from hf_dp.audit.report import Counts, audit_record
from hf_dp.card import writing as card
from hf_dp.card.assumptions import GAUSSIAN, sampler, sentences
from hf_dp.card.record import Record
from hf_dp.card.schema import SCHEMA, SCHEMA_VERSION
from hf_dp.card.verification import verify
from hf_dp.ledger.format import GENESIS, HASH_FIELD, encode
from hf_dp.ledger.ledger import LEDGER_NAME, read_ledger
from hf_dp.mechanism import Segment, unit_of
from tests.support.folders import failures, model_folder
from tests.support.marks import quick

Path_ = tuple[str | int, ...]
DATA = Path(__file__).parents[1] / "support" / "data"
SAMPLED = {"false_positive_rates", "true_positive_rates"}  # of these long lists, first, middle and last are changed

# changed alone, nothing else in the folder says otherwise
UNTOLD_ALONE = {("libraries", "hf_dp"), ("mechanism", "target_epsilon")}
# changed with card, picture and YAML rendered again: what was declared or planned, and what was installed
UNTOLD_WITH_CARD = UNTOLD_ALONE | {("accountant", "version"), ("mechanism", "num_steps_planned")}
# what an audit counted, where the bounds do not follow from it, and areas under curves, which need the scores
UNTOLD_WITH_CARD |= {("audit", "guesses", 0, 1), ("audit", "guesses", 2, 1)}
UNTOLD_WITH_CARD |= {("audit", "area_under_curve"), ("audit", "control_area_under_curve")}
# what a sweep was planned to stay within
UNTOLD_ALONE |= {("selection", "target_epsilon")}
UNTOLD_WITH_CARD |= UNTOLD_ALONE
COUNTS = Counts("gradient", 300, ((30, 17), (90, 70), (300, 165)), 0.6, 0.6)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("sound"), audit=COUNTS)


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def leaves(value: Any, at: Path_ = ()) -> Iterator[Path_]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, (*at, name))
    elif isinstance(value, list):
        some = {0, len(value) // 2, len(value) - 1} if at[-1] in SAMPLED else range(len(value))
        for index in some:
            yield from leaves(value[index], (*at, index))
    else:
        yield at


def changed(value: Any) -> Any:
    """Another value of the same kind, near by: a half more of a number, another last letter."""
    if value is None:
        return "other"
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 1.5 or 0.125
    return value[:-1] + ("0" if value[-1] != "0" else "1")


RECORD = json.loads((DATA / "schema_1" / "privacy.json").read_text()) | {
    "epsilon_at": [{"delta": 0.0, "epsilon": 0.0}] * 4,
    "tradeoff": {"advantage": 0.0, "false_positive_rates": [0.0] * 29, "true_positive_rates": [0.0] * 29},
    "covered": ["a", "b"],
    "audit": audit_record(COUNTS, (), 1e-4, float("inf")).stated(),
}
RECORD["mechanism"] |= {
    "released": "the gradient",
    "loss_bound": None,
    "sensitivity": 1.0,
    "generator": "philox",
    "noise_precision": "float32",
}
for segment in RECORD["segments"]:
    segment["noise"] = "gaussian"
RECORD["plans"] = [[Segment.of(segment).stated() for segment in RECORD["segments"]]]
RECORD["assumptions"] = [*RECORD["assumptions"], "a"]
RECORD["epsilon_of_steps_taken"] = RECORD["epsilon"]
LEAVES = {".".join(map(str, at)): at for at in leaves(RECORD)}


def edit(folder: Path, at: Path_) -> dict[str, Any]:
    record = json.loads((folder / card.PRIVACY_JSON).read_text())
    place = record
    for step in at[:-1]:
        place = place[step]
    place[at[-1]] = changed(place[at[-1]])
    (folder / card.PRIVACY_JSON).write_text(json.dumps(record))
    return record


def test_the_fields_to_be_changed_are_all_there_are(sound: Path) -> None:
    assert {*leaves(json.loads((sound / card.PRIVACY_JSON).read_text()))} == {*LEAVES.values()}


@pytest.mark.parametrize("at", quick([*LEAVES.values()][1::3], LEAVES.values()), ids=LEAVES)
def test_a_changed_field_is_caught(at: Path_, folder: Path) -> None:
    edit(folder, at)
    assert bool(failures(folder)) == (at not in UNTOLD_ALONE)


@pytest.mark.parametrize("at", quick([*LEAVES.values()][::4], LEAVES.values()), ids=LEAVES)
def test_a_changed_field_is_caught_with_the_card_rendered_again(at: Path_, folder: Path) -> None:
    record = edit(folder, at)
    with contextlib.suppress(ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        card.write_card(folder, Record.of(record))  # what cannot even be rendered stays an edited record
    assert bool(failures(folder)) == (at not in UNTOLD_WITH_CARD)


def assert_changes_are_caught(whole: Path, places: Iterable[Path_], tmp_path: Path) -> None:
    """Each place of a sound folder's privacy.json is changed in a copy: alone, then with the card rendered again."""
    for number, at in enumerate(places):
        copied = Path(shutil.copytree(whole, tmp_path / str(number)))
        edited = edit(copied, at)
        assert bool(failures(copied)) == (at not in UNTOLD_ALONE), at
        with contextlib.suppress(ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
            card.write_card(copied, Record.of(edited))
        assert bool(failures(copied)) == (at not in UNTOLD_WITH_CARD), at


@pytest.mark.slow
def test_a_changed_field_of_a_discrete_run_is_caught(tmp_path: Path) -> None:
    """Every field, alone and with the card rendered again; and the words of the other kind of noise."""
    whole = model_folder(tmp_path / "sound", noise="discrete")
    assert failures(whole) == ""
    record = json.loads((whole / card.PRIVACY_JSON).read_text())
    assert_changes_are_caught(whole, leaves(record), tmp_path)
    others = [("mechanism", name, GAUSSIAN[name]) for name in ("name", "noise", "noise_precision")]
    others += [("accountant", "epsilon_is", GAUSSIAN["epsilon_is"])]
    for part, name, words in others:
        card.write_card(whole, Record.of(record | {part: record[part] | {name: words}}))
        assert failures(whole), name
    as_gaussian = [segment | {"noise": "gaussian"} for segment in record["segments"]]
    card.write_card(whole, Record.of(record | {"segments": as_gaussian}))
    assert failures(whole)


SELECTION = Selection("geometric", 4.0, ((Segment(0.05, 1.0, 12),),), 30.0)


@pytest.mark.parametrize("part", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 6))])
def test_a_changed_field_of_a_selected_run_is_caught(part: int, tmp_path: Path) -> None:
    """A sixth of them in each part: every one, alone and with the card rendered again."""
    whole = model_folder(tmp_path / "sound", selection=SELECTION)
    assert failures(whole) == ""
    record = json.loads((whole / card.PRIVACY_JSON).read_text())
    assert_changes_are_caught(whole, list(leaves(record))[part::6], tmp_path)


def test_a_forged_selection_is_caught(tmp_path: Path) -> None:
    """The words that say how epsilon was computed, what is not covered, the block left out, another law, other runs."""
    whole = model_folder(tmp_path / "sound", selection=SELECTION)
    record = json.loads((whole / card.PRIVACY_JSON).read_text())
    forged = {
        "epsilon_is": record | {"accountant": record["accountant"] | {"epsilon_is": GAUSSIAN["epsilon_is"]}},
        "not_covered": record | {"not_covered": [s for s in record["not_covered"] if "other runs" not in s]},
        "selection": {name: value for name, value in record.items() if name != "selection"},
        "distribution": record | {"selection": record["selection"] | {"distribution": "logarithmic", "shape": 0.0}},
        "other runs": record
        | {"selection": Selection("geometric", 4.0, ((Segment(0.05, 1.01, 12),),), 30.0).stated(1e-4)},
    }
    for name, changed_record in forged.items():
        card.write_card(whole, Record.of(changed_record))
        assert failures(whole), name


OWNED = {"unit", "relation", "sampler", "contribution_bound", "assumptions", "not_covered"}


@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_changed_field_of_a_run_on_records_of_several_owners_is_caught(part: int, tmp_path: Path) -> None:
    """What says that their owners are fixed and not protected; and all other fields."""
    whole = model_folder(tmp_path / "sound", sigma=2.0, owned=3)
    assert failures(whole) == ""
    record = json.loads((whole / card.PRIVACY_JSON).read_text())
    places = [at for at in leaves(record) if bool(OWNED & {*at}) == (part == 0)]
    assert {name for at in places for name in at if name in OWNED} == (OWNED if part == 0 else set())
    assert_changes_are_caught(whole, places, tmp_path)


def test_a_run_that_would_protect_owners_by_name_alone_is_caught(tmp_path: Path) -> None:
    """Record and card in other words, all of them right for groups of records: the ledger says otherwise."""
    whole, other = (model_folder(tmp_path / name, sigma=2.0, owned=bound) for name, bound in (("a", 3), ("b", None)))
    record, plain = (json.loads((folder / card.PRIVACY_JSON).read_text()) for folder in (whole, other))
    unit = unit_of("users", contribution_bound=3)
    words = {name: plain[name] for name in ("relation", "not_covered")} | {"unit": unit}
    words["assumptions"] = list(sentences(True, ["gaussian"], unit, version=SCHEMA_VERSION).assumptions)
    words["mechanism"] = record["mechanism"] | {"sampler": sampler(unit, 1)}
    card.write_card(whole, Record.of(record | words))
    assert failures(whole).startswith("N, unit, relation, delta")
    assert ";" not in failures(whole).partition("delta: found")[0]
    (whole / LEDGER_NAME).unlink()
    assert failures(whole) == ""  # as said above: a folder in which everything was forged


@pytest.mark.parametrize("field", RECORD)
def test_a_missing_field_is_caught(field: str, folder: Path) -> None:
    record = json.loads((folder / card.PRIVACY_JSON).read_text())
    del record[field]
    (folder / card.PRIVACY_JSON).write_text(json.dumps(record))
    assert ("the card's section in words" if field == "audit" else "privacy.json") in failures(folder)


# ---- the other files -------------------------------------------------------------------------------------------------


def rehashed(lines: list[dict[str, Any]]) -> bytes:
    """A ledger of these records with hashes that are right."""
    head, data = GENESIS, b""
    for line in lines:
        encoded, head = encode(line, head)
        data += encoded
    return data


def records(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line.decode().rpartition(HASH_FIELD)[0] + "}") for line in data.splitlines()]


def with_records(change: Callable[[list[dict[str, Any]]], Any]) -> Callable[[bytes], bytes]:
    def forged(data: bytes) -> bytes:
        lines = records(data)
        change(lines)
        return rehashed(lines)

    return forged


LEDGERS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "a line less": lambda data: b"".join(data.splitlines(keepends=True)[:-1]),
    "half of the lines": lambda data: b"".join(data.splitlines(keepends=True)[:7]),
    "half of the last line": lambda data: data[:-40],
    "a line twice": lambda data: data + data.splitlines(keepends=True)[-1],
    "a line from the middle gone": lambda data: b"".join(
        line for i, line in enumerate(data.splitlines(keepends=True)) if i != 5
    ),
    "two lines exchanged": lambda data: b"".join(
        data.splitlines(keepends=True)[i] for i in (0, 1, 2, 4, 3, *range(5, 14))
    ),
    "more noise, hashes as they were": lambda data: data.replace(b'"noise_multiplier":1.0', b'"noise_multiplier":2.0'),
    "hashed again: more noise": with_records(lambda lines: lines[1].update(noise_multiplier=2.0)),
    "hashed again: another clip norm": with_records(lambda lines: lines[1].update(clip_norm=1.0)),
    "hashed again: a step less": with_records(lambda lines: lines.pop()),
    "hashed again: a step more": with_records(lambda lines: lines.append({"kind": "step", "n": 13})),
    "hashed again: another delta": with_records(lambda lines: lines[0].update(delta=1e-5)),
    "hashed again: of other data": with_records(lambda lines: lines[0].update(data_fingerprint="other")),
    "hashed again: debugging": with_records(lambda lines: lines[0].update(debug=True)),
}


@pytest.mark.parametrize("name", LEDGERS)
def test_a_tampered_ledger_is_caught(name: str, folder: Path) -> None:
    path = folder / LEDGER_NAME
    before = path.read_bytes()
    path.write_bytes(LEDGERS[name](before))
    assert path.read_bytes() != before
    assert "ledger" in failures(folder)


def test_hashing_again_changes_nothing_by_itself(folder: Path) -> None:
    path = folder / LEDGER_NAME
    assert rehashed(records(path.read_bytes())) == path.read_bytes()


def test_a_tampered_picture_is_caught(folder: Path) -> None:
    picture = folder / card.PICTURE
    picture.write_text(picture.read_text().replace("L ", "L 1", 1))
    assert "the card's picture" in failures(folder)
    picture.unlink()
    assert "the card's picture" in failures(folder)


def test_a_field_that_stands_there_twice_is_refused(folder: Path) -> None:
    from hf_dp.errors import ConfigError

    path = folder / card.PRIVACY_JSON
    path.write_text(path.read_text().replace('"epsilon":', '"epsilon": 0.1, "epsilon":', 1))
    with pytest.raises(ConfigError, match="epsilon stands there more than once"):
        verify(folder)


def test_a_whole_folder_made_anew_cannot_be_told(tmp_path: Path) -> None:
    """As verify's first lines say: record, card, picture and ledger of a training that never was, all consistent."""
    assert failures(model_folder(tmp_path, sigma=5.0)) == ""


# ---- versions and the schema -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"schema_{n}{kind}" for n in (1, 2, 3) for kind in ("", "_not_private")])
def test_folders_that_were_written_earlier_are_verified(name: str, tmp_path: Path) -> None:
    old = Path(shutil.copytree(DATA / name, tmp_path / "model"))
    assert failures(old) == ""
    record = json.loads((old / card.PRIVACY_JSON).read_text())
    (old / card.PRIVACY_JSON).write_text(json.dumps(record | {"num_steps": 2}))
    assert "steps" in failures(old)


@pytest.mark.parametrize("name", [f"schema_{n}{kind}" for n in (1, 2) for kind in ("", "_not_private")])
def test_versions_before_the_third_have_no_plans(name: str, tmp_path: Path) -> None:
    old = Path(shutil.copytree(DATA / name, tmp_path / "model"))
    record = json.loads((old / card.PRIVACY_JSON).read_text())
    (old / card.PRIVACY_JSON).write_text(json.dumps(record | {"plans": []}))
    assert "the form of privacy.json" in failures(old)


def test_version_1_in_new_clothes_is_caught(folder: Path) -> None:
    """A new record that says version 1 would escape the checks of the new fields."""
    record = json.loads((folder / card.PRIVACY_JSON).read_text())
    (folder / card.PRIVACY_JSON).write_text(json.dumps(record | {"schema_version": 1}))
    assert "the form of privacy.json" in failures(folder)


def test_a_run_that_ended_early_cannot_pass_for_one_of_version_2(tmp_path: Path) -> None:
    """In which epsilon was that of the steps taken: the ledger has a plan."""
    early = model_folder(tmp_path / "model", steps=3)
    for path in (DATA / "schema_2").iterdir():
        if path.name != LEDGER_NAME:
            shutil.copy(path, early)
    record = json.loads((early / card.PRIVACY_JSON).read_text())
    record["ledger"]["head"] = read_ledger(early / LEDGER_NAME).head
    (early / card.PRIVACY_JSON).write_text(json.dumps(record))
    assert failures(early) == "plans in a ledger from before there were any: found 1, expected 0"


def test_the_schema_is_one_and_explains_every_field() -> None:
    schema = json.loads((Path(card.__file__).parent / SCHEMA).read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"]["schema_version"]["enum"][-1] == SCHEMA_VERSION
    known = copy.deepcopy(RECORD)
    for name in known["mechanism"]:
        assert name in schema["properties"]["mechanism"]["properties"]
    assert {*known, "selection"} == {*schema["properties"]}


def test_the_schema_is_shipped() -> None:
    project = (DATA.parents[2] / "pyproject.toml").read_text()
    assert '"hf_dp.card" = ["card*.md", "*.json"]' in project


def test_verify_answers_without_torch(sound: Path) -> None:
    """The whole command, in a process of its own. It may take 2 seconds besides the accounting; on a busy machine
    time says little, so what is imported is the test."""
    code = (
        "import sys; from hf_dp.cli import main; sys.argv = ['hf-dp', 'verify', sys.argv[1]]\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "heavy = 'torch transformers datasets peft accelerate matplotlib'.split()\n"
        "print(*[m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(sound)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == ""
    assert "Verified" in done.stdout
