"""The plain loop: what it refuses, each time with the weights left as they were, and what it charges."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset, default_collate

from hf_dp import (
    CaptureError,
    ConfigError,
    LedgerError,
    PrivacyConfig,
    PrivateLoop,
    SelfCheckError,
    plan,
)
from hf_dp.errors import ReleaseError

DATA = TensorDataset(torch.randn(60, 4), torch.randint(3, (60,)))


def losses(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def mechanism(steps=3, **privacy):
    settings = {"noise_multiplier": 1.0, "target_delta": 1e-3, "expected_batch_size": 20, **privacy}
    return plan(PrivacyConfig(**settings), len(DATA), num_train_epochs=1, max_steps=steps)


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture
def optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.fixture
def loop(model, optimizer, tmp_path):
    return PrivateLoop(model, optimizer, losses, mechanism(), tmp_path)


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def charged(loop):
    return loop.privacy_spent().num_steps


def test_each_step_is_charged_and_moves_the_weights(loop, model, optimizer):
    assert charged(loop) == 0
    for number, draw in enumerate(loop.draws(DATA)):
        before = weights(model).clone()
        loop.backward(draw)
        assert charged(loop) == number + 1
        assert torch.equal(weights(model), before)
        optimizer.step()
        assert not torch.equal(weights(model), before)
        optimizer.zero_grad()
    assert charged(loop) == 3


def test_gradients_are_the_clipped_sum_and_noise_over_the_expected_batch(tmp_path):
    wide = nn.Linear(4, 20_000)
    loop = PrivateLoop(wide, torch.optim.SGD(wide.parameters()), losses, mechanism(1, noise_multiplier=2.0), tmp_path)
    for draw in loop.draws(DATA):
        loop.backward(draw)
        gradients = torch.cat([p.grad.reshape(-1) for p in wide.parameters()]) * 20 / 2.0
        break
    # 100,000 normals and at most 20 of norm 1 beside them: the deviation is within 1.1 % but once in a million runs
    assert float(gradients.std()) == pytest.approx(1.0, rel=0.011)


@pytest.mark.parametrize(
    "wrong", ["no backward", "no step", "twice", "another draw", "own backward", "closure", "steps"]
)
def test_what_is_out_of_order_is_an_error_and_costs_no_weights(wrong, loop, model, optimizer):
    draws = loop.draws(DATA)
    draw = next(draws)
    before = weights(model).clone()
    if wrong == "no backward":
        with pytest.raises(ReleaseError, match=r"over without loop\.backward"):
            next(draws)
        with pytest.raises(ReleaseError, match="without a release"):
            optimizer.step()
    elif wrong == "another draw":
        with pytest.raises(ReleaseError, match="yielded last, once"):
            loop.backward(copy.copy(draw))
        assert charged(loop) == 0
    else:
        loop.backward(draw)
    if wrong == "no step":
        with pytest.raises(ReleaseError, match=r"over without optimizer\.step"):
            next(draws)
    if wrong == "twice":
        with pytest.raises(ReleaseError, match="yielded last, once"):
            loop.backward(draw)
        assert charged(loop) == 1
    if wrong == "own backward":
        losses(model, DATA[:5]).mean().backward()
        with pytest.raises(ReleaseError, match=r"gradients of 0.weight, 0.bias, 2.weight, 2.bias are not those"):
            optimizer.step()
    if wrong == "closure":
        with pytest.raises(ReleaseError, match="no closure"):
            optimizer.step(lambda: 0.0)
    if wrong == "steps":
        optimizer.step()
        before = weights(model).clone()
        with pytest.raises(ReleaseError, match="without a release"):
            optimizer.step()
    assert torch.equal(weights(model), before)


def test_a_foreign_batch_size_is_an_error_that_is_charged(loop, model):
    draws = loop.draws(DATA)
    draw = next(draws)
    draw.append({name: values[:1] for name, values in draw[0].items()})  # one record a second time
    with pytest.raises(CaptureError, match="micro-batches of the draw as they were"):
        loop.backward(draw)
    assert charged(loop) == 1
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ReleaseError, match=r"over without loop\.backward"):
        next(draws)


def test_a_loss_of_the_batch_and_a_collator_that_repeats_are_refused_before_the_first_step(
    loop, model, optimizer, tmp_path
):
    mean = PrivateLoop(model, optimizer, lambda m, b: losses(m, b).mean(), mechanism(), tmp_path)
    with pytest.raises(CaptureError, match="one loss for each of 3 examples"):
        next(mean.draws(DATA))
    with pytest.raises(CaptureError, match="one loss for each of 1 examples"):
        next(loop.draws(DATA, collate=lambda records: default_collate([*records, *records])))
    assert not list(tmp_path.glob("*.jsonl"))


def test_what_couples_examples_is_refused_and_what_has_no_rule_gets_passes_of_one_example(tmp_path):
    def coupled(model, batch):
        return losses(model, batch) / len(batch[0])

    net = nn.Linear(4, 3)
    with pytest.raises(SelfCheckError, match="couples the examples"):
        next(PrivateLoop(net, torch.optim.SGD(net.parameters()), coupled, mechanism(), tmp_path).draws(DATA))

    class Odd(nn.Linear):
        def forward(self, x):
            return torch.cdist(x, self.weight)

    odd = Odd(4, 3, bias=False)
    loop = PrivateLoop(odd, torch.optim.SGD(odd.parameters()), losses, mechanism(), tmp_path)
    draw = next(loop.draws(DATA))
    assert "weight (used by cdist)" in loop.alone_because
    assert {batch.size for batch in draw} <= {1}

    net = nn.Linear(4, 3)
    sorted_ = PrivateLoop(
        net, torch.optim.SGD(net.parameters()), lambda m, b: losses(m, b).sort().values, mechanism(), tmp_path / "s"
    )
    next(sorted_.draws(DATA))
    assert "not proved that its examples are independent" in sorted_.alone_because


def test_parameters_and_settings_that_do_not_fit_are_named_together(model, tmp_path):
    stranger = nn.Parameter(torch.zeros(1))
    held = torch.optim.SGD([*model[0].parameters(), stranger], lr=0.1)
    with pytest.raises(ConfigError) as caught:
        PrivateLoop(model, held, losses, mechanism(log_loss_up_to=10.0, debug_seed=1), tmp_path)
    for part in ("hold 2.weight, 2.bias", "1 parameters that are not the model's", "log_loss_up_to", "debug_seed"):
        assert part in str(caught.value)


def test_a_budget_file_is_refused_since_no_mechanism_holds_it():
    with pytest.raises(ConfigError, match="takes no budget_file"):
        mechanism(budget_file="budget.json")


def test_other_data_and_a_folder_in_use_are_refused(loop, model, optimizer, tmp_path):
    with pytest.raises(ConfigError, match="expected the 60 records of the plan, got 59"):
        next(loop.draws(TensorDataset(*DATA[:59])))
    for draw in loop.draws(DATA):
        loop.backward(draw)
        optimizer.step()
    again = copy.deepcopy(model)
    with pytest.raises(LedgerError, match="choose another output_dir"):
        next(PrivateLoop(again, torch.optim.SGD(again.parameters()), losses, mechanism(), tmp_path).draws(DATA))


def test_a_record_that_is_not_finite_and_an_empty_draw_are_steps_like_any_other(model, tmp_path):
    features = DATA.tensors[0].clone()
    features[7] = float("nan")
    data = TensorDataset(features, DATA.tensors[1])
    begun = copy.deepcopy(model)  # weights that were trained on these records are one training's alone
    for folder, batch in (("all", 60), ("few", 1)):
        model = copy.deepcopy(begun)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loop = PrivateLoop(model, optimizer, losses, mechanism(12, expected_batch_size=batch), tmp_path / folder)
        sizes = []
        for draw in loop.draws(data, max_examples=7):
            sizes.append(sum(len(part["1"]) for part in draw))
            loop.backward(draw)
            optimizer.step()
        assert charged(loop) == 12
        assert weights(model).isfinite().all()
    assert 0 in sizes  # twelve draws at q = 1/60: all hold a record in 1 of 2,000 million runs


def test_dictionaries_of_token_records_train(tmp_path):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(11, 5), nn.Linear(5, 2)

        def forward(self, ids):
            return self.head(self.embedding(ids).mean(1))

    data = [{"ids": torch.randint(11, (6,)), "labels": int(i % 2)} for i in range(60)]
    bag = Bag()
    optimizer = torch.optim.AdamW(bag.parameters())

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch["ids"]), batch["labels"], reduction="none")

    loop = PrivateLoop(bag, optimizer, loss, mechanism(2), tmp_path)
    for draw in loop.draws(data):
        loop.backward(draw)
        optimizer.step()
    loop.write_card(tmp_path)
    assert json.loads((tmp_path / "privacy.json").read_text())["segments"][0]["num_steps"] == 2
