"""A recipe's text and its overrides -> one nested mapping, with the plain scalars of YAML 1.2: `no` is a word, 1e-5 a
number.

PyYAML follows YAML 1.1: there `save_strategy: no` is false, `learning_rate: 2e-3` is a string, and of two equal keys
the later one wins silently. Here the first two mean what they say, and the third is an error.
"""

import re
from collections.abc import Hashable, Sequence
from typing import Any

import yaml

from hf_dp.errors import RecipeError

_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_NULL = re.compile(r"~|null|Null|NULL|")
Section = dict[str, Any]  # values of YAML, which `settings` checks before they are used


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        keys = [key.value for key, _ in node.value]
        twice = sorted({str(k) for k in keys if keys.count(k) > 1})
        if twice:
            raise yaml.MarkedYAMLError(
                problem=f"{', '.join(twice)} is given twice", problem_mark=node.value[-1][0].start_mark
            )
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", _BOOL, "tTfF"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("null", _NULL, ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern.pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value.replace("_", "")))


def parse(text: str, source: str) -> object:
    """The value of the YAML text.

    Raises:
        RecipeError: it is not YAML; says where.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{source}{where}: expected YAML, got: {problem}.") from None


def nested(text: str, source: str, overrides: Sequence[str] = ()) -> Section:
    """The recipe as a mapping of sections, with the overrides applied.

    `section.key=value` sets a key; further dots go deeper; `section=null` drops a section. The value is YAML, so that
    `8`, `true` and `[a, b]` are a number, a truth value and a list. A value that begins with a brace is text, because
    templates begin like that.

    Raises:
        RecipeError: not YAML, not a mapping, or invalid overrides; names all invalid overrides.
    """
    recipe = parse(text, source)
    if not isinstance(recipe, dict):
        raise RecipeError(f"{source}: expected a mapping with sections such as `model:`, got {_kind(recipe)}.")
    recipe = {str(name): section for name, section in recipe.items()}
    wrong = [problem for override in overrides if (problem := _put(recipe, override))]
    if wrong:
        raise RecipeError("\n".join(wrong))
    return recipe


def _put(recipe: Section, override: str) -> str | None:
    """Applies one override in place; returns the problem, if there is one."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        return f"override {override!r}: expected section.key=value, such as privacy.target_epsilon=4."
    try:
        value = text if text.startswith("{") else parse(text, f"override {override!r}")
    except RecipeError as error:
        return str(error)
    inner = recipe
    for depth, key in enumerate(keys[:-1]):
        if inner.get(key) is None:
            inner[key] = {}
        inner = inner[key]
        if not isinstance(inner, dict):
            return (
                f"override {override!r}: {'.'.join(keys[: depth + 1])} is {_kind(inner)}, so nothing can be set in it."
            )
    inner[keys[-1]] = value
    return None


def _kind(value: object) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"
