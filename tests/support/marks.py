"""Which of many similar cases run every time."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def quick(every_time: Container[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases; all but those named are `slow`: they run before a release."""
    return [case if case in every_time else pytest.param(case, marks=pytest.mark.slow) for case in cases]
