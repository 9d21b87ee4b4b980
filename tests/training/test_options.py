"""Every argument of Trainer has a verdict, and what the arguments alone do not show is looked at too."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import ParallelismConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    Seq2SeqTrainingArguments,
    Trainer,
)

from hf_dp import DPTrainerMixin, PrivacyConfig
from hf_dp.errors import UnsupportedOptionError
from hf_dp.training.options import ENVIRONMENT, HANDLED, REFUSED, SAFE, check_options
from tests.support import models as M
from tests.support import runs

FIELDS = {f.name for f in dataclasses.fields(Seq2SeqTrainingArguments)}
ELSEWHERE = {
    *("packing", "padding_free"),  # of trainers built on this one
    *("group_by_length", "logging_dir", "warmup_ratio"),  # of 5.0, and gone since
    *("activation_checkpointing", "activation_checkpointing_kwargs", "dataloader_in_order", "train_sampling_strategy"),
    *(
        "dataloader_multiprocessing_context",
        "ddp_static_graph",
        "trackio_bucket_id",
        "trackio_static_space_id",
    ),  # since 5.0
}


def test_every_argument_has_a_verdict() -> None:
    """A new transformers brings new arguments: decide which table each belongs in, and why, before it is let in."""
    assert FIELDS - set(REFUSED) - set(HANDLED) - SAFE == set()


def test_no_argument_has_two_verdicts_and_none_is_made_up() -> None:
    for one, other in ((set(REFUSED), set(HANDLED)), (set(REFUSED), SAFE), (set(HANDLED), SAFE)):
        assert one & other == set()
    assert (set(REFUSED) | set(HANDLED) | SAFE) - FIELDS <= ELSEWHERE
    assert all(reason for reason in HANDLED.values())
    assert all(remedy for _, remedy in REFUSED.values())


def test_the_defaults_are_let_through(tmp_path: Path) -> None:
    check_options(Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True, report_to="none"), public_eval=False)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"debug": "underflow_overflow"}, "prints activations"),
        ({"skip_memory_metrics": False}, "peak memory"),
        (
            {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}},
            r"gradient_accumulation_kwargs\['num_steps'\]: the logical batch",
        ),
    ],
)
def test_side_doors_are_refused(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match=named):
        check_options(runs.arguments(tmp_path, **settings), public_eval=False)


def test_a_token_that_would_be_saved_and_pushed_is_refused_and_not_shown(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match="hub_token: it would be saved") as refused:
        check_options(runs.arguments(tmp_path, hub_token="hf_secret_of_mine"), public_eval=False)
    assert "hf_secret_of_mine" not in str(refused.value)


@pytest.mark.parametrize("name", ["sortish_sampler", "tf32", "packing", "padding_free"])
def test_what_is_set_on_the_object_is_seen(name: str, tmp_path: Path) -> None:
    args = runs.arguments(tmp_path)
    vars(args)[name] = True  # transformers itself refuses some of them without a GPU
    with pytest.raises(UnsupportedOptionError, match=f"{name}=True: "):
        check_options(args, public_eval=False)


@pytest.mark.parametrize(
    ("name", "value", "way_out"),
    [
        (
            "deepspeed",
            "ds.json",
            "deepspeed=ds.json: it reduces and steps inside backward; use DDP .*, or load the base sharded",
        ),
        (
            "parallelism_config",
            object(),
            "parallelism_config=.*tensor, context and sequence parallelism.*; use DDP, or shards with or without repl",
        ),
        ("_n_gpu", 2, "DataParallel over 2 GPUs: start one process a GPU"),
    ],
)
def test_other_ways_to_distribute_are_refused_with_a_way_out(
    name: str, value: Any, way_out: str, tmp_path: Path
) -> None:
    args = runs.arguments(tmp_path)
    vars(args)[name] = value  # the libraries or machines that they need are not all here
    with pytest.raises(UnsupportedOptionError, match=way_out):
        check_options(args, public_eval=False)


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_what_the_launcher_says_by_the_environment_is_seen(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = runs.arguments(tmp_path)
    harmless = {"ACCELERATE_MIXED_PRECISION": "bf16"} | {f"PARALLELISM_CONFIG_{n}P_SIZE": "1" for n in "TCS"}
    monkeypatch.setenv(name, harmless.get(name, "false"))
    check_options(args, public_eval=False)
    unsafe = {"ACCELERATE_MIXED_PRECISION": "fp16"} | {f"PARALLELISM_CONFIG_{n}P_SIZE": "2" for n in "TCS"}
    monkeypatch.setenv(name, unsafe.get(name, "true"))
    with pytest.raises(UnsupportedOptionError, match=f"{name}=.*accelerate's launcher"):
        check_options(args, public_eval=False)


def test_collators_that_join_records_in_one_row_are_refused_and_the_remedy_pads(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl.trainer.sft_trainer")

    class Own(DataCollatorWithFlattening):
        """A subclass."""

    args, joining = runs.arguments(tmp_path), trl.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    for collator, name in (
        (DataCollatorWithFlattening(), "DataCollatorWithFlattening"),
        (Own(), "Own"),
        (joining, r"DataCollatorForLanguageModeling\(padding_free=True\)"),
    ):
        with pytest.raises(UnsupportedOptionError, match=f"{name} joins the records of a batch in one row"):
            check_options(args, public_eval=False, data_collator=collator)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "pad": 1})), pad_token="pad")
    padding = DataCollatorForSeq2Seq(tokenizer)
    check_options(args, public_eval=False, data_collator=padding)
    rows = [{"input_ids": [0] * n, "attention_mask": [1] * n, "labels": [0] * n} for n in (2, 3)]
    assert padding(rows)["labels"].tolist() == [[0, 0, -100], [0, 0, 0]]


@pytest.mark.parametrize(
    ("fsdp", "environment", "model", "way_out"),
    [
        (True, {}, "adapter", None),
        (True, {"version": 1}, "adapter", r"fsdp_config: FSDP of version 1 .*set \{'version': 2\}, or use DDP"),
        (True, {"xla": True}, "adapter", "fsdp_config: XLA"),
        (True, {}, "whole", None),
        (None, {}, "adapter", "ACCELERATE_USE_FSDP=true .*set fsdp_version: 2"),
        (None, {"FSDP_VERSION": "2"}, "adapter", None),
        (None, {"FSDP_VERSION": "2"}, "whole", None),
    ],
)
def test_accelerates_fsdp_is_taken_in_its_second_version(
    fsdp: bool | None, environment: dict[str, Any], model: str, way_out: str | None, tmp_path: Path, monkeypatch: Any
) -> None:
    args = runs.arguments(tmp_path)
    monkeypatch.setattr(type(args), "world_size", 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    if fsdp:
        vars(args).update(fsdp=True, fsdp_config=environment)
    else:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
    given = M.with_lora(M.llama) if model == "adapter" else M.llama()
    if way_out is None:
        return check_options(args, public_eval=False, model=given)
    with pytest.raises(UnsupportedOptionError, match=way_out):
        check_options(args, public_eval=False, model=given)


def test_replicas_of_shards_are_let_through_and_what_splits_an_example_is_not(tmp_path: Path) -> None:
    args = runs.arguments(tmp_path)
    args.parallelism_config = ParallelismConfig(dp_replicate_size=2, dp_shard_size=4)
    check_options(args, public_eval=False)
    for split in ("tp_size", "cp_size", "sp_size"):
        args.parallelism_config = ParallelismConfig(dp_shard_size=4, **{split: 2})
        with pytest.raises(UnsupportedOptionError, match=r"(?s)parallelism_config=.*split one example over"):
            check_options(args, public_eval=False)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_matrix_products_of_fewer_bits_are_refused(precision: str, tmp_path: Path) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with pytest.raises(UnsupportedOptionError, match=f"'{precision}'.*set 'highest'"):
            check_options(runs.arguments(tmp_path), public_eval=False)
    finally:
        torch.set_float32_matmul_precision(before)


class TakesAnything(Trainer):
    """A host as people write them: its own keyword, and the rest handed on."""

    def __init__(self, *args, flavour="plain", **kwargs):
        super().__init__(*args, **kwargs)
        self.flavour = flavour


class Private(DPTrainerMixin, TakesAnything):
    pass


@pytest.mark.parametrize("by_name", [False, True])
def test_a_host_that_hands_its_arguments_on_is_planned_and_checked_as_any(tmp_path, by_name):
    model, privacy = M.with_lora(M.llama), PrivacyConfig(noise_multiplier=1.0, expected_batch_size=4)

    def build(**options):
        args = runs.arguments(tmp_path, **options)
        given = {"train_dataset": runs.text_rows(), "privacy": privacy, "flavour": "sweet"}
        if by_name:
            return Private(model=model, args=args, data_collator=runs.collate, **given)
        return Private(model, args, runs.collate, **given)

    trainer = build()
    assert (trainer.mechanism.num_examples, trainer.flavour) == (24, "sweet")
    with pytest.raises(UnsupportedOptionError, match="gradient_accumulation_steps"):
        build(gradient_accumulation_steps=2)
