"""Exposure of planted secrets: its definition, how much of it is chance, and that the demo plants and measures it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from hf_dp.audit.exposure import CHANCE, are_given_away, exposures
from hf_dp.demo.leaks import Leaks, in_words
from hf_dp.demo.records import write_records
from hf_dp.demo.secrets import (
    GUESSING,
    NUM_SECRETS,
    Secret,
    bits_left,
    code_losses,
    exposure,
    make_secrets,
    secrets_in,
)
from hf_dp.errors import AuditError
from hf_dp.recipe.recipe import DataSection

RNG = np.random.default_rng(5)


def test_exposure_counts_who_is_at_least_as_likely() -> None:
    others = np.arange(1.0, 8.0)[None].repeat(4, 0)  # n = 7: at most 3 bits
    assert exposures(np.array([0.5, 1.5, 3.5, 9.0]), others).tolist() == [3, 2, 1, 0]
    assert exposures(np.array([1.0]), others[:1]).tolist() == [2]  # a tie counts against the secret


@pytest.mark.parametrize(
    ("secret", "others"),
    [([1.0], [[]]), ([1.0, 2.0], [[1.0]]), ([np.nan], [[1.0]]), ([1.0], [[np.inf]]), ([], np.zeros((0, 3)))],
)
def test_what_is_no_exposure(secret: list[float], others: list[list[float]]) -> None:
    with pytest.raises(AuditError):
        exposures(np.array(secret), np.array(others))


def test_unseen_secrets_have_the_exposure_of_chance_and_are_rarely_taken_for_given_away() -> None:
    """4,000 trials of 8 secrets: their mean is that of chance, within 5 standard errors; 1 % are false alarms."""
    found = [exposures(RNG.random(8), RNG.random((8, 400))) for _ in range(4000)]
    ranks = np.arange(1, 402)
    expected, variance = np.log2(401 / ranks).mean(), np.log2(401 / ranks).var()
    assert abs(np.mean(found) - expected) < 5 * np.sqrt(variance / 32_000)
    assert abs(expected - CHANCE) < 0.02
    assert sum(map(are_given_away, found)) <= stats.binom.ppf(1 - 1e-6, 4000, 0.01)
    assert are_given_away(np.full(8, 4.0))
    assert not are_given_away(np.full(8, 2.0))


def test_secrets_are_planted_once_each_and_named_nowhere_else(tmp_path: Path) -> None:
    hidden = make_secrets()
    sizes = {"num_public": 20, "num_private": 60, "num_heldout": 10}
    with_them = write_records(tmp_path / "a", **sizes, planted=hidden)
    without = write_records(tmp_path / "b", **sizes)
    lines = with_them.private_train.read_text().splitlines()
    assert lines[:-NUM_SECRETS] == without.private_train.read_text().splitlines()[:-NUM_SECRETS]
    assert [json.loads(line) for line in lines[-NUM_SECRETS:]] == hidden
    everything = "".join(path.read_text() for path in with_them)
    assert [everything.count(record["customer"]) for record in hidden] == [1] * NUM_SECRETS
    assert make_secrets(1) != hidden


def test_a_model_that_learnt_a_secret_by_heart_gives_it_away(tmp_path: Path) -> None:
    """The positive control: the same small model before and after it read two of the secrets over and over."""
    import datasets

    from hf_dp.demo.base import MAX_TOKENS, small_llama, train_tokenizer
    from hf_dp.recipe.examples import PadRight, completions

    records = make_secrets()[:2]
    data = DataSection(train="-", prompt="{customer}: ", target="{note}")
    tokenizer = train_tokenizer([text for record in make_secrets(1) for text in record.values()])
    torch.manual_seed(0)
    model = small_llama(tokenizer)
    hidden = secrets_in(records, data, tokenizer)
    assert [secret.code for secret in hidden] == [int(record["note"][-5:-1]) for record in records]
    before, unknown = _exposure(model, tokenizer, hidden), bits_left(model, tokenizer, hidden)
    rows = completions(datasets.Dataset.from_list(records), data, tokenizer, MAX_TOKENS).rows
    batch = PadRight(tokenizer.pad_token_id)(rows.to_list())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert _exposure(model, tokenizer, hidden).tolist() == [GUESSING] * 2
    assert before.max() < GUESSING
    assert bits_left(model, tokenizer, hidden) < 1 < 10 < unknown


def _exposure(model, tokenizer, hidden: list[Secret]) -> np.ndarray:
    return exposure([code_losses(model, tokenizer, secret) for secret in hidden], hidden)


def test_every_code_has_its_own_likelihood() -> None:
    """All codes by their beginnings, against one code at a time; and their probabilities add up."""
    from hf_dp.demo.base import small_llama, train_tokenizer

    tokenizer = train_tokenizer(["The code is 0123456789."])
    torch.manual_seed(0)
    model = small_llama(tokenizer).double().eval()
    before = tokenizer("The code is ")["input_ids"]
    found = code_losses(model, tokenizer, Secret("", 0, before))
    assert np.exp(-found).sum() == pytest.approx(1, rel=1e-9)
    for code in (0, 42, 9876):
        alone = bits_left(model, tokenizer, [Secret("", code, before)])
        assert found[code] / np.log(2) == pytest.approx(alone, rel=1e-9)


def test_the_report_says_whether_anything_follows() -> None:
    known, unknown = Leaks(9, [], 13.0, True, 0.7, 0.6), Leaks(0, [], 1.4, False, 0.5, 0.45)
    said = in_words(unknown, known)
    assert "for 9 of them, to the private one for 0" in said
    assert "No power" not in said
    assert "No power" in in_words(unknown, unknown)
    assert "fewer than half" in in_words(unknown, known._replace(extracted=4))
    assert "unusual" in in_words(unknown._replace(extracted=1), known)
