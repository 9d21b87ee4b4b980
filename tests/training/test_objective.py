"""What is asked for is what is trained: the user's loss, the model's own or the host Trainer's.

Where many examples a pass are impossible, each has a pass of its own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor, nn
from transformers import Trainer

from hf_dp import ConfigError, DPTrainer, DPTrainerMixin, UnsupportedOptionError
from hf_dp.training.compared import Measured, same
from hf_dp.training.objective import OWN, YOURS
from tests.support import models as M
from tests.support import runs
from tests.support.exact import collate, exact, summed
from tests.support.marks import quick


def cross_entropy(model: nn.Module, one: dict[str, Tensor]) -> Tensor:
    inputs = {name: value for name, value in one.items() if name != "labels"}
    return F.cross_entropy(model(**inputs).logits, one["labels"], reduction="none")


# ---- models whose own loss is another than that of their logits ------------------------------------------------------


class ZLossForCausalLM(tf.LlamaForCausalLM):
    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(*args, labels=labels, **kwargs)
        if labels is not None:
            outputs.loss = outputs.loss + 1e-4 * outputs.logits.logsumexp(-1).square().mean()
        return outputs


class FocalForSequenceClassification(tf.BertForSequenceClassification):
    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(*args, labels=labels, **kwargs)
        if labels is not None:
            likely = F.cross_entropy(outputs.logits, labels, reduction="none")
            outputs.loss = ((1 - (-likely).exp()) ** 2 * likely).mean()
        return outputs


class UnshiftedLMHeadModel(tf.GPT2LMHeadModel):
    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        if labels is not None:
            outputs.loss = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
        return outputs


def adalora() -> nn.Module:
    settings = {"init_r": 3, "target_r": 2, "total_step": 9, "tinit": 2, "tfinal": 2, "target_modules": ["q_proj"]}
    return get_peft_model(M.llama(), peft.AdaLoraConfig(task_type="CAUSAL_LM", **settings))


SIZE = {"vocab_size": M.VOCAB, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BERT = {**M.TEXT, **M.DROPOUT_FREE, "num_labels": 5}
OTHER = {
    "a z-loss": (lambda: M.with_lora(lambda: ZLossForCausalLM(tf.LlamaConfig(**M.DECODER))), runs.text_rows),
    "a focal loss": (lambda: FocalForSequenceClassification(tf.BertConfig(**BERT)), runs.class_rows),
    "labels that are not shifted": (lambda: UnshiftedLMHeadModel(tf.GPT2Config(**SIZE, **QUIET)), runs.text_rows),
    "AdaLoRA's orthogonality": (adalora, runs.text_rows),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_loss_that_is_the_models_alone_is_trained_one_example_a_pass(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    build, rows = OTHER[name]
    trainer = exact(tmp_path, build(), rows(7))
    assert trainer.objective.kind == OWN
    assert trainer.alone_because
    said = " ".join(capsys.readouterr().out.split())
    assert "the model's own" in said
    assert "examples of a pass" in said


@pytest.mark.parametrize("build", quick((M.qwen3,), [M.llama, M.gpt2, M.qwen3]))
def test_a_loss_that_is_the_models_own_keeps_its_fast_form(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    trainer = exact(tmp_path, M.with_lora(build), runs.text_rows(7))
    assert trainer.objective.kind == "ForCausalLM"
    assert not trainer.alone_because


def test_a_loss_that_changed_since_construction_is_judged_anew(tmp_path: Path) -> None:
    class PenalisedForCausalLM(tf.LlamaForCausalLM):
        penalty = 0.0

        def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
            outputs = super().forward(*args, labels=labels, **kwargs)
            if labels is not None:
                outputs.loss = outputs.loss + self.penalty * outputs.logits.square().mean()
            return outputs

    torch.manual_seed(0)
    model = M.with_lora(lambda: PenalisedForCausalLM(tf.LlamaConfig(**M.DECODER)))
    trainer = runs.trainer(tmp_path, model, remove_unused_columns=False)
    assert trainer.objective.kind == "ForCausalLM"
    model.get_base_model().penalty = 0.5
    trainer.train()
    assert trainer.objective.kind == OWN


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        (Measured(1.0, {"w": torch.ones(2)}), Measured(1.0, {"w": torch.ones(2)}), True),
        (Measured(1.0, {"w": torch.ones(2)}), Measured(1.001, {"w": torch.ones(2)}), False),
        (Measured(1.0, {"w": torch.ones(2)}), Measured(1.0, {"w": torch.tensor([1.0, 1.01])}), False),
        (Measured(1.0, {}), Measured(1.0, {"w": torch.ones(2)}), False),
        (Measured(float("nan"), {}), Measured(float("nan"), {}), False),
        (None, Measured(1.0, {}), False),
    ],
)
def test_losses_are_the_same_up_to_rounding(mine: Any, theirs: Any, expected: bool) -> None:
    assert same(mine, theirs) is expected


# ---- classes without a known form ------------------------------------------------------------------------------------


def questions(count: int) -> Dataset:
    rows = runs.text_rows(count).remove_columns("labels").to_list()
    ends = [{"start_positions": i % 2, "end_positions": 1 + i % 2} for i in range(count)]
    return Dataset.from_list([{**row, **end} for row, end in zip(rows, ends, strict=True)])


def choices(count: int) -> list[dict[str, Any]]:
    torch.manual_seed(3)
    ids = [torch.randint(3, M.VOCAB, (2, 6)) for _ in range(count)]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": i % 2} for i, x in enumerate(ids)]


def ended(count: int) -> list[dict[str, Any]]:
    """Rows of a classifier that pools at the end-of-text mark, 2."""
    rows = runs.class_rows(count).to_list()
    return [{**row, "input_ids": [*row["input_ids"][:-1], 2]} for row in rows]


def bart_classifier() -> nn.Module:
    return tf.BartForSequenceClassification(tf.BartConfig(**{**M.bart().config.to_dict(), "num_labels": 5}))


def neighbours(count: int) -> list[dict[str, Any]]:
    return [{**row, "labels": i % 2} for i, row in enumerate(runs.text_rows(count))]


def penalised() -> nn.Module:
    """A model whose owner added a penalty to its loss by a hook."""
    model = M.with_lora(M.llama)

    def add(module: nn.Module, args: Any, outputs: Any) -> None:
        if outputs.loss is not None:
            outputs.loss = outputs.loss + 0.1 * sum(p.square().sum() for p in module.parameters() if p.requires_grad)

    model.register_forward_hook(add)
    return model


UNKNOWN = {
    "the next sentence": (lambda: tf.BertForNextSentencePrediction(tf.BertConfig(**BERT)), neighbours),
    "a loss with a hook": (penalised, runs.text_rows),
    "question answering": (lambda: tf.BertForQuestionAnswering(tf.BertConfig(**{**BERT, "num_labels": 2})), questions),
    "multiple choice": (lambda: tf.BertForMultipleChoice(tf.BertConfig(**BERT)), choices),
    "a classifying encoder-decoder": (bart_classifier, ended),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_class_without_a_known_loss_trains_its_own(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, rows = UNKNOWN[name]
    assert exact(tmp_path, build(), rows(5)).objective.kind == OWN


class Answers(DPTrainer):
    def example_losses(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        inputs = dict(inputs)
        start, end = inputs.pop("start_positions"), inputs.pop("end_positions")
        outputs = model(**inputs)
        return F.cross_entropy(outputs.start_logits, start, reduction="none") + F.cross_entropy(
            outputs.end_logits, end, reduction="none"
        )


def of_answers(model: nn.Module, one: dict[str, Tensor]) -> Tensor:
    return Answers.example_losses(None, model, one)  # type: ignore[arg-type]


def of_both(outputs: Any, labels: Any) -> Tensor:
    losses = [
        F.cross_entropy(x, y, reduction="none")
        for x, y in zip((outputs.start_logits, outputs.end_logits), labels, strict=True)
    ]
    return losses[0] + losses[1]


def test_a_task_without_labels_needs_an_example_losses_and_no_more(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = UNKNOWN["question answering"][0]()
    trainer = exact(tmp_path, model, questions(5), of_answers, trainer_class=Answers, size=1)
    assert trainer.objective.kind == YOURS


def test_label_names_give_their_columns_to_compute_loss_func_in_training_and_evaluation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, rows = UNKNOWN["question answering"][0](), questions(5)
    names = {"label_names": ["start_positions", "end_positions"], "size": 1, "per_device_eval_batch_size": 1}
    trainer = exact(tmp_path, model, rows, of_answers, compute_loss_func=of_both, eval_dataset=rows, **names)
    with torch.no_grad():
        expected = sum(float(of_answers(model.eval(), collate([row]))) for row in rows) / 5
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_a_batch_without_labels_says_what_to_do(tmp_path: Path) -> None:
    rows = questions(5)
    with pytest.raises(ConfigError, match=r"label_names=.*override DPTrainer.example_losses"):
        summed(tmp_path, UNKNOWN["question answering"][0](), rows, compute_loss_func=of_both, label_names=["answers"])


# ---- losses that are given -------------------------------------------------------------------------------------------


def squared(outputs: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits, labels, reduction="none").square()


@pytest.mark.parametrize("extra", [{}, {"prediction_loss_only": True}, {"per_device_eval_batch_size": 2}])
def test_evaluation_reports_the_mean_of_the_users_losses(extra: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, rows = M.bert(), runs.class_rows(8)
    trainer, _ = summed(tmp_path, model, rows, compute_loss_func=squared, eval_dataset=rows, **extra)
    model.eval()
    with torch.no_grad():
        expected = sum(float(cross_entropy(model, collate([row])) ** 2) for row in rows) / len(rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


WEIGHTS = [1.0, 10.0, 0.0, 0.5, 2.0]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_each_loss_takes_the_weight_of_its_class(size: int, tmp_path: Path) -> None:
    def weighted(model: nn.Module, one: dict[str, Tensor]) -> Tensor:
        return cross_entropy(model, one) * torch.tensor(WEIGHTS)[one["labels"]]

    torch.manual_seed(0)
    exact(tmp_path, M.bert(), runs.class_rows(8), weighted, class_weights=WEIGHTS, size=size)


@pytest.mark.parametrize(
    ("build", "rows", "weights", "message"),
    [
        (lambda: M.with_lora(M.llama), runs.text_rows, WEIGHTS, "class_weights need one label"),
        (M.bert, runs.class_rows, [1.0, float("nan")], "class_weights must be finite"),
        (M.bert, runs.class_rows, [], "class_weights must be finite"),
        (M.bert, runs.class_rows, [1.0, -1.0], "class_weights must be finite"),
    ],
)
def test_weights_that_mean_nothing_are_refused(
    build: Any, rows: Any, weights: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        summed(tmp_path, build(), rows(7), class_weights=weights)


def test_smoothing_does_not_go_with_a_models_own_loss(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"label_smoothing_factor=0.1 cannot be put into"):
        summed(tmp_path, OTHER["a focal loss"][0](), runs.class_rows(7), label_smoothing_factor=0.1)


# ---- methods that would never be called ------------------------------------------------------------------------------


def overriding(method: str, *, host: bool) -> type:
    def never(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("never called")

    if host:
        return type("Mine", (DPTrainerMixin, type("Theirs", (Trainer,), {method: never})), {})
    return type("Mine", (DPTrainer,), {method: never})


@pytest.mark.parametrize(
    ("method", "host"),
    [
        ("compute_loss", True),
        ("compute_loss", False),
        ("get_train_dataloader", True),
        ("get_train_dataloader", False),
        ("_get_dataloader", True),
        ("_get_train_sampler", True),
        ("_get_train_sampler", False),
        ("get_batch_samples", True),
        ("training_step", True),
    ],
)
def test_a_method_that_would_be_ignored_is_refused_at_construction(method: str, host: bool, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match=rf"\.{method}: it would never be called"):
        summed(tmp_path, M.bert(), runs.class_rows(7), trainer_class=overriding(method, host=host))


def test_a_method_replaced_on_the_object_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path, M.bert(), train_dataset=runs.class_rows())
    for method in ("compute_loss", "get_train_dataloader", "_get_train_sampler", "get_batch_samples"):
        setattr(trainer, method, None)
        with pytest.raises(UnsupportedOptionError, match=f": {method} was replaced: "):
            trainer.train()
        delattr(trainer, method)
    trainer.compute_loss, trainer.example_losses = None, cross_entropy
    trainer.train()


def test_a_compute_loss_stays_for_evaluation_beside_an_example_losses(tmp_path: Path) -> None:
    class Mine(overriding("compute_loss", host=True)):  # type: ignore[misc]
        def example_losses(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
            return cross_entropy(model, inputs) * 2

    torch.manual_seed(0)
    trainer = exact(
        tmp_path, M.bert(), runs.class_rows(7), lambda m, one: 2 * cross_entropy(m, one), trainer_class=Mine
    )
    with pytest.raises(AssertionError, match="never called"):
        trainer.evaluate(runs.class_rows(3))


# ---- encoder-decoders that have no method to shift labels ------------------------------------------------------------


def pairs(count: int) -> list[dict[str, Any]]:
    torch.manual_seed(5)
    rows = runs.text_rows(count).to_list()
    return [{**row, "labels": row["input_ids"][::-1][: 2 + i % 4]} for i, row in enumerate(rows)]


def m2m100() -> nn.Module:
    return tf.M2M100ForConditionalGeneration(tf.M2M100Config(**{**M.bart().config.to_dict(), "encoder_layerdrop": 0.0}))


def blenderbot() -> nn.Module:
    return tf.BlenderbotForConditionalGeneration(tf.BlenderbotConfig(**M.bart().config.to_dict()))


def plbart() -> nn.Module:
    config = {**M.bart().config.to_dict(), "decoder_layerdrop": 0.0}
    return tf.BlenderbotSmallForConditionalGeneration(tf.BlenderbotSmallConfig(**config))


@pytest.mark.parametrize("build", quick((m2m100,), [m2m100, blenderbot, plbart, M.t5, M.bart]))
def test_an_encoder_decoder_reads_its_labels_shifted(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = M.with_lora(build, target_modules=["q", "v"] if build is M.t5 else ["q_proj", "v_proj"], task_type=None)
    assert exact(tmp_path, model, pairs(6)).objective.kind == "ForConditionalGeneration"


# ---- batches whose tensors don't all lead with the examples ----------------------------------------------------------


class Pieces(nn.Module):
    """Reads a list of token rows, one an example; `forward` differs from kind to kind."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(M.VOCAB, 8), nn.Linear(8, 3)

    def forward(self, pieces: list[Tensor], labels: Tensor) -> dict[str, Tensor]:
        logits = self.out(torch.stack([self.table(piece).mean(0) for piece in pieces]))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Nodes(Pieces):
    def forward(self, nodes: Tensor, owner: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        logits = self.out(torch.zeros(len(labels), 8).index_add(0, owner, self.table(nodes).tanh()))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class TimeFirst(Pieces):
    def forward(self, steps: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        logits = self.out(self.table(steps).mean(0))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def labels_of(features: list[dict[str, Any]]) -> Tensor:
    return torch.tensor([f["labels"] for f in features])


def in_a_list(features: list[dict[str, Any]]) -> dict[str, Any]:
    return {"pieces": [torch.tensor(f["input_ids"]) for f in features], "labels": labels_of(features)}


def in_one_row(features: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [torch.tensor(f["input_ids"]) for f in features]
    owner = torch.cat([torch.full((len(row),), i) for i, row in enumerate(rows)])
    return {"nodes": torch.cat(rows), "owner": owner, "labels": labels_of(features)}


def in_time(features: list[dict[str, Any]]) -> dict[str, Any]:
    steps = nn.utils.rnn.pad_sequence([torch.tensor(f["input_ids"]) for f in features])
    return {"steps": steps, "labels": labels_of(features)}


@pytest.mark.parametrize(("kind", "collator"), [(Pieces, in_a_list), (Nodes, in_one_row), (TimeFirst, in_time)])
def test_rows_that_are_not_the_examples_belong_to_their_records(kind: Any, collator: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = [{"input_ids": row["input_ids"], "labels": i % 3} for i, row in enumerate(runs.text_rows(6))]
    exact(tmp_path, kind(), rows, lambda model, one: model(**one)["loss"], data_collator=collator)


# ---- one example a pass where an operation has no rule ---------------------------------------------------------------


def adapted(config: Any) -> nn.Module:
    torch.manual_seed(0)
    return M.stirred(get_peft_model(M.llama(), config))


class WithTheBatchsMean(nn.Module):
    """A layer that reads a little of the other examples' rows, too."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.layer(x + 0.1 * x.mean((0, 1)), *args, **kwargs)


def test_what_changes_after_construction_is_looked_at_again_before_the_first_step(tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path, M.with_lora(M.llama))
    assert trainer.alone_because == ""
    step = trainer.private_step
    trainer.inventory()
    assert trainer.private_step is step  # nothing changed: nothing is found out again
    layers = trainer.model.get_base_model().model.layers
    layers[0] = WithTheBatchsMean(layers[0])
    trainer.train()
    assert "mixed by mean" in trainer.alone_because
    trainer.args.label_smoothing_factor = 0.1
    trainer.inventory()
    assert trainer.private_step is not step


QV: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
NO_RULE = {
    "boft": lambda: adapted(peft.BOFTConfig(**QV, boft_block_size=4)),
    "loha": lambda: adapted(peft.LoHaConfig(**QV, r=2)),
    "vblora": lambda: adapted(peft.VBLoRAConfig(**QV, r=2, num_vectors=8, vector_length=4, topk=2)),
}


@pytest.mark.parametrize("name", quick(("boft",), NO_RULE))
def test_what_has_no_rule_is_trained_one_example_a_pass(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = exact(tmp_path, NO_RULE[name](), runs.text_rows(5))
    assert trainer.alone_because
    assert {row.rule for row in trainer.inventory()} == {"autograd's, one example a pass"}
    assert "slower, and exact" in " ".join(capsys.readouterr().out.split())


def test_lora_on_a_parameter_that_its_layer_writes_back_is_exact(tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_parameters=["mlp.down_proj.weight"])
    exact(tmp_path, adapted(config), runs.text_rows(5))


@pytest.mark.parametrize("name", ["boft", "loha"])
def test_at_one_example_a_pass_nothing_is_asked_of_rules(name: str, tmp_path: Path) -> None:
    trainer = exact(tmp_path, NO_RULE[name](), runs.text_rows(5), size=1)
    assert trainer.alone_because == "per_device_train_batch_size=1"


def test_compiled_passes_and_one_example_a_pass_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match="one example a pass"):
        summed(tmp_path, NO_RULE["boft"](), runs.text_rows(5), torch_compile=True)


class Bare(nn.Module):
    """A module without a config, which returns a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(M.VOCAB, 8), nn.Linear(8, 2)

    def forward(self, input_ids: Tensor, labels: Any = None) -> Any:
        logits = self.out(self.table(input_ids).mean(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}


def test_a_module_without_a_config_trains_the_loss_that_it_returns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = [{"input_ids": row["input_ids"], "labels": i % 2} for i, row in enumerate(runs.text_rows(6))]
    assert exact(tmp_path, Bare(), rows, lambda m, one: m(**one)["loss"]).objective.kind == OWN


def shared_memory() -> nn.Module:
    model = M.llama()
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach())
    return model


# ---- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "rows", "message"),
    [
        (
            lambda: adapted(peft.OSFConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])),
            lambda: runs.text_rows(6),
            r"of type OSF: it projects gradients",
        ),
        (lambda: adapted(peft.PveraConfig(**QV, r=2)), lambda: runs.text_rows(6), r"of type PVERA: it draws"),
        (shared_memory, lambda: runs.text_rows(6), r"model.embed_tokens.weight and lm_head.weight are two"),
        (
            lambda: get_peft_model(
                M.llama(),
                peft.CPTConfig(
                    task_type="CAUSAL_LM", cpt_token_ids=[4, 5], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]
                ),
            ),
            lambda: runs.text_rows(6),
            r"of type CPT: it scales gradients",
        ),
    ],
)
def test_what_cannot_be_says_why(model: Any, rows: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match=message):
        summed(tmp_path, model(), rows())


@pytest.mark.parametrize(
    "model",
    [
        lambda: adapted(peft.PolyConfig(**QV, r=2, n_tasks=2, n_skills=2)),
        lambda: get_peft_model(
            M.llama(),
            peft.MultitaskPromptTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=2, num_tasks=2, prompt_tuning_init="RANDOM"
            ),
        ),
        lambda: Demanding(tf.LlamaConfig(**M.DECODER)),
    ],
)
def test_a_model_that_cannot_take_made_up_records_asks_for_public_ones(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"check_records=.*remove_unused_columns=False"):
        summed(tmp_path, model(), runs.text_rows(6))


class Demanding(tf.LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("expected a picture")
