"""A loss that compares examples is refused; one that padding changes takes one example a pass."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

from hf_dp import ConfigError, DPTrainer, PrivateLoop
from hf_dp.training.objective import YOURS
from hf_dp.training.passes import COUPLED
from tests.support import models as M
from tests.support import runs
from tests.support.marks import quick
from tests.training.test_loop import DATA, mechanism
from tests.training.test_objective import exact


def info_nce(embedded: Tensor) -> Tensor:
    similar = F.normalize(embedded, dim=1) @ F.normalize(embedded.roll(1, 1), dim=1).T
    return F.cross_entropy(5 * similar, torch.arange(len(similar)), reduction="none")


def each_pair_by_a_sigmoid(embedded: Tensor) -> Tensor:
    similar, same = embedded @ embedded.roll(1, 1).T, 2 * torch.eye(len(embedded)) - 1
    return -F.logsigmoid(similar * same).sum(1)


def hardest_other(embedded: Tensor) -> Tensor:
    similar = embedded @ embedded.T
    others = similar[~torch.eye(len(embedded), dtype=torch.bool)].view(len(embedded), -1)
    return (2 + others.max(1).values).relu()


def without_the_largest(embedded: Tensor) -> Tensor:
    losses = embedded.square().sum(1)
    return losses * (losses.argsort().argsort() < (len(losses) + 1) // 2)


def of(loss: Callable[[Tensor], Tensor]) -> type[DPTrainer]:
    class Mine(DPTrainer):
        def example_losses(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
            return loss(model(**{n: v for n, v in inputs.items() if n != "labels"}).logits)

    return Mine


def mine(folder: Path, model: nn.Module, trainer_class: type[DPTrainer]) -> DPTrainer:
    args = runs.arguments(folder)
    privacy = runs.PrivacyConfig(**runs.NOISELESS, expected_batch_size=24, clip_norm=0.1)
    return trainer_class(model, args, privacy=privacy, train_dataset=runs.class_rows(), data_collator=runs.collate)


@pytest.mark.parametrize("loss", [info_nce, each_pair_by_a_sigmoid, hardest_other, without_the_largest])
def test_a_loss_that_compares_examples_is_refused(loss: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match=r"compares the examples of a batch.*into one record, and override"):
        mine(tmp_path, M.bert(), of(loss))


def test_a_contrastive_loss_of_the_model_is_refused(tmp_path: Path) -> None:
    class PairsForTexts(tf.BertForSequenceClassification):
        def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            return {"loss": info_nce(outputs.logits).mean(), "logits": outputs.logits}

    model = PairsForTexts(M.bert().config)
    with pytest.raises(ConfigError, match="compares the examples of a batch"):
        runs.trainer(tmp_path, model, train_dataset=runs.class_rows(), remove_unused_columns=False)


def test_a_loop_refuses_such_a_loss_too(tmp_path: Path) -> None:
    net = nn.Linear(4, 3)
    compared = lambda model, batch: info_nce(model(batch[0]))  # noqa: E731
    with pytest.raises(ConfigError, match="compares the examples of a batch"):
        next(PrivateLoop(net, torch.optim.SGD(net.parameters()), compared, mechanism(), tmp_path).draws(DATA))


@pytest.mark.parametrize("loss", [lambda x: x.square().sum(1), lambda x: x[:, 0] - x.logsumexp(1)])
def test_a_loss_of_each_example_is_not(loss: Any, tmp_path: Path) -> None:
    assert not mine(tmp_path, M.bert(), of(loss)).alone_because


def answers(count: int) -> list[dict[str, Any]]:
    rows = [{n: v for n, v in row.items() if n != "labels"} for row in runs.text_rows(count)]
    return [{**row, "start_positions": i % 3, "end_positions": 2} for i, row in enumerate(rows)]


def spans(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    inputs = dict(inputs)
    start, end = inputs.pop("start_positions"), inputs.pop("end_positions")
    found = model(**inputs)
    return F.cross_entropy(found.start_logits, start, reduction="none") + F.cross_entropy(
        found.end_logits, end, reduction="none"
    )


class Answers(DPTrainer):
    def example_losses(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return spans(model, inputs)


BERT = {**M.TEXT, **M.DROPOUT_FREE, "num_labels": 2}
ANSWERERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: tf.BertForQuestionAnswering(tf.BertConfig(**BERT)),
    "electra": lambda: tf.ElectraForQuestionAnswering(tf.ElectraConfig(**BERT, embedding_size=8)),
    "distilbert": lambda: tf.DistilBertForQuestionAnswering(M.distilbert(num_labels=2, qa_dropout=0.0).config),
}


@pytest.mark.parametrize("name", quick(("bert",), ANSWERERS))
def test_answers_among_padded_positions_take_one_example_a_pass(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    trainer = exact(tmp_path, ANSWERERS[name](), answers(7), spans, trainer_class=Answers)
    assert trainer.objective.kind == YOURS
    assert trainer.alone_because == COUPLED


def test_absolute_positions_padded_on_the_left_take_one_example_a_pass(tmp_path: Path) -> None:
    def left(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: value.flip(1) for name, value in runs.collate([flipped(f) for f in features]).items()}

    def flipped(feature: dict[str, Any]) -> dict[str, Any]:
        return {name: list(reversed(value)) for name, value in feature.items()}

    assert runs.trainer(tmp_path / "gpt2", M.with_lora(M.gpt2), data_collator=left).alone_because == COUPLED
    assert not runs.trainer(tmp_path / "llama", M.with_lora(M.llama), data_collator=left).alone_because
