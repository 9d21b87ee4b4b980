"""The measurements of the demo -> two tables, examples of what the models write, and a closing statement."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from hf_dp.audit import CHANCE
from hf_dp.demo import leaks
from hf_dp.demo.leaks import Leaks
from hf_dp.demo.secrets import CODE_DIGITS, GUESSING, NUM_SECRETS, Secret
from hf_dp.step import PrivacySpent

MODELS = ("base", "private", "non-private")
PICTURE = "learnt_and_given_away.png"
SHOWN = 4  # rows of secrets and prompts


class Of(NamedTuple):
    """Something of each of the three models."""

    base: Any
    private: Any
    non_private: Any


class Result(NamedTuple):
    """What the demo found.

    Attributes:
        losses: held-out loss in nats per character of the target.
        as_asked: the share of sampled notes that are whole sentences of the supplier's, on their topic.
        spent: what the private run was charged.
        num_steps: optimizer steps of each fine-tuning.
        private: what the private model gives away.
        non_private: what the non-private model gives away.
        seconds: how long the demo took.
    """

    losses: Of
    as_asked: Of
    spent: PrivacySpent
    num_steps: int
    private: Leaks
    non_private: Leaks
    seconds: float

    def in_json(self) -> dict[str, object]:
        """The same, nested tuples as objects."""
        return {
            name: value._asdict() if isinstance(value, tuple) else value  # type: ignore[attr-defined]
            for name, value in self._asdict().items()
        }


def learnt(result: Result) -> Table:
    """One row a model: held-out loss, notes as asked, epsilon and delta."""
    epsilons = ("0", f"{result.spent.epsilon:.4g}", "infinite")
    deltas = ("0", f"{result.spent.delta:g}", "")
    title = f"What they learnt, in {result.num_steps} steps"
    columns = ("held-out loss\n(nats a character)", "sentences\nas asked", "epsilon", "delta")
    rows = zip(MODELS, result.losses, result.as_asked, epsilons, deltas, strict=True)
    return _table(title, columns, [(name, f"{a:.3f}", f"{b:.0%}", e, d) for name, a, b, e, d in rows])


def given_away(result: Result) -> Table:
    """One row for each fine-tuned model: secrets extracted, exposure, membership."""
    columns = (
        "secrets\nextracted",
        f"exposure in bits\n({CHANCE:.1f} is chance, {GUESSING:.1f} the most)",
        "who was in the data\n(0.5 is guessing)",
    )
    rows = [
        (name, f"{of.extracted} of {NUM_SECRETS}", f"{of.bits:.1f}", f"{of.membership:.2f}")
        for name, of in (("private", result.private), ("non-private", result.non_private))
    ]
    return _table("What they give away", columns, rows)


def codes(result: Result, planted: Sequence[Secret]) -> Table:
    """One row for each of the first secrets: the planted code, and the code that each fine-tuned model holds for the
    likeliest.
    """
    rows = [
        (secret.name, *(f"{code:0{CODE_DIGITS}d}" for code in (secret.code, private, plain)))
        for secret, private, plain in zip(planted, result.private.guesses, result.non_private.guesses, strict=True)
    ]
    title = "What they complete: 'The code of the key box is ...'"
    return _table(title, ("planted", "private", "non-private"), rows[:SHOWN], first="customer")


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], first: str = "model") -> Table:
    made = Table(title=title, title_justify="left")
    made.add_column(first)
    for column in columns:
        made.add_column(column, justify="right")
    for row in rows:
        made.add_row(*row)
    return made


def examples(prompts: Sequence[str], texts: Sequence[Sequence[str]]) -> Table:
    """What each model wrote for the first prompts.

    Args:
        prompts: the prompts.
        texts: of each model, its text for each prompt.
    """
    made = Table(title="What they write", title_justify="left")
    made.add_column("model")
    made.add_column("text", overflow="fold")
    for prompt, *written in list(zip(prompts, *texts, strict=True))[:SHOWN]:
        made.add_section()
        made.add_row("", f"[bold]{prompt.strip()}[/bold]")
        for name, text in zip(MODELS, written, strict=True):
            made.add_row(name, escape(text))
    return made


def statement(result: Result, folder: Path, num_private: int) -> str:
    """What happened, what follows from it, and where the files are."""
    spent = result.spent
    card, record = folder / "private" / "README.md", folder / "private" / "privacy.json"
    return f"""\
The demo is done, in {result.seconds:.0f} s. A small Llama was trained on made-up public notes, then fine-tuned
twice on {num_private:,} made-up private ones, with batches of one size and {result.num_steps} steps each: all weights
by Trainer, and LoRA by DPTrainer. The private run spent epsilon {spent.epsilon:.4g} at delta {spent.delta:g};
nothing bounds the other's.
{leaks.in_words(result.private, result.non_private)}
Exposure: Carlini et al. 2019. Who was in the data: area under the curve of an attack by the fall of a record's loss.
The held-out records are declared public (privacy.public_eval), and the secrets are known to the demo: their numbers
are exact and no part of the guarantee.

  tables in numbers  {folder / "results.json"}
  picture            {folder / PICTURE}
  private model      {folder / "private"}
  its card           {card}
  its record         {record}
  non-private model  {folder / "non-private"}
  base model         {folder / "base"}"""
