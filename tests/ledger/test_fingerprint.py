"""The same data are recognised, and others are not; without the folder's key the fingerprint tells nobody anything."""

import datetime
import decimal
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets

from hf_dp.errors import ConfigError, LedgerError
from hf_dp.ledger.fingerprints import KEY_BYTES, KEY_NAME, ROWS, fingerprint
from tests.support import runs

RECORDS = [{"input_ids": [1, 2, 3], "labels": 0}, {"input_ids": [4], "labels": 1}]


def rows(count: int = 5) -> list[dict[str, Any]]:
    return [{"text": f"row {i}", "labels": i} for i in range(count)]


def test_the_same_data_in_one_folder_have_one_fingerprint_and_in_two_folders_two(tmp_path: Path) -> None:
    for data in (RECORDS, Dataset.from_list(RECORDS)):
        here = fingerprint(data, tmp_path / "a")
        assert len(here) == 64
        assert here == fingerprint(data, tmp_path / "a")
        assert here != fingerprint(data, tmp_path / "b")


@pytest.mark.parametrize("wrap", [list, Dataset.from_list])
def test_any_change_of_the_data_changes_it(wrap: Any, tmp_path: Path) -> None:
    changed = [
        rows()[::-1],
        rows(4),
        rows(6),
        [*rows(4), {"text": "row 4", "labels": 5}],
        [*rows(4), {"text": "row  4", "labels": 4}],
        [{"text": r["text"], "label": r["labels"]} for r in rows()],
        [{**r, "more": 1} for r in rows()],
        [{**r, "labels": float(r["labels"])} for r in rows()],
        [*rows(1), rows()[2], rows()[1], *rows()[3:]],
    ]
    found = {fingerprint(wrap(data), tmp_path) for data in [rows(), *changed]}
    assert len(found) == 1 + len(changed)


def test_how_a_dataset_is_cut_and_dressed_does_not_matter(tmp_path: Path) -> None:
    count = 2 * ROWS + 7
    plain = Dataset.from_list(rows(count))
    expected = fingerprint(plain, tmp_path)
    double = concatenate_datasets([plain, plain])
    for same in (
        concatenate_datasets([plain.select(range(10)), plain.select(range(10, count))]),
        double.select(range(count)),
        double.select(range(count, 2 * count)),
        plain.select(list(range(count))[::-1]).select(list(range(count))[::-1]),
        plain.with_format("torch"),
        plain.with_transform(lambda batch: {"text": ["another"] * len(batch["text"])}),
        plain.map(lambda r: r, keep_in_memory=True),
    ):
        assert fingerprint(same, tmp_path) == expected


def test_it_follows_a_run_from_tokenised_rows_on_disk(tmp_path: Path) -> None:
    data = runs.text_rows(40)
    data.save_to_disk(str(tmp_path / "saved"))
    assert fingerprint(Dataset.load_from_disk(str(tmp_path / "saved")), tmp_path) == fingerprint(data, tmp_path)


def test_values_of_different_kinds_do_not_run_together(tmp_path: Path) -> None:
    values = [
        *(None, 1, 1.0, True, False, 0, "1", b"1", "", b"", [], {}, [1], [[1]], (2,), {"a": 1}, {"a": [1]}, {1: 1}),
        *(["ab", "c"], ["a", "bc"], ["abc"], "abc", [None], {"a": {"b": 1}}, float("nan"), -0.0),
        *(torch.tensor([1, 2]), torch.tensor([1.0, 2.0]), torch.tensor([[1, 2]]), torch.tensor([1, 2]).bfloat16()),
        *(np.array([1, 2], dtype=np.int32), np.array([1.0, 2.0]), np.float32(1), np.zeros((2, 0)), np.zeros((0, 2))),
    ]
    found = {fingerprint([{"x": value}], tmp_path) for value in values}
    assert len(found) == len(values)
    assert fingerprint([{"a": 1, "b": 2}], tmp_path) == fingerprint([{"b": 2, "a": 1}], tmp_path)


def test_random_augmentations_repeat_and_the_generators_are_put_back(tmp_path: Path) -> None:
    class Augmented(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"x": torch.randn(3) + index, "y": np.random.rand(2)}

    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = fingerprint(Augmented(), tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert fingerprint(Augmented(), tmp_path) == first


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (datetime.datetime(2026, 1, 2), datetime.datetime(2026, 1, 2, 3)),
        (datetime.date(2026, 1, 2), datetime.datetime(2026, 1, 2)),
        (datetime.time(1), datetime.time(2)),
        (datetime.timedelta(1), datetime.timedelta(2)),
        (decimal.Decimal("3.5"), decimal.Decimal("3.50")),
    ],
)
def test_times_and_exact_numbers_have_bytes_of_their_own(one: object, other: object, tmp_path: Path) -> None:
    first, again, changed = (fingerprint([{"x": value}], tmp_path) for value in (one, one, other))
    assert first == again != changed


def test_what_has_no_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"a record holds a object, which has no defined bytes.*Let the data set return"
    ):
        fingerprint([{"x": object()}], tmp_path)


# ---- the key ---------------------------------------------------------------------------------------------------------


def test_the_key_is_its_owners_alone_and_stays_out_of_what_is_pushed(tmp_path: Path) -> None:
    fingerprint(RECORDS, tmp_path)
    path = tmp_path / KEY_NAME
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(path.read_bytes()) == KEY_BYTES
    assert KEY_NAME.startswith("_")  # Trainer pushes with ignore_patterns=["_*", ...]
    path.chmod(0o644)
    fingerprint(RECORDS, tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_guess_at_the_data_cannot_be_compared_without_the_key(tmp_path: Path) -> None:
    found = fingerprint(RECORDS, tmp_path)
    assert found not in {hashlib.sha256(repr(guess).encode()).hexdigest() for guess in (RECORDS, RECORDS[0])}
    (tmp_path / KEY_NAME).unlink()
    assert fingerprint(RECORDS, tmp_path) != found


def test_a_key_that_is_none_is_refused_and_kept(tmp_path: Path) -> None:
    for content in (b"", b"short", b"x" * 33):
        (tmp_path / KEY_NAME).write_bytes(content)
        with pytest.raises(LedgerError, match=rf"expected a key of 32 bytes, found {len(content)}.*from a backup"):
            fingerprint(RECORDS, tmp_path)
        assert (tmp_path / KEY_NAME).read_bytes() == content


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="give write access"):
        fingerprint(RECORDS, tmp_path / "file")


def test_keys_of_two_folders_differ(tmp_path: Path) -> None:
    for name in "ab":
        fingerprint(RECORDS, tmp_path / name)
    assert (tmp_path / "a" / KEY_NAME).read_bytes() != (tmp_path / "b" / KEY_NAME).read_bytes()
