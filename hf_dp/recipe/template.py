"""A template such as `"{mr} | "` and a record -> text. `{a|b}` is column a, or column b if the data have no a.

Only columns can be named, without attributes, indices or format specifications, so that a recipe cannot run code. `{{`
and `}}` are braces.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from string import Formatter

from hf_dp.errors import RecipeError

TEXT = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class Template:
    """Literal pieces, each followed by a column or by alternatives for it.

    Args:
        text: as in the recipe.
        pieces: (literal, alternatives); there are no alternatives after the last literal.
    """

    text: str
    pieces: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def parse(cls, text: str) -> "Template":
        """Reads `text`.

        Raises:
            RecipeError: unbalanced braces, or something other than a column's name between them.
        """
        pieces: list[tuple[str, tuple[str, ...]]] = []
        try:
            parsed = list(Formatter().parse(text))
        except ValueError as error:
            raise RecipeError(
                f"template {text!r}: {error}; write a column as {{name}} and a brace of its own twice"
            ) from None
        for literal, name, spec, conversion in parsed:
            if name is not None and (spec or conversion or not all(part.strip() for part in name.split("|"))):
                raise RecipeError(
                    f"template {text!r}: expected {{column}} or {{column|other column}}, got "
                    f"{{{name}{_marks(spec, conversion)}}}"
                )
            pieces.append((literal, () if name is None else tuple(part.strip() for part in name.split("|"))))
        return cls(text, tuple(pieces))

    def resolve(self, columns: Iterable[str]) -> "Template":
        """The template with one column in each place: the first alternative that the data have.

        Raises:
            RecipeError: places for which the data have no column. Names all of them, and the nearest column.
        """
        columns = list(columns)
        wrong, pieces = [], []
        for literal, alternatives in self.pieces:
            found = [name for name in alternatives if name in columns]
            if alternatives and not found:
                wrong.append(missing_column(alternatives, columns))
            pieces.append((literal, tuple(found[:1])))
        if wrong:
            raise RecipeError("; ".join(wrong))
        return Template(self.text, tuple(pieces))

    def columns(self) -> list[str]:
        """The columns that a resolved template reads."""
        return [name for _, found in self.pieces for name in found]

    def render(self, record: Mapping[str, object]) -> str:
        """The text for one record; a missing value (null) is empty. The template must have been resolved.

        Raises:
            RecipeError: a value that is not text, a number or a truth value, because Python's notation of it would get
                into the text.
        """
        parts = []
        for literal, column in self.pieces:
            parts.append(literal)
            if column:
                value = record[column[0]]
                if not isinstance(value, TEXT):
                    raise RecipeError(no_text(column[0], f"a {type(value).__name__}"))
                parts.append("" if value is None else str(value))
        return "".join(parts)


def no_text(column: str, held: str) -> str:
    """The message that a column cannot stand in a template, with the remedy."""
    return (
        f"column {column!r} holds {held}, and a template takes text or numbers: make a column of text of it first "
        "(datasets' `map`; of a chat by tokenizer.apply_chat_template(messages, tokenize=False)), and name that"
    )


def missing_column(names: Iterable[str], columns: Iterable[str]) -> str:
    """The message that a column is missing: which columns there are, and which was perhaps meant."""
    names, columns = list(names), list(columns)
    near = get_close_matches(names[0], columns, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    return f"no column {' or '.join(map(repr, names))} (there are {', '.join(map(repr, columns)) or 'none'}){meant}"


def _marks(spec: str | None, conversion: str | None) -> str:
    return (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
