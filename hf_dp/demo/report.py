"""The measurements of the demo -> a table, three examples of generated text, and a closing statement."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from hf_dp.demo.secrets import Exposure
from hf_dp.step import PrivacySpent


class Result(NamedTuple):
    """Held-out losses in nats per character of the target, and what the private run spent."""

    base: float
    private: float
    non_private: float
    spent: PrivacySpent
    num_steps: int
    exposure: Exposure
    seconds: float


def table(result: Result) -> Table:
    """One row a model: held-out loss, share of the way from base to non-private model, epsilon and delta."""
    gap = result.base - result.non_private
    rows = [
        ("base", result.base, "0", "0"),
        ("private", result.private, f"{result.spent.epsilon:.4g}", f"{result.spent.delta:g}"),
        ("non-private", result.non_private, "infinite", ""),
    ]
    made = Table(title=f"Held-out loss in nats a character, after {result.num_steps} steps", title_justify="left")
    made.add_column("model")
    for column in ("loss", "share of the gain", "epsilon", "delta"):
        made.add_column(column, justify="right")
    for name, loss, epsilon, delta in rows:
        share = f"{(result.base - loss) / gap:.0%}" if gap > 0 else "-"
        made.add_row(name, f"{loss:.3f}", share, epsilon, delta)
    return made


def generate(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The model's continuation of the prompt, by greedy decoding."""
    given = tokenizer(prompt, return_tensors="pt").to(model.device)
    model.eval()
    with torch.no_grad():
        ids = model.generate(
            input_ids=given["input_ids"],
            attention_mask=given["attention_mask"],
            max_new_tokens=90,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    return str(tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def show_examples(console: Console, prompt: str, texts: dict[str, str]) -> None:
    """What each model writes for the same prompt."""
    made = Table(title=f"What they write for {prompt.strip()!r} (likeliest continuation)", title_justify="left")
    made.add_column("model")
    made.add_column("text", overflow="fold")
    for name, text in texts.items():
        made.add_row(name, text)
    console.print(made)


def statement(result: Result, folder: Path, num_private: int) -> str:
    """What happened, what follows from it, and where the files are."""
    spent = result.spent
    card, record = folder / "private" / "README.md", folder / "private" / "privacy.json"
    return f"""\
The demo is done, in {result.seconds:.0f} s. A small Llama was trained on made-up public records, then fine-tuned with
LoRA on {num_private:,} made-up private ones, twice, with the same settings and {result.num_steps} optimizer steps: by
Trainer and by DPTrainer. The private run spent epsilon {spent.epsilon:.4g} at delta {spent.delta:g}, over
{spent.num_steps} noisy steps; nothing bounds the other's.
The held-out records are declared public (privacy.public_eval): their losses are exact and no part of the guarantee.
{result.exposure.in_words()}

  table in numbers   {folder / "results.json"}
  loss and epsilon   {folder / "loss_and_epsilon.png"}
  private model      {folder / "private"}
  its card           {card}
  its record         {record}
  non-private model  {folder / "non-private"}
  base model         {folder / "base"}"""
