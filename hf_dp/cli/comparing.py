"""A recipe -> two trainings, private and plain, attacks on both models, and a table, a picture and a JSON of both.

Some records are held back from both trainings: the loss on them says what was learnt, and an attack that tells records
which were trained on from these says what is given away, beside the planted secrets.
"""

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from transformers import PrinterCallback, Trainer, TrainerCallback

from hf_dp.audit import CHANCE, Floats, are_given_away, measured
from hf_dp.cli.losses import row_losses
from hf_dp.cli.membership import IN_TURN, NOT_COVERED, refuse_attack
from hf_dp.cli.planted import MOST_BITS, Secrets, exposure, extracted, make_secrets, planted
from hf_dp.pictures import PLAIN, PRIVATE, Line, Panel, save_figure
from hf_dp.recipe import Recipe, task
from hf_dp.tables import print_table
from hf_dp.training import DPTrainer, rate_in_force

SILENT = {"logging_strategy": "no", "log_level": "error"}
MOST_HELD_BACK, MEASURED = 256, 8  # records; times during a training
Curve = list[tuple[int, float]]


class Records(NamedTuple):
    """Rows to train on (with the secrets), as many of them as are held back, those held back, and the secrets."""

    train: datasets.Dataset
    members: datasets.Dataset
    others: datasets.Dataset
    secrets: Secrets | None


class Leaks(NamedTuple):
    """What one model has learnt and gives away.

    Attributes:
        loss: mean on the records held back.
        membership: area under the curve of telling members from others; 0.5 is guessing.
        membership_low: the lower end of its 95 % interval.
        bits: mean exposure of the secrets; None where none were planted, as the next two.
        exposed: whether unseen secrets would be so exposed with a probability of at most 1 %.
        extracted: how many secrets the model writes by itself.
        losses: (step, loss on the records held back).
        leaked: (step, mean exposure), or without secrets (step, area under the curve).
    """

    loss: float
    membership: float
    membership_low: float
    bits: float | None
    exposed: bool | None
    extracted: int | None
    losses: Curve
    leaked: Curve

    @property
    def found(self) -> bool:
        """Whether any of the attacks finds something beyond chance."""
        return bool(self.exposed or self.extracted or self.membership_low > 0.5)


