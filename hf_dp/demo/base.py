"""Public records -> the model that the demo starts from: a byte-level BPE tokenizer and a small Llama, saved in one
folder.

Both are trained on the public half only, so nothing in them depends on a private record.
"""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

from hf_dp.recipe import DataSection, PadRight, completions, data_files

PAD, END = "<pad>", "<end>"
VOCABULARY = 1024  # digits stay single, so that a number is as long as it looks
MAX_TOKENS = 128


def train_base(data: DataSection, folder: Path, *, num_steps: int) -> None:
    """Plain training on the public records of `data.train`, with the templates of `data`; saves model and tokenizer in
    `folder`.
    """
    records = data_files.load(data, "train")
    assert records is not None  # the demo has just written them
    tokenizer = train_tokenizer([text for record in records for text in record.values()])
    set_seed(0)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=num_steps,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        warmup_steps=min(10, num_steps // 4),
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,
    )
    trainer = Trainer(
        model=small_llama(tokenizer),
        args=args,
        train_dataset=completions(records, data, tokenizer, MAX_TOKENS).rows,
        data_collator=PadRight(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer for public texts; other text is encoded as bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, model_max_length=MAX_TOKENS, padding_side="right"
    )


def small_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of about 0.5 million parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=MAX_TOKENS,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
