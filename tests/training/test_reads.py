"""What user code reads besides its arguments: where that changes it is examined anew, or one example has a pass."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainerCallback
from transformers.models.llama import modeling_llama

from hf_dp import ConfigError, DPTrainer, PrivateLoop, SelfCheckError
from hf_dp.errors import HfDpError
from hf_dp.per_example.libraries import Functions
from hf_dp.per_example.reads import has_changed, reads
from tests.support import models as M
from tests.support import runs
from tests.training.test_loop import DATA, losses, mechanism

SWITCH = {"on": False}
NUMBER = 1
PRIVATE = {"noise_multiplier": 1.0, "target_delta": 1e-5}


class Acts(TrainerCallback):
    """Does something to the trainer before the second step."""

    def __init__(self, act: Callable[[Any], None]) -> None:
        self.act, self.trainer = act, None

    def on_step_begin(self, args: Any, state: Any, control: Any, **k: Any) -> None:
        if state.global_step == 1:
            self.act(self.trainer)


def around(losses: Tensor, is_on: bool) -> Tensor:
    return losses - losses.mean() if is_on else losses


class ByStep(DPTrainer):
    def example_losses(self, model: nn.Module, inputs: Any) -> Tensor:
        return around(super().example_losses(model, inputs), self.state.global_step >= 1)


class ByEpoch(DPTrainer):
    def example_losses(self, model: nn.Module, inputs: Any) -> Tensor:
        return around(super().example_losses(model, inputs), self.is_late())

    def is_late(self) -> bool:
        return bool((self.state.epoch or 0) > 0)


class ByRate(DPTrainer):
    def example_losses(self, model: nn.Module, inputs: Any) -> Tensor:
        rate = self.optimizer.param_groups[0]["lr"] if self.optimizer is not None else 1.0
        return around(super().example_losses(model, inputs), rate < 0.9 * self.args.learning_rate)


class ByAttribute(DPTrainer):
    mixes = False

    def example_losses(self, model: nn.Module, inputs: Any) -> Tensor:
        return around(super().example_losses(model, inputs), self.mixes)


class BySwitch(DPTrainer):
    def example_losses(self, model: nn.Module, inputs: Any) -> Tensor:
        return around(super().example_losses(model, inputs), SWITCH["on"])


def turned_on(trainer: Any) -> None:
    SWITCH["on"] = trainer.mixes = True


@pytest.fixture(autouse=True)
def off() -> Any:
    SWITCH["on"] = False
    yield
    SWITCH["on"] = False


@pytest.mark.parametrize("kind", [ByStep, ByEpoch, ByRate, ByAttribute, BySwitch])
def test_a_loss_that_becomes_another_is_found_at_the_step_that_it_does(kind: type, tmp_path: Path) -> None:
    base, acts = runs.trainer(tmp_path), Acts(turned_on)
    args = runs.arguments(tmp_path, max_steps=4, learning_rate=0.1, lr_scheduler_type="linear")
    settings = {"train_dataset": base.train_dataset, "data_collator": base.data_collator, "callbacks": [acts]}
    acts.trainer = trainer = kind(base.model, args, privacy=base.privacy, **settings)
    with pytest.raises(SelfCheckError, match="was changed during training"):
        trainer.train()
    assert trainer.privacy_spent().num_steps == 1


def test_a_loss_with_an_annealed_weight_trains_on(tmp_path: Path) -> None:
    class Annealed(DPTrainer):
        def example_losses(self, model: nn.Module, inputs: Any) -> Tensor:
            return super().example_losses(model, inputs) * (1 + self.state.global_step)

    base = runs.trainer(tmp_path)
    settings = {"train_dataset": base.train_dataset, "data_collator": base.data_collator}
    trainer = Annealed(base.model, runs.arguments(tmp_path, max_steps=3), privacy=base.privacy, **settings)
    trainer.train()
    assert trainer.privacy_spent().num_steps == 3
    assert not trainer.alone_because


class Collator:
    """Shifts the tokens by the length of the longest record so far, once it is told to."""

    def __init__(self) -> None:
        self.remembers, self.longest = False, 0

    def __call__(self, records: list[Any]) -> dict[str, Tensor]:
        batch = runs.collate(records)
        if self.remembers:
            self.longest = max(self.longest, batch["input_ids"].shape[1])
            batch["input_ids"] = batch["input_ids"].roll(self.longest, 1)
        return batch


def test_a_collator_that_a_callback_changes_is_tried_again(tmp_path: Path) -> None:
    collate = Collator()
    acts = Acts(lambda trainer: setattr(collate, "remembers", True))
    acts.trainer = trainer = runs.trainer(tmp_path, data_collator=collate, callbacks=[acts], max_steps=3)
    with pytest.raises(ConfigError, match="the collator gives something else"):
        trainer.train()
    assert trainer.privacy_spent().num_steps == 1


class Rows(torch.utils.data.Dataset):
    """Text rows; from the second epoch on each is shifted by how often one was read."""

    def __init__(self) -> None:
        self.rows, self.epoch, self.count = list(runs.text_rows()), 0, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        row = dict(self.rows[index])
        if self.epoch:
            self.count += 1
            row["input_ids"] = [(i + self.count) % 40 + 3 for i in row["input_ids"]]
        return row


def test_a_data_set_that_a_callback_changes_is_read_again(tmp_path: Path) -> None:
    data = Rows()
    acts = Acts(lambda trainer: setattr(data, "epoch", 1))
    acts.trainer = trainer = runs.trainer(tmp_path, train_dataset=data, callbacks=[acts], max_steps=3)
    with pytest.raises(ConfigError, match="the data set gives something else"):
        trainer.train()


def test_another_transform_of_the_same_table_is_read_again(tmp_path: Path) -> None:
    rows, calls = runs.text_rows(), [0]

    def counted(batch: Any) -> Any:
        calls[0] += 1
        return {**batch, "input_ids": [[(i + calls[0]) % 40 + 3 for i in ids] for ids in batch["input_ids"]]}

    rows.set_transform(lambda batch: batch)
    trainer = runs.trainer(tmp_path, train_dataset=rows)
    rows.set_transform(counted)
    with pytest.raises(ConfigError, match="the data set gives something else"):
        trainer.train()


@pytest.mark.parametrize(
    ("place", "name"), [(functional, "silu"), (modeling_llama, "rotate_half"), (nn.Linear, "forward")]
)
def test_a_library_function_that_a_callback_replaces_is_found(place: Any, name: str, tmp_path: Path) -> None:
    before = getattr(place, name)

    def mixing(*args: Any, **k: Any) -> Tensor:
        out = before(*args, **k)
        return out - 0.1 * out.mean(0)

    with pytest.MonkeyPatch.context() as patch:
        act = Acts(lambda trainer: patch.setattr(place, name, mixing))
        trainer = runs.trainer(tmp_path, model=M.llama(), privacy=PRIVATE, max_steps=3, callbacks=[act])
        with pytest.raises(SelfCheckError, match="changed during training"):
            trainer.train()
    assert trainer.privacy_spent().num_steps == 1
    assert Functions(trainer.model) == Functions(trainer.model)


def test_a_log_that_grows_is_no_change(tmp_path: Path) -> None:
    sizes: list[int] = []

    def collate(records: list[Any]) -> dict[str, Tensor]:
        sizes.append(len(records))
        return runs.collate(records)

    trainer = runs.trainer(tmp_path, data_collator=collate, max_steps=2)
    settled = trainer._settled
    trainer.train()
    assert trainer._settled is settled
    assert sizes


# ---- what the first call decides -------------------------------------------------------------------------------------


class Vocabulary(Rows):
    """Numbers words in the order in which they are met."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[int, int] = {}

    def __getitem__(self, index: int) -> Any:
        row = super().__getitem__(index)
        return {**row, "input_ids": [self.numbers.setdefault(i, len(self.numbers) % 40 + 3) for i in row["input_ids"]]}


