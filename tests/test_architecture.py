"""The rules of the house, read off the source: who may import whom, how long things are, what the world may rely on."""

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_dp"

# Data flows down this list: a room imports only from those above it, and only what the other room's `__init__` offers.
# A new room is given its place here. The first line holds the words that everybody speaks, each a file of its own.
ORDER = """
    errors schedule config mechanism durable tables
    pictures randomness per_example sampling accounting ledger audit card step training recipe sweep cli demo
""".split()
WORDS = ("errors", "schedule", "config", "mechanism", "durable", "tables")
PURE = {"per_example", "randomness"}  # take tensors and floats
NOT_FOR_PURE = {"config", "mechanism"}
LIGHT = """
    hf_dp hf_dp.config hf_dp.mechanism hf_dp.randomness hf_dp.accounting hf_dp.ledger hf_dp.audit hf_dp.card hf_dp.cli
""".split()
HEAVY = "torch transformers peft datasets accelerate matplotlib".split()
# The command line's verbs: each parameter is an option that typer shows.
VERBS = set("train check plan verify budget card push audit report sweep merge generate init recipe".split())
# They stand in for functions of torch.nn.functional and of torch, whose signatures are not ours.
MIRRORS = {"embedding", "conv2d", "multi_head_attention", "recurrent"}
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 400, 60, 6

SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def room(path: Path) -> str:
    """The name in ORDER that a source file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


class Import(NamedTuple):
    """One import of hf_dp's own: the room, how many names deep it reaches into it, the names taken, and where."""

    room: str
    depth: int
    names: tuple[str, ...]
    line: int


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def own_imports(tree: ast.AST) -> Iterator[Import]:
    """Every import of hf_dp's own, within functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write it in full"
            names = tuple(a.name for a in node.names)
            whole = node.module == "hf_dp"
            found = [(f"hf_dp.{name}", ()) for name in names] if whole else [(str(node.module), names)]
        else:
            continue
        for module, names in found:
            if module.startswith("hf_dp."):
                _, name, *rest = module.split(".")
                yield Import(name, len(rest), names, node.lineno)


@cache
def imports_in(path: Path) -> tuple[Import, ...]:
    return tuple(own_imports(tree_of(path)))


@cache
def attributes_in(path: Path) -> frozenset[str]:
    return frozenset(node.attr for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute))


@cache
def offered(name: str) -> set[str]:
    """What a room's door offers: `__all__` of its `__init__`."""
    tree = tree_of(PACKAGE / name / "__init__.py")
    for node in tree.body:
        if isinstance(node, ast.Assign) and [t.id for t in node.targets if isinstance(t, ast.Name)] == ["__all__"]:
            return set(ast.literal_eval(node.value))
    return set()


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def num_parameters(function: Function) -> int:
    """Without self, cls or an autograd.Function's ctx, and without *args and **kwargs."""
    named = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len(named) - (named[:1] in (["self"], ["cls"], ["ctx"]))