def compare_recipe(recipe: Recipe, num_secrets: int, folder: Path) -> None:
    """Trains both models, attacks them, and writes `comparison.json` and `comparison.png` into `folder`.

    Raises:
        ConfigError: a recipe whose records cannot be attacked one by one.
    """
    refuse_attack(recipe)
    single = dataclasses.replace(recipe.privacy, budget_file=None)
    with tempfile.TemporaryDirectory() as scratch:
        training = {**recipe.training, **IN_TURN, **SILENT, "output_dir": scratch}
        asked = dataclasses.replace(recipe, training=training, privacy=single)
        parts = task.prepare(asked)
        records = _records(asked, parts, num_secrets)
        private_trainer = task.build(asked, parts._replace(train=records.train, validation=None))
        steps = private_trainer._planned().num_steps
        print(f"1 of 2: with privacy, {steps:,} steps on {len(records.train):,} records.")
        private = _followed(private_trainer, private_trainer, records, steps)
        print("2 of 2: without privacy, by plain Trainer, as many steps on the same records.")
        ruler = task.build(asked, task.prepare(asked)._replace(train=records.train, validation=None))
        plain = _followed(_plain(asked, ruler, private_trainer, steps), ruler, records, steps)
    spent = private_trainer.privacy_spent()
    found = {
        "private": private._asdict(),
        "without_privacy": plain._asdict(),
        "epsilon": spent.epsilon if math.isfinite(spent.epsilon) else None,
        "delta": spent.delta,
        "num_steps": steps,
        "learning_rate": rate_in_force(private_trainer),
        "num_examples": len(records.train),
        "num_secrets": num_secrets if records.secrets else 0,
        "num_held_back": len(records.others),
        "most_bits": MOST_BITS,
    }
    (folder / "comparison.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    _draw(folder / "comparison.png", private, plain, spent.epsilon)
    _print_both(private, plain, spent.epsilon, num_secrets)
    print(statement(private, plain) + "\n" + NOT_COVERED)


def _records(recipe: Recipe, parts: task.Parts, num_secrets: int) -> Records:
    """Holds a fifth of the records back, at most MOST_HELD_BACK, and plants secrets among the others."""
    order = np.random.default_rng().permutation(len(parts.train))
    held = max(1, min(MOST_HELD_BACK, len(order) // 5))
    others, kept = parts.train.select(order[:held]), parts.train.select(order[held:])
    members = kept.select(range(min(held, len(kept))))
    if recipe.model.task != "causal_lm":
        return Records(kept, members, others, None)
    secrets = make_secrets(parts.tokenizer, num_secrets)
    return Records(planted(kept, secrets), members, others, secrets)


def _plain(recipe: Recipe, ruler: DPTrainer, private: DPTrainer, steps: int) -> Trainer:
    """Trainer on the ruler's model: the same rows, steps, learning rate and (mean) batch size."""
    parts = task.prepare(recipe)._replace(model=ruler.model, train=ruler.train_dataset, validation=None)
    keywords = task.trainer_keywords(recipe, parts)
    batch, most = recipe.privacy.expected_batch_size, keywords["args"].per_device_train_batch_size
    accumulated = math.ceil(batch / most)
    args = dataclasses.replace(
        keywords["args"],
        max_steps=steps,
        learning_rate=rate_in_force(private),
        per_device_train_batch_size=math.ceil(batch / accumulated),
        gradient_accumulation_steps=accumulated,
    )
    return Trainer(**{**keywords, "args": args})


def _followed(trainer: Trainer, ruler: DPTrainer, records: Records, steps: int) -> Leaks:
    """Trains, and measures the ruler's model, which is the trainer's, before, during and after."""
    base = _losses_of_people(ruler, records)
    during = {round(steps * k / MEASURED) for k in range(1, MEASURED)}
    beside = _Beside(during - {0, steps}, lambda: _measured(ruler, records, base))
    trainer.add_callback(beside)
    trainer.remove_callback(PrinterCallback)
    before = _measured(ruler, records, base)
    trainer.train()
    last = _measured(ruler, records, base)
    course = sorted({0: before, **beside.found, steps: last}.items())
    return last._replace(
        extracted=extracted(ruler.model, records.secrets) if records.secrets else None,
        losses=[(step, found.loss) for step, found in course],
        leaked=[(step, found.membership if found.bits is None else found.bits) for step, found in course],
    )


def _measured(ruler: DPTrainer, records: Records, base: Floats) -> Leaks:
    """A record counts as a member the more, the more its loss fell below the base model's."""
    now = _losses_of_people(ruler, records)
    member = np.repeat([True, False], [len(records.members), len(records.others)])
    area = measured((base - now)[None], member[None]).area
    bits = exposure(ruler, records.secrets) if records.secrets else None
    return Leaks(
        loss=float(now[~member].mean()),
        membership=area.estimate,
        membership_low=area.low,
        bits=None if bits is None else float(bits.mean()),
        exposed=None if bits is None else are_given_away(bits),
        extracted=None,
        losses=[],
        leaked=[],
    )


def _losses_of_people(ruler: DPTrainer, records: Records) -> Floats:
    return np.concatenate([row_losses(ruler, rows) for rows in (records.members, records.others)])


class _Beside(TrainerCallback):
    """Takes a measure after some steps."""

    def __init__(self, steps: set[int], measure: Callable[[], Leaks]) -> None:
        self.steps, self.measure = steps, measure
        self.found: dict[int, Leaks] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.steps:
            self.found[int(state.global_step)] = self.measure()


def _print_both(private: Leaks, plain: Leaks, epsilon: float, num_secrets: int) -> None:
    base = private.losses[0][1]
    rows = [
        ("loss on records held back", f"{base:.3f}", f"{private.loss:.3f}", f"{plain.loss:.3f}"),
        ("who was in the data (0.5: guessing)", "", *(_area(found) for found in (private, plain))),
    ]
    if private.bits is not None and plain.bits is not None:
        secrets = (private.leaked[0][1], private.bits, plain.bits)
        rows += [
            (f"exposure in bits ({CHANCE:.1f}: chance, {MOST_BITS:.0f}: most)", *(f"{b:.1f}" for b in secrets)),
            ("secrets written out", "", f"{private.extracted} of {num_secrets}", f"{plain.extracted} of {num_secrets}"),
        ]
    limits = [("epsilon", "0", f"{epsilon:.4g}", "infinite")]
    print_table("With privacy and without", ("", "before", "private", "without"), rows, limits)


def _area(found: Leaks) -> str:
    return f"{found.membership:.2f} ± {found.membership - found.membership_low:.2f}"


def statement(private: Leaks, plain: Leaks) -> str:
    """What the numbers say, and whether they can say anything."""
    if not plain.found:
        return (
            "No power: even without privacy nothing is given away beyond chance, so nothing follows for the private\n"
            "model. More epochs, a higher learning rate or more trained weights make a model remember more."
        )
    if not private.found:
        return "What the model without privacy gives away, these attacks do not find in the private one."
    return (
        "These attacks find something in the private model too. Epsilon limits how much, and does not make it\n"
        "nothing; and chance alone exposes secrets once in a hundred comparisons, and finds members once in forty."
    )


def _draw(path: Path, private: Leaks, plain: Leaks, epsilon: float) -> None:
    def lines(of: Callable[[Leaks], Curve]) -> list[Line]:
        return [
            Line(of(plain), "without privacy", color=PLAIN, marker="s"),
            Line(of(private), f"private, epsilon {epsilon:.4g}", color=PRIVATE, marker="o"),
        ]

    learnt = Panel(lines(lambda found: found.losses), "optimizer step", "loss on records held back", "What they learn")
    secrets = private.bits is not None
    given_away = Panel(
        lines(lambda found: found.leaked),
        "optimizer step",
        f"exposure of secrets (bits, at most {MOST_BITS:.0f})" if secrets else "who was in the data (area)",
        "What they give away",
        across=(CHANCE, "chance") if secrets else (0.5, "guessing"),
    )
    save_figure(path, [learnt, given_away], width=7.2, height=6.4)