class ByTheFirst(Rows):
    """Shifts all records by the first token of the first one that is read."""

    shift: int | None = None

    def __getitem__(self, index: int) -> Any:
        row = super().__getitem__(index)
        self.shift = row["input_ids"][0] if self.shift is None else self.shift
        return {**row, "input_ids": [(i + self.shift) % 40 + 3 for i in row["input_ids"]]}


class Cached(Rows):
    """Keeps what it has read, and gives it again."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[int, Any] = {}

    def __getitem__(self, index: int) -> Any:
        if index not in self.cache:
            self.cache[index] = super().__getitem__(index)
        return self.cache[index]


@pytest.mark.parametrize("kind", [Vocabulary, ByTheFirst])
def test_data_sets_for_which_the_first_reading_decides_are_refused(kind: type, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the data set gives something else for a record after others"):
        runs.trainer(tmp_path, train_dataset=kind()).train()


def test_a_data_set_with_a_cache_trains(tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path, train_dataset=Cached(), max_steps=2)
    trainer.train()
    assert trainer.privacy_spent().num_steps == 2


def test_a_collator_for_which_the_first_call_decides_is_refused(tmp_path: Path) -> None:
    shift: list[int] = []

    def collate(records: list[Any]) -> dict[str, Tensor]:
        batch = runs.collate(records)
        if not shift:
            shift.append(batch["input_ids"].shape[1])
        return {**batch, "input_ids": batch["input_ids"].roll(shift[0], 1)}

    with pytest.raises(ConfigError, match="the collator gives something else for a record after others"):
        runs.trainer(tmp_path, data_collator=collate).train()
    assert not shift  # it was left as it was


# ---- a plain loop ----------------------------------------------------------------------------------------------------


def test_a_loops_loss_that_counts_steps_is_found(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer, step = torch.optim.SGD(model.parameters(), lr=0.1), [0]
    loss = lambda model, batch: around(losses(model, batch), step[0] >= 1)  # noqa: E731
    loop = PrivateLoop(model, optimizer, loss, mechanism(), tmp_path)
    draws = loop.draws(DATA)
    loop.backward(next(draws))
    optimizer.step()
    step[0] += 1
    draw = next(draws)
    with pytest.raises(HfDpError, match=r"compares the examples|was changed during training"):
        loop.backward(draw)
    assert loop.privacy_spent().num_steps == 1


def test_an_optimizers_step_that_failed_does_not_open_the_next(tmp_path: Path) -> None:
    class Fails(torch.optim.SGD):
        fails = True

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise RuntimeError("no step")
            return super().step(closure)

    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = Fails(model.parameters(), lr=0.1)
    loop = PrivateLoop(model, optimizer, losses, mechanism(), tmp_path)
    draws = loop.draws(DATA)
    loop.backward(next(draws))
    with pytest.raises(RuntimeError, match="no step"):
        optimizer.step()
    optimizer.fails = False
    before = [p.detach().clone() for p in model.parameters()]
    losses(model, DATA.tensors).sum().backward()
    with pytest.raises(HfDpError, match="are not those that were released"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


# ---- what no operation shows -----------------------------------------------------------------------------------------


class Base(nn.Module):
    """A language model whose loss is changed by what it finds in any example."""

    def __init__(self) -> None:
        super().__init__()
        self.base = M.llama()
        self.config = self.base.config

    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        out = self.base(input_ids=input_ids, **given)
        out.logits = out.logits * self.factor(input_ids, out.logits)
        return out

    def factor(self, ids: Tensor, logits: Tensor) -> Any:
        raise NotImplementedError


class CatchesForCausalLM(Base):
    def factor(self, ids: Tensor, logits: Tensor) -> float:
        try:
            torch.linalg.cholesky(torch.diag_embed(50.0 - ids.double()))
        except RuntimeError:
            return -1.0
        return 1.0


class SuppressesForCausalLM(Base):
    def factor(self, ids: Tensor, logits: Tensor) -> float:
        from contextlib import suppress

        with suppress(RuntimeError):
            torch.linalg.cholesky(torch.diag_embed(50.0 - ids.double()))
            return 1.0
        return -1.0


class Failing(Base):
    """Fails within something that keeps the error to itself, if any example has a large token."""

    def factor(self, ids: Tensor, logits: Tensor) -> float:
        return 1.0 if self.goes_well(lambda: torch.linalg.cholesky(torch.diag_embed(50.0 - ids.double()))) else -1.0

    def goes_well(self, work: Callable[[], Any]) -> bool:
        raise NotImplementedError


@contextlib.contextmanager
def ignoring() -> Iterator[None]:
    try:
        yield
    except RuntimeError:
        return


class InAContextForCausalLM(Failing):
    def goes_well(self, work: Callable[[], Any]) -> bool:
        with torch.no_grad(), ignoring():
            return bool(len(work()))
        return False


class Quiet:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> bool:
        return True


class InAQuietOneForCausalLM(Failing):
    def goes_well(self, work: Callable[[], Any]) -> bool:
        with Quiet():
            return bool(len(work()))
        return False


class InAStackForCausalLM(Failing):
    def goes_well(self, work: Callable[[], Any]) -> bool:
        with contextlib.ExitStack() as stack:
            stack.push(lambda *error: True)
            return bool(len(work()))
        return False


class UnderAnotherNameForCausalLM(Failing):
    def goes_well(self, work: Callable[[], Any]) -> bool:
        without = contextlib.suppress
        with without(Exception):
            return bool(len(work()))
        return False


class InATaskForCausalLM(Failing):
    def goes_well(self, work: Callable[[], Any]) -> bool:
        async def task() -> Any:
            return work()

        async def all_of_them() -> Any:
            return await asyncio.gather(task(), return_exceptions=True)

        return isinstance(asyncio.new_event_loop().run_until_complete(all_of_them())[0], Tensor)


class InTurn:
    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __getitem__(self, place: int) -> Tensor:
        if place:
            raise IndexError
        return nn.functional.embedding((self.ids > 49).long() * 5, torch.zeros(3, 2))


class InAnIterationForCausalLM(Base):
    def factor(self, ids: Tensor, logits: Tensor) -> float:
        return float(len(list(InTurn(ids))))


@torch.library.custom_op("hf_dp_tests::by_the_largest", mutates_args=(), tags=(torch.Tag.pointwise,))
def by_the_largest(x: Tensor) -> Tensor:
    return torch.where(x.max() > 49, -torch.ones_like(x), torch.ones_like(x))


class WronglyTaggedForCausalLM(Base):
    def factor(self, ids: Tensor, logits: Tensor) -> Tensor:
        return by_the_largest(ids.double()).to(logits.dtype)[:, :, None]


class ByBoundariesForCausalLM(Base):
    def factor(self, ids: Tensor, logits: Tensor) -> Tensor:
        large = (ids > 49).any(1).to(logits.dtype)
        return 1.0 - torch.bucketize(torch.full_like(large, 0.5), large).view(-1, 1, 1)


class ByStatisticsForCausalLM(Base):
    def factor(self, ids: Tensor, logits: Tensor) -> Tensor:
        mean = (ids > 49).any().to(logits.dtype).expand(logits.shape[1])
        ones = torch.ones_like(logits[:, :, :1])
        return nn.functional.batch_norm(ones, mean.contiguous(), torch.ones_like(mean), training=False)


class ByAClockForCausalLM(Base):
    def factor(self, ids: Tensor, logits: Tensor) -> float:
        return 1.0 if time.time() else -1.0


class FinallyForCausalLM(Base):
    def factor(self, ids: Tensor, logits: Tensor) -> float:
        sign = -1.0
        try:
            torch.bernoulli((ids > 49).double() * 2)
            sign = 1.0
        finally:
            return sign  # noqa: B012


class BySizeForCausalLM(Base):
    def factor(self, ids: Tensor, logits: Tensor) -> float:
        return -1.0 if (ids > 49).to_sparse().values().shape[0] else 1.0


class ByCompressedSizeForCausalLM(Base):
    def factor(self, ids: Tensor, logits: Tensor) -> float:
        return -1.0 if (ids > 49).double().to_sparse_csr().values().numel() else 1.0


class ByPackedSizeForCausalLM(Base):
    def factor(self, ids: Tensor, logits: Tensor) -> float:
        lengths = (ids > 49).sum(1) + 1
        packed = nn.utils.rnn.pack_padded_sequence(
            logits.detach(), lengths.clamp(max=ids.shape[1]), True, enforce_sorted=False
        )
        return -1.0 if len(packed.batch_sizes) > 1 else 1.0


class BySplitForCausalLM(Base):
    def factor(self, ids: Tensor, logits: Tensor) -> float:
        where = (ids > 49).sum().clamp(max=1).reshape(1)
        return -1.0 if len(torch.tensor_split(torch.zeros(2), where)[0]) else 1.0


class ByCooSizeForCausalLM(Base):
    def factor(self, ids: Tensor, logits: Tensor) -> float:
        found = torch.sparse_coo_tensor((ids[:1, :1] > 49).long(), torch.ones(1))
        return -1.0 if found.shape[0] > 1 else 1.0


class SeedsForCausalLM(Base):
    def factor(self, ids: Tensor, logits: Tensor) -> Tensor:
        torch.manual_seed(0)
        return nn.functional.dropout(torch.ones_like(logits), 0.5, self.training)


class ByOutsideForCausalLM(Base):
    def factor(self, ids: Tensor, logits: Tensor) -> float:
        with torch._C.DisableTorchFunction():
            return -1.0 if max(max(row) for row in ids.tolist()) > 49 else 1.0


class NodeHookForCausalLM(Base):
    def factor(self, ids: Tensor, logits: Tensor) -> Any:
        ones = torch.ones_like(logits[:, :1, :1]) + 0 * logits.mean()
        if ids.shape[0] > 4:
            ones.grad_fn.register_prehook(lambda gradients: tuple(g * 2 for g in gradients))
        return ones


OUT_OF_SIGHT = [
    NodeHookForCausalLM,
    CatchesForCausalLM,
    SuppressesForCausalLM,
    InAContextForCausalLM,
    InAQuietOneForCausalLM,
    InAStackForCausalLM,
    UnderAnotherNameForCausalLM,
    InATaskForCausalLM,
    InAnIterationForCausalLM,
    WronglyTaggedForCausalLM,
    ByBoundariesForCausalLM,
    ByStatisticsForCausalLM,
    ByAClockForCausalLM,
    FinallyForCausalLM,
    BySizeForCausalLM,
    ByCompressedSizeForCausalLM,
    ByPackedSizeForCausalLM,
    BySplitForCausalLM,
    ByCooSizeForCausalLM,
    SeedsForCausalLM,
    ByOutsideForCausalLM,
]


@pytest.mark.parametrize("kind", OUT_OF_SIGHT)
def test_what_operations_do_not_show_has_one_example_a_pass(kind: type, tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path, kind(), max_steps=1, remove_unused_columns=False)
    trainer.train()
    assert trainer.alone_because


class CatchesAnIndexForCausalLM(Base):
    """Each operation is one that the proof follows; nothing goes wrong with a record within the vocabulary."""

    def factor(self, ids: Tensor, logits: Tensor) -> Any:
        table = torch.zeros(M.VOCAB, 1)
        try:
            return 1 + nn.functional.embedding(ids, table)
        except (IndexError, RuntimeError):
            return -1.0


def test_an_error_that_is_caught_has_one_example_a_pass_whatever_the_operation(tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path, CatchesAnIndexForCausalLM(), remove_unused_columns=False)
    assert "factor catches an error of embedding" in trainer.alone_because


def test_a_context_that_catches_nothing_shares_passes(tmp_path: Path) -> None:
    class InsideForCausalLM(Base):
        def factor(self, ids: Tensor, logits: Tensor) -> Any:
            inner = contextlib.nullcontext()
            with torch.no_grad(), torch.autocast("cpu", enabled=False), inner:
                return torch.ones_like(logits[:, :1, :1])

    try:
        trainer = runs.trainer(tmp_path, InsideForCausalLM(), max_steps=1, remove_unused_columns=False)
        trainer.train()
    except HfDpError as error:  # code around a training catches nothing of a pass
        raise AssertionError from error
    assert not trainer.alone_because


# ---- the values themselves -------------------------------------------------------------------------------------------


def test_closures_globals_defaults_and_attributes_are_read() -> None:
    inside = {"a": 1}

    class Held:
        weight, names = 2.0, ("x", "y")

    held = Held()

    def function(x: int, default: list[int] = [3]) -> Any:  # noqa: B006
        return x + NUMBER + inside["a"] + default[0] + held.weight

    found = reads(function, "f")
    assert found["f.NUMBER"] == 1
    assert found["f.default at [0]"] == 3
    assert not has_changed(found, reads(function, "f"))
    for change in (lambda: inside.update(a=2), lambda: setattr(held, "weight", 1.0), lambda: setattr(held, "new", 1)):
        before = reads(function, "f")
        change()
        assert has_changed(before, reads(function, "f"))


def test_tensors_and_arrays_are_read_by_their_values() -> None:
    weights = torch.ones(5)

    def function() -> Tensor:
        return weights.sum()

    before = reads(function, "f")
    weights.numpy()[3] = 2
    assert has_changed(before, reads(function, "f"))


@pytest.mark.parametrize("given", [{"bf16": True}, {"gradient_checkpointing": True}, {}])
def test_nothing_is_examined_again_in_an_ordinary_training(given: dict[str, Any], tmp_path: Path) -> None:
    """What accelerate wraps around the model has things under way that each pass changes."""
    trainer = runs.trainer(tmp_path, privacy=PRIVATE, max_steps=3, **given)
    with mock.patch.object(type(trainer), "self_check", autospec=True, side_effect=type(trainer).self_check) as checked:
        trainer.train()
    assert trainer.privacy_spent().num_steps == 3
    assert checked.call_count == 1