@pytest.fixture(params=SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def source(request) -> Path:
    return request.param


def test_every_module_has_its_place():
    assert {room(p) for p in SOURCES} - {"__init__", "__main__"} <= set(ORDER)


def test_a_room_imports_only_from_those_above_it(source):
    here = room(source)
    if here in ("__init__", "__main__"):
        return
    for there, _, _, line in imports_in(source):
        assert there in ORDER, f"{source.name}:{line} imports hf_dp.{there}, which has no place in ORDER"
        assert ORDER.index(there) <= ORDER.index(here), (
            f"{source.name}:{line}: {here} may not import {there}, which is below it"
        )
        assert not (here in PURE and there in NOT_FOR_PURE), (
            f"{source.name}:{line}: {here} takes tensors and floats, not {there}"
        )


def test_a_room_is_entered_by_its_door(source):
    for there, depth, names, line in imports_in(source):
        if there in WORDS or there == room(source):
            continue
        assert depth == 0, f"{source.name}:{line} imports past the door of {there}: take it from hf_dp.{there}"
        missing = set(names) - offered(there)
        assert not missing, f"{source.name}:{line}: hf_dp.{there} does not offer {', '.join(sorted(missing))}"


@pytest.mark.parametrize("name", [name for name in ORDER if name not in WORDS])
def test_a_door_offers_only_what_another_room_takes(name):
    others = [p for p in SOURCES if room(p) != name]
    taken = {n for path in others for there, _, names, _ in imports_in(path) if there == name for n in names}
    attributes = {attribute for path in others for attribute in attributes_in(path)}
    assert offered(name) <= taken | attributes | {"main"}


def test_no_files_of_a_room_import_each_other_in_a_circle():
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[module] = set()
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom) and path.name != "__init__.py":
                for alias in node.names:
                    graph[module] |= {str(node.module), f"{node.module}.{alias.name}"}
    left = {module: targets & set(graph) - {module} for module, targets in graph.items()}
    while free := [module for module, targets in left.items() if not targets & set(left)]:
        for module in free:
            del left[module]
    assert not left, f"these import each other: {', '.join(sorted(left))}"


def test_the_import_rule_sees_every_way_to_import():
    code = "import hf_dp.config\nfrom hf_dp import card\ndef f():\n from hf_dp.cli.x import y\nimport torch"
    found = [(there, depth) for there, depth, _, _ in own_imports(ast.parse(code))]
    assert found == [("config", 0), ("card", 0), ("cli", 1)]


def test_files_functions_and_signatures_are_short(source):
    assert len(source.read_text().splitlines()) <= MAX_FILE, "a file holds one idea: split it"
    for function in functions(tree_of(source)):
        length = function.end_lineno - function.lineno + 1
        assert length <= MAX_FUNCTION, f"{function.name} has {length} lines"
        exempt = function.name in (VERBS if room(source) == "cli" else MIRRORS)
        assert exempt or num_parameters(function) <= MAX_PARAMETERS, (
            f"{function.name} has {num_parameters(function)} parameters"
        )


def test_attributes_are_neither_probed_nor_set_by_name(source):
    for node in ast.walk(tree_of(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("hasattr", "setattr", "delattr"), f"{source.name}:{node.lineno}: {node.func.id}"


def test_every_file_says_what_it_is(source):
    assert ast.get_docstring(tree_of(source)), "the first line says what goes in and what comes out"


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module):
    code = f"import sys, {module}; print(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], f"{module} imports them before they are needed"


# ---- what the world may rely on: adding or removing a name fails here, on purpose ------------------------------------


def test_the_public_names_are_these():
    import hf_dp

    assert (
        hf_dp.__all__
        == (
            "AccountingError AuditConfig AuditError CaptureError ConfigError DPSeq2SeqTrainer DPTrainer DPTrainerMixin "
            "HfDpError LedgerError Mechanism PrivacyConfig PrivacySpent PrivateLoop RecipeError SelfCheckError "
            "UnsupportedOptionError UnsupportedParameterError plan"
        ).split()
    )
    for name in hf_dp.__all__:
        assert getattr(hf_dp, name).__name__ == name
    assert set(hf_dp.__all__) < set(dir(hf_dp))
    with pytest.raises(AttributeError, match="no attribute 'GradientDP'"):
        hf_dp.GradientDP  # noqa: B018


def test_the_settings_are_these():
    from hf_dp import Mechanism, PrivacyConfig

    assert [f.name for f in dataclasses.fields(PrivacyConfig)] == (
        "target_epsilon noise_multiplier target_delta expected_batch_size clip_norm log_loss_up_to noise unit_column "
        "records_per_unit contribution_bound noise_schedule clip_schedule batch_schedule public_eval "
        "budget_file debug_seed if_unset".split()
    )
    assert [f.name for f in dataclasses.fields(Mechanism)] == (
        "num_examples expected_batch_size num_steps noise_multiplier clip_norm delta target_epsilon loss_bound unit "
        "relation debug noise records_per_unit contribution_bound levels".split()
    )
