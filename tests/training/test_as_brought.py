"""What users of Trainer bring: collators that don't pad or shift labels, models without anything to train, weights."""

from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from datasets import Dataset
from tokenizers import Tokenizer, models

from hf_dp import ConfigError
from tests.support import models as M
from tests.support import runs


def test_a_collator_that_does_not_pad_shares_passes_between_records_of_one_length(tmp_path: Path) -> None:
    rows = [{"input_ids": [5 + (i + k) % 60 for k in range(16)]} for i in range(24)]
    records = Dataset.from_list([{**row, "labels": row["input_ids"]} for row in rows])
    given = {"train_dataset": records, "data_collator": tf.default_data_collator}
    trainer = runs.trainer(tmp_path / "a", M.llama(), **given)
    trainer.train()
    assert not trainer.alone_because
    given["train_dataset"] = Dataset.from_list([*[*records][:-1], {"input_ids": [5, 6], "labels": [5, 6]}])
    other = runs.trainer(tmp_path / "b", M.llama(), **given)
    other.train()  # a micro-batch with the short one is taken apart
    assert other.privacy_spent().num_steps == 1


def test_a_collator_that_shifts_the_labels_of_t5_itself_is_told_to_leave_it(tmp_path: Path) -> None:
    words = {"?": 0, "<pad>": 1, **{f"w{i}": i for i in range(2, 60)}}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?", pad_token="<pad>")
    records = [{"input_ids": [*range(5, 9 + i % 7)], "labels": [*range(6, 9 + i % 5)]} for i in range(24)]
    for model_of, alone in ((lambda m: m, True), (lambda m: None, False)):
        model = M.t5()
        given = {"data_collator": tf.DataCollatorForSeq2Seq(tokenizer, model=model_of(model)), "train_dataset": records}
        trainer = runs.trainer(tmp_path / str(alone), model, **given)
        assert ("leave out its model=" in trainer.alone_because) == alone == bool(trainer.alone_because)


def test_a_model_of_which_nothing_is_trained_is_refused(tmp_path: Path) -> None:
    model = M.llama()
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing would be trained: load an adapter with"):
        runs.trainer(tmp_path, model)


@pytest.mark.parametrize(("weights", "match"), [([1.0, 2.0], "expected 5 numbers"), ([0.0] * 5, "not all 0")])
def test_class_weights_of_another_number_or_of_nothing_are_refused(weights: Any, match: str, tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": i % 3} for i in range(24)]
    with pytest.raises(ConfigError, match=match):
        runs.trainer(tmp_path, M.bert(), train_dataset=rows, class_weights=weights)
