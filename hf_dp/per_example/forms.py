"""Whether the rows that a trained parameter meets are the examples', or shared by all: found once on public records,
and never read off a size, which may coincide.

The inventory makes two passes over the same public records, of n and of m examples. A leading dimension of k n rows in
the one and k m rows in the other is that of the examples; one of equal size in both belongs to all of them, such as T
positions, heads, or a table of distances. Whether k is 1 is noted too: where examples had one row each, several would
be of a layout that nothing has been shown of, such as the pieces of longer texts. This stays so whatever the sizes of a
later batch are: there, the form that was found is taken. Rows that cannot have it are an `UnseenUse`; a step then gives
each of these examples a pass of its own.

A pass over several examples is not possible without forms.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

Key: TypeAlias = tuple[str, str, int]  # a parameter, an operation, the number of dimensions of what it meets


SHARED, ONE, SEVERAL = 0, 1, 2  # rows of no example; one an example; several an example, one after the other
_OPEN = -1


class Forms(dict[Key, int]):
    """Whose rows a parameter meets: SHARED, ONE or SEVERAL.

    Attributes:
        unit_rows: k, how many rows of a pass each example has (see `units`).
    """

    def __init__(self, noted: Mapping[Key, int] | None = None, unit_rows: int = 1) -> None:
        super().__init__(noted or {})
        self.unit_rows = unit_rows


class Use(NamedTuple):
    """One meeting of a parameter with other values.

    Attributes:
        size: the leading one.
        flat: whether several rows an example have a rule there.
        led: whether the rows were taken for the examples'.
    """

    size: int
    flat: bool
    led: bool


def settled(first: Mapping[Key, Sequence[Use]], second: Mapping[Key, Sequence[Use]], n: int, m: int) -> dict[Key, int]:
    """The forms on which passes of n and of m rows agree."""
    forms = {}
    for key in first.keys() & second.keys():
        if len(first[key]) == len(second[key]):
            found = {_form(a, b, n, m) for a, b in zip(first[key], second[key], strict=True)}
            if found == {SHARED} or found <= {ONE, SEVERAL}:
                forms[key] = max(found)
    return forms


def _form(a: Use, b: Use, n: int, m: int) -> int:
    times, rest = divmod(a.size, n)
    if not rest and b.size == times * m and (times == 1 or a.flat):
        return ONE if times == 1 else SEVERAL
    return SHARED if a.size == b.size else _OPEN


def disagreeing(forms: Forms, *passes: Mapping[Key, Sequence[Use]]) -> list[Key]:
    """What the passes used in another form than that, or in none that is known."""
    return list(
        {
            key: None
            for seen in passes
            for key, uses in seen.items()
            for use in uses
            if key not in forms or use.led != bool(forms[key])
        }
    )
