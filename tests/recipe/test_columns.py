"""What speaks against protecting each record by itself: persons with several, and records that say the same."""

from typing import Any

import pytest
from datasets import Dataset

from hf_dp.recipe.columns import near_duplicates, warnings

SAME = ["The pump, no. 4, stopped again today.", "the pump no. 7 stopped -- again, today!"]
OTHER = "a man of eighty came with his daughter"


def rows(*texts: str, **columns: list[Any]) -> Dataset:
    return Dataset.from_dict({"text": list(texts), **columns})


def test_records_with_the_same_words_are_counted_whatever_numbers_and_punctuation() -> None:
    assert near_duplicates(rows(*SAME, OTHER), None) == 2
    assert near_duplicates(rows(SAME[0], "the pump stopped", OTHER), None) == 0
    assert near_duplicates(rows("thank you", "thank you"), None) == 0  # so few words are many people's
    assert near_duplicates(rows(*SAME, other=["read at noon", "read at night"]), None) == 0
    assert near_duplicates(Dataset.from_dict({"number": [1, 1]}), None) == 0
    assert near_duplicates(Dataset.from_dict({"text": [SAME[0], None, SAME[1]]}), None) == 2


def test_a_person_may_repeat_themselves_where_the_person_is_the_unit() -> None:
    assert near_duplicates(rows(*SAME, OTHER, author=["a", "a", "b"]), "author") == 0
    assert near_duplicates(rows(*SAME, OTHER, author=["a", "b", "b"]), "author") == 2
    assert near_duplicates(rows(*SAME, author=["a", "b"]), None) == 0  # the authors are words too


@pytest.mark.parametrize("column", ["user", "patient_id", "Author"])
def test_a_column_of_persons_is_warned_of_while_the_record_is_the_unit(column: str) -> None:
    found = rows(*SAME, OTHER, **{column: [1, 2, 1]})
    person, alike = warnings(found, None)
    assert f"{column} looks like a person's name or number, and 1 of 3 records" in person
    assert f"privacy.unit_column={column}" in person
    assert "2 of 3 records have the words of another record's" in alike
    (alike,) = warnings(found, column)
    assert f"another {column}'s" in alike
    assert warnings(rows(OTHER, "and quite another text of some words", **{column: [1, 2]}), None) == []


def test_lists_of_persons_are_warned_of_and_their_records_compared() -> None:
    """Words that two records share are in both their owners' where the lists are the same."""
    users = [["a", "b"], ["b", "a"], ["c"]]
    person, alike = warnings(rows(*SAME, OTHER, users=users), None)
    assert "users looks like a person's name or number, and 1 of 3 records" in person
    assert "privacy.unit_column=users privacy.contribution_bound=4" in person
    assert "2 of 3 records have the words of another record's" in alike
    assert warnings(rows(*SAME, OTHER, users=users), "users") == []
    assert near_duplicates(rows(*SAME, OTHER, users=[["a", "b"], ["b"], ["c"]]), "users") == 2
    assert near_duplicates(rows(*SAME, author=["Ann\u00e9", "Anne\u0301"]), "author") == 0
