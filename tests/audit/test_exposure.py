"""Exposure of planted secrets: its definition, how much of it is chance, and that the demo plants and measures it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from hf_dp.audit.exposure import CHANCE, are_given_away, exposures
from hf_dp.demo.records import write_records
from hf_dp.demo.secrets import NUM_OTHERS, NUM_SECRETS, Exposure, given_away, make_secrets
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
    with_them = write_records(tmp_path / "a", **sizes, planted=[group[0] for group in hidden])
    without = write_records(tmp_path / "b", **sizes)
    lines = with_them.private_train.read_text().splitlines()
    assert lines[:-NUM_SECRETS] == without.private_train.read_text().splitlines()[:-NUM_SECRETS]
    assert [json.loads(line) for line in lines[-NUM_SECRETS:]] == [group[0] for group in hidden]
    everything = "".join(path.read_text() for path in with_them)
    for group in hidden:
        assert len({r["note"] for r in group}) == NUM_OTHERS + 1
        assert everything.count(group[0]["note"].split(" asked")[0]) == 1


def test_a_model_that_learnt_a_secret_by_heart_gives_it_away(tmp_path: Path) -> None:
    """The positive control: the same small model before and after it read two of the secrets over and over."""
    import datasets

    from hf_dp.demo.base import MAX_TOKENS, small_llama, train_tokenizer
    from hf_dp.recipe.examples import PadRight, completions

    hidden = make_secrets()[:2]
    data = DataSection(train="-", prompt="topic: {topic}\n", target="{note}")
    tokenizer = train_tokenizer([r["note"] for group in make_secrets(1) for r in group[:5]])
    torch.manual_seed(0)
    model = small_llama(tokenizer)
    before = given_away(model, tokenizer, data, hidden)
    rows = completions(datasets.Dataset.from_list([g[0] for g in hidden]), data, tokenizer, MAX_TOKENS).rows
    batch = PadRight(tokenizer.pad_token_id)(rows.to_list())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    after = given_away(model, tokenizer, data, hidden)
    assert after[0].tolist() == [np.log2(NUM_OTHERS + 1)] * 2
    assert before[0].max() < np.log2(NUM_OTHERS + 1)
    assert (before[1], after[1]) == (0, 2)
    assert Exposure.of(before, after).has_power
    assert "No power" not in Exposure.of(before, after).in_words()
    assert "No power" in Exposure.of(after, before).in_words()
