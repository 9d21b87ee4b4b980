"""Data sets, collators, losses and models that keep something from one record to the next are refused before a step."""

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_dp import ConfigError, DPTrainer, PrivateLoop, SelfCheckError
from hf_dp.errors import HfDpError
from tests.support import models as M
from tests.support import runs
from tests.training.test_loop import DATA, losses, mechanism

CALLS = [0]
RANDOM = random.Random(0)


def refused(folder: Path, match: str, **given: Any) -> None:
    """At construction or at the start of the training, before anything is charged."""
    with pytest.raises(HfDpError, match=match):
        runs.trainer(folder, **given).train()
    assert not list(folder.rglob("*.jsonl"))


# ---- collators -------------------------------------------------------------------------------------------------------


def shifted(records: list[Any], by: int) -> dict[str, Tensor]:
    batch = runs.collate(records)
    batch["input_ids"] = batch["input_ids"].roll(by, 1)
    return batch


def around_a_list() -> Callable[[Any], Any]:
    prompts = itertools.cycle([0, 1, 2])
    return lambda records: shifted(records, next(prompts))


def counting() -> Callable[[Any], Any]:
    calls = itertools.count()
    return lambda records: shifted(records, next(calls) // 3 % 2)


def of_the_module(records: list[Any]) -> Any:
    CALLS[0] += 1
    return shifted(records, CALLS[0] % 2)


class OnlyNewOnes:
    """What was seen before comes out otherwise."""

    def __init__(self) -> None:
        self.seen: set[tuple[int, ...]] = set()

    def __call__(self, records: list[Any]) -> Any:
        known = {tuple(r["input_ids"]) for r in records} <= self.seen
        self.seen.update(tuple(r["input_ids"]) for r in records)
        return shifted(records, int(known))


class AsTheOneBefore:
    """Takes over something of the record before: only after another record is it seen."""

    longest = 0

    def __call__(self, records: list[Any]) -> Any:
        batch = shifted(records, int(type(self).longest > 8))
        type(self).longest = max(len(r["input_ids"]) for r in records)
        return batch


@pytest.mark.parametrize("kind", [around_a_list, counting, lambda: of_the_module, OnlyNewOnes, AsTheOneBefore])
def test_a_collator_that_remembers_is_refused(kind: Callable[[], Any], tmp_path: Path) -> None:
    refused(tmp_path, "the collator gives something else", data_collator=kind())


def test_a_collator_put_in_its_place_after_construction_is_refused_too(tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path)
    trainer.data_collator = around_a_list()
    with pytest.raises(ConfigError, match="the collator gives something else"):
        trainer.train()
    trainer.data_collator = lambda records: shifted(records, int(RANDOM.random() < 1e-9))
    with pytest.raises(ConfigError, match=r"generators of its own in the collator\.RANDOM"):
        trainer.train()


class Helped:
    """Draws in a method that another method calls, and within a comprehension."""

    def drawn(self, n: int) -> list[int]:
        return [RANDOM.randrange(3) for _ in range(n)]

    def __call__(self, records: list[Any]) -> Any:
        return shifted(records, self.drawn(1)[0])


def test_a_generator_in_a_helper_method_or_a_comprehension_is_named(tmp_path: Path) -> None:
    refused(tmp_path, r"data_collator\.drawn\.RANDOM", data_collator=Helped())


def test_what_draws_from_global_generators_is_taken(tmp_path: Path) -> None:
    def drawing(records: list[Any]) -> Any:
        return shifted(records, int(torch.randint(3, ())) + np.random.randint(2) + random.randrange(2))

    trainer = runs.trainer(tmp_path, data_collator=drawing)
    trainer.train()
    assert trainer.privacy_spent().num_steps == 1


# ---- data sets -------------------------------------------------------------------------------------------------------


class Counted(torch.utils.data.Dataset[Any]):
    def __init__(self) -> None:
        self.rows, self.calls = list(runs.text_rows()), 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        self.calls += 1
        row = self.rows[index]
        return row if self.calls % 3 else {**row, "input_ids": row["input_ids"][::-1]}


def transformed() -> Any:
    calls = itertools.count()

    def reversed_at_times(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        odd = next(calls) % 2
        return {**batch, "input_ids": [ids[::-1] if odd else ids for ids in batch["input_ids"]]}

    return runs.text_rows().with_transform(reversed_at_times)


@pytest.mark.parametrize("data", [Counted, transformed])
def test_a_data_set_that_remembers_is_refused(data: Callable[[], Any], tmp_path: Path) -> None:
    refused(tmp_path, "the data set gives something else", train_dataset=data())


class Anything(torch.utils.data.Dataset[Any]):
    """Whatever a record may hold, made anew for each call."""

    def __init__(self) -> None:
        self.rows = list(runs.text_rows())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        row = self.rows[index]
        ids = np.array(row["input_ids"])
        missing = {"a": float("nan"), "b": np.array([1.0, float("nan")]), "c": ["x", None, float("nan")]}
        return {**row, "input_ids": ids.tolist(), "more": [ids, torch.tensor(ids), missing]}


def test_arrays_numbers_that_are_none_and_objects_are_no_reason_to_refuse(tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path, train_dataset=Anything(), check_records=list(runs.text_rows())[:3])
    trainer.train()
    assert trainer.privacy_spent().num_steps == 1


# ---- losses and models -----------------------------------------------------------------------------------------------


def of_tokens(outputs: Any, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class InTurn:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, outputs: Any, labels: Tensor) -> Tensor:
        self.calls += 1
        return of_tokens(outputs, labels) * (1 + self.calls % 3)


def with_a_global(outputs: Any, labels: Tensor) -> Tensor:
    CALLS[0] += 1
    return of_tokens(outputs, labels) * (1 + CALLS[0] % 2)


class AroundTheMean:
    mean = 0.0

    def __call__(self, outputs: Any, labels: Tensor) -> Tensor:
        loss = of_tokens(outputs, labels)
        AroundTheMean.mean += 0.1 * (float(loss) - AroundTheMean.mean)
        return loss * (1 if float(loss) > AroundTheMean.mean else -1) + AroundTheMean.mean


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("loss", [InTurn, lambda: with_a_global, AroundTheMean])
def test_a_loss_that_remembers_is_refused(loss: Callable[[], Any], size: int, tmp_path: Path) -> None:
    refused(tmp_path, "loss of an example", compute_loss_func=loss(), per_device_train_batch_size=size)


class OfItsClass:
    calls = 0

    def number(self) -> int:
        OfItsClass.calls += 1
        return OfItsClass.calls


class Cycle:
    def __init__(self) -> None:
        self.heads = itertools.cycle(range(3))

    def number(self) -> int:
        return next(self.heads)


def model_with(kept: Any, number: Callable[[], float]) -> nn.Module:
    """A layer of the model is scaled by a number that it gets elsewhere."""
    model = M.with_lora(M.llama)
    layer = next(m for m in model.modules() if type(m).__name__ == "LlamaMLP")
    layer.kept = kept

    class Scaled(type(layer)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + number() % 2)

    layer.__class__ = Scaled
    return model


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("kind", [Cycle])
def test_a_model_whose_memory_cannot_be_put_back_is_refused(kind: type, size: int, tmp_path: Path) -> None:
    kept = kind()
    refused(tmp_path, "loss of an example", model=model_with(kept, kept.number), per_device_train_batch_size=size)


LONGEST = [0]


class OfTheModelsClassForCausalLM(nn.Module):
    """Remembers the longest input that any of its class has met, which first matters above 40 tokens."""

    longest = 0

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.config = base, base.config

    def remembered(self, length: int) -> int:
        kind = type(self)
        kind.longest = max(kind.longest, length)
        return kind.longest

    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        out = self.base(input_ids=input_ids, **given)
        out.logits = out.logits * (2.0 if self.remembered(input_ids.shape[1]) > 40 else 1.0)
        return out


class OfAGlobalForCausalLM(OfTheModelsClassForCausalLM):
    def remembered(self, length: int) -> int:
        LONGEST[0] = max(LONGEST[0], length)
        return LONGEST[0]


class OfADefaultForCausalLM(OfTheModelsClassForCausalLM):
    def remembered(self, length: int, kept: dict[str, int] = {"longest": 0}) -> int:  # noqa: B006
        kept["longest"] = max(kept["longest"], length)
        return kept["longest"]


@pytest.mark.parametrize("kind", [OfTheModelsClassForCausalLM, OfAGlobalForCausalLM, OfADefaultForCausalLM])
def test_what_a_models_class_and_its_functions_remember_is_put_back_before_each_example(
    kind: type, tmp_path: Path
) -> None:
    rows = runs.text_rows(longest=12)
    long = {name: (values * 60)[:50] for name, values in rows[0].items()}
    lengths = {"max_position_embeddings": 64}
    data = datasets.Dataset.from_list([long, *rows])
    sums = []
    for records in (data, data.select(range(1, len(data)))):
        torch.manual_seed(0)
        trainer = runs.trainer(
            tmp_path / str(len(sums)), kind(M.llama(**lengths)), train_dataset=records, remove_unused_columns=False
        )
        assert "longest" in trainer.alone_because or "outlives" in trainer.alone_because
        sums.append(runs.clipped_sum(trainer, runs.collated(list(records), 1)))
    assert (sums[0] - sums[1]).norm() <= 1.001 * trainer.mechanism.clip_norm  # type: ignore[union-attr]


class Teacher(nn.Module):
    """Another model, outside of the one that is trained: what it gives from some length on, it remembers."""

    longest = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.longest = max(self.longest, ids.shape[1])
        return torch.ones((), dtype=torch.float32) * (2 if self.longest > 8 else 1)


def test_what_a_teacher_beside_the_model_remembers_is_put_back_before_each_example(tmp_path: Path) -> None:
    teacher = Teacher()

    class Distilled(DPTrainer):
        def example_losses(self, model: nn.Module, inputs: Any) -> Tensor:
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            targets = inputs["labels"][:, 1:]
            found = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none").sum(1)
            return found * teacher(inputs["input_ids"])

    made = runs.trainer(tmp_path)
    rows = made.train_dataset
    given = {"privacy": made.privacy, "train_dataset": rows, "data_collator": runs.collate}
    trainer = Distilled(made.model, made.args, **given)
    assert "a module beside the model" in trainer.alone_because
    short = [dict(row) for row in rows if len(row["input_ids"]) < 8][:4]
    longest = max((dict(row) for row in rows), key=lambda row: len(row["input_ids"]))
    with_it = runs.clipped_sum(trainer, runs.collated([longest, *short], 1))
    without = runs.clipped_sum(trainer, runs.collated(short, 1))
    assert float((with_it - without).norm()) <= 1.0001 * trainer.private_step.level.clip_norm


GENERATORS: dict[str, tuple[Any, Callable[[Any], float]]] = {
    "Python's": (random.Random(0), lambda g: float(g.random() < 0.02)),
    "numpy's": (np.random.default_rng(0), lambda g: float(g.random() < 0.02)),
    "old numpy's": (np.random.RandomState(0), lambda g: float(g.rand() < 0.02)),
    "torch's": (torch.Generator(), lambda g: float(torch.rand(1, generator=g) < 0.02)),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_in_a_model_is_refused_however_seldom_it_matters(kind: str, tmp_path: Path) -> None:
    kept, draw = GENERATORS[kind]
    refused(tmp_path, r"advances .*mlp\.kept", model=model_with(kept, lambda: draw(kept)))


def test_a_loss_made_of_gradients_is_computed_again_as_it_is(tmp_path: Path) -> None:
    def penalised(outputs: Any, labels: Tensor) -> Tensor:
        loss = of_tokens(outputs, labels)
        return loss + torch.autograd.grad(loss, outputs.logits, create_graph=True)[0].square().sum()

    trainer = runs.trainer(tmp_path, compute_loss_func=penalised, per_device_train_batch_size=1)
    trainer.train()
    assert trainer.privacy_spent().num_steps == 1


# ---- what changes while training goes on -----------------------------------------------------------------------------


def centred(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output - output.mean(0, keepdim=True)


class Changes(TrainerCallback):
    """Makes a batch's rows meet, from some moment on."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.at == 0:
            self.change(kwargs["model"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.at and state.global_step == self.at:
            self.change(kwargs["model"])

    def change(self, model: nn.Module) -> None:
        layer = next(m for m in model.modules() if type(m).__name__ == "LlamaMLP")
        layer.register_forward_hook(centred)


@pytest.mark.parametrize("at", [0, 2])
def test_a_hook_that_comes_later_is_found_before_the_next_step(at: int, tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path, callbacks=[Changes(at)], max_steps=4)
    with pytest.raises(SelfCheckError, match="was changed during training"):
        trainer.train()
    assert trainer.privacy_spent().num_steps == at


def test_a_loss_that_is_replaced_while_training_is_examined(tmp_path: Path) -> None:
    class Replaces(Changes):
        def change(self, model: nn.Module) -> None:
            plain = trainer.example_losses

            def around_the_mean(model: nn.Module, batch: Any) -> Tensor:
                found = plain(model, batch)
                return found - found.mean()

            trainer.example_losses = around_the_mean  # type: ignore[method-assign]

    trainer = runs.trainer(tmp_path, callbacks=[Replaces(1)], max_steps=3)
    with pytest.raises(HfDpError):
        trainer.train()
    assert trainer.privacy_spent().num_steps == 1


def test_what_changes_and_keeps_examples_apart_trains_on(tmp_path: Path) -> None:
    class Notes(Changes):
        def change(self, model: nn.Module) -> None:
            model.note = "a callback was here"  # type: ignore[assignment]

    trainer = runs.trainer(tmp_path, callbacks=[Notes(1)], max_steps=3)
    trainer.train()
    assert trainer.privacy_spent().num_steps == 3


def test_other_records_need_another_trainer(tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path)
    trainer.train_dataset = runs.text_rows().shuffle(seed=1)
    with pytest.raises(ConfigError, match="make a new trainer"):
        trainer.train()


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("gradient_accumulation_steps", 4, "gradient_accumulation_steps=4: .*set it to 1"),
        ("fp16", True, "fp16=True: .*use bf16=True or float32"),
        ("load_best_model_at_end", True, "declare the evaluation data public"),
    ],
)
def test_options_that_are_changed_after_construction_are_refused(
    name: str, value: Any, match: str, tmp_path: Path
) -> None:
    trainer = runs.trainer(tmp_path)
    setattr(trainer.args, name, value)
    with pytest.raises(HfDpError, match=match):
        trainer.train()
    assert not list(tmp_path.rglob("*.jsonl"))


def test_another_privacy_needs_another_trainer(tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path)
    trainer.privacy = replace(trainer.privacy, public_eval=not trainer.privacy.public_eval)
    with pytest.raises(ConfigError, match="privacy changed after construction"):
        trainer.train()


@pytest.mark.parametrize("how", ["in place", "through numpy", "another one", "fewer", "another size"])
def test_a_draw_may_not_be_changed_on_its_way_to_a_step(how: str, tmp_path: Path) -> None:
    class Changed(DPTrainer):
        def training_step(self, model: nn.Module, inputs: Any, *args: Any) -> Tensor:
            batch = inputs["micro_batches"][0]
            ids = batch["input_ids"].values
            if how == "in place":
                ids[0] = ids[0].flip(0)
            elif how == "through numpy":
                ids.numpy()[:] = ids.numpy().max()
            elif how == "another one":
                inputs["micro_batches"][0] = {**batch, "input_ids": ids.flip(0)}
            elif how == "fewer":
                inputs["micro_batches"] = inputs["micro_batches"][1:]
            else:
                inputs["sizes"][0] -= 1
            return super().training_step(model, inputs, *args)

    base = runs.trainer(tmp_path)
    settings = {"train_dataset": base.train_dataset, "data_collator": base.data_collator}
    trainer = Changed(base.model, base.args, privacy=base.privacy, **settings)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(HfDpError, match="as they were collated"):
        trainer.train()
    assert all(map(torch.equal, before, trainer.model.parameters()))


def test_a_step_may_be_wrapped(tmp_path: Path) -> None:
    class Counted(DPTrainer):
        steps = 0

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            self.steps += 1
            return super().training_step(*args, **kwargs)

    base = runs.trainer(tmp_path)
    settings = {"train_dataset": base.train_dataset, "data_collator": base.data_collator}
    trainer = Counted(base.model, base.args, privacy=base.privacy, **settings)
    trainer.train()
    assert trainer.steps == trainer.privacy_spent().num_steps > 0


def test_bringing_a_batch_to_the_device_may_not_be_overridden(tmp_path: Path) -> None:
    class Scales(DPTrainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            return {name: x // 2 if x.max() > 10 else x for name, x in inputs.items()}

    trainer = runs.trainer(tmp_path)
    with pytest.raises(HfDpError, match=r"Scales\._prepare_inputs.*data_collator"):
        Scales(trainer.model, trainer.args, privacy=trainer.privacy, train_dataset=trainer.train_dataset)


# ---- the same in a plain loop ----------------------------------------------------------------------------------------


@pytest.fixture
def loop(tmp_path: Path) -> PrivateLoop:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return PrivateLoop(model, torch.optim.SGD(model.parameters(), lr=0.1), losses, mechanism(), tmp_path)


def test_a_loop_refuses_what_remembers(loop: PrivateLoop) -> None:
    calls = itertools.count()

    class Noisy(torch.utils.data.TensorDataset):
        generator = torch.Generator()

        def __getitem__(self, index: Any) -> Any:
            return self.tensors[0][index] + torch.randn(4, generator=self.generator), self.tensors[1][index]

    with pytest.raises(ConfigError, match="the collator gives something else"):
        next(
            loop.draws(DATA, collate=lambda rs: torch.utils.data.default_collate([(x * next(calls), y) for x, y in rs]))
        )
    with pytest.raises(ConfigError, match=r"generator|something else"):
        next(loop.draws(Noisy(*DATA.tensors)))
    assert loop.privacy_spent().num_steps == 0


def test_a_draw_may_not_be_changed(loop: PrivateLoop) -> None:
    draws = loop.draws(DATA)
    draw = next(draws)
    draw[0]["0"] = draw[0]["0"] / draw[0]["0"].std(0)
    with pytest.raises(HfDpError, match="as they were"):
        loop.backward(draw)
    assert all(p.grad is None for p in loop.model.parameters())


def test_a_draw_with_arrays_is_taken_as_it_was(loop: PrivateLoop) -> None:
    def collate(records: Any) -> Any:
        x, y = torch.utils.data.default_collate(records)
        return x, y, [np.array([float("nan"), 1.0]) for _ in records]

    draws = loop.draws(DATA, collate=collate)
    loop.backward(next(draws))
    assert loop.privacy_spent().num_steps == 1


def test_an_array_of_a_draw_may_not_be_changed(loop: PrivateLoop) -> None:
    def collate(records: Any) -> Any:
        x, y = torch.utils.data.default_collate(records)
        return x, y, [np.ones(2) for _ in records]

    draws = loop.draws(DATA, collate=collate)
    draw = next(draws)
    draw[0]["2"][0][1] = 7
    with pytest.raises(HfDpError, match="as they were"):
        loop.backward(draw)


@pytest.mark.parametrize("how", ["by an operation", "through numpy", "through .data"])
def test_a_draw_may_not_be_changed_in_place(how: str, loop: PrivateLoop) -> None:
    draws = loop.draws(DATA)
    draw = next(draws)
    x = draw[0]["0"] if how == "by an operation" else draw[0]["0"].data
    if how == "through numpy":
        x.numpy()[:] -= x.numpy().mean(0)
    else:
        x -= x.mean(0)
    with pytest.raises(HfDpError, match="as they were"):
        loop.backward(draw)


def test_a_loops_model_is_examined_again_once_it_changed(loop: PrivateLoop) -> None:
    optimizer = loop._guard._optimizer
    assert optimizer is not None
    draws = loop.draws(DATA)
    loop.backward(next(draws))
    optimizer.step()
    loop.model[1].register_forward_hook(centred)  # type: ignore[index]
    draw = next(draws)
    with pytest.raises(SelfCheckError, match="was changed during training"):
        loop.backward(draw)
    assert loop.privacy_spent().num_steps == 1


def test_a_step_hook_that_comes_after_the_loop_is_refused(loop: PrivateLoop) -> None:
    optimizer = loop._guard._optimizer
    assert optimizer is not None
    draws = loop.draws(DATA)
    draw = next(draws)
    optimizer.register_step_pre_hook(lambda *_: loop.model[0].weight.grad.add_(1))  # type: ignore[index]
    before = loop.model[0].weight.detach().clone()  # type: ignore[index]
    loop.backward(draw)
    with pytest.raises(HfDpError, match="step pre-hook was registered"):
        optimizer.step()
    assert torch.equal(before, loop.model[0].weight)  # type: ignore[index]
