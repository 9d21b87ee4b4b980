"""A `Record` -> short answers to what reviewers ask of a claim of differential privacy, in the order of NIST SP
800-226: parameters, unit, whom one trusts, what is released, how, and what lies outside.

Near, Darais, Lefkovitz, Howarth 2025: Guidelines for Evaluating Differential Privacy Guarantees, NIST SP 800-226.
"""

from hf_dp.card.description import claim, table
from hf_dp.card.record import Record
from hf_dp.card.words import counted, selection_in_short, steps_claimed, units

TRUST = (
    "Central: whoever trained the model saw the training {plural} and is trusted with them; nobody who gets the model, "
    "its checkpoints or its card needs to be trusted, whatever else they know."
)
RELEASE = (
    "One release, not interactive: the weights and all checkpoints of this one training. Asking the model as often as "
    "one likes costs nothing further (post-processing)."
)
COMPOSITION = (
    "All {steps:,} steps are composed by {accountant}. Other releases made from the same {plural} are "
    "not in this epsilon; theirs add to it."
)
NO_TUNING = (
    "Settings that were chosen by trying them on these {plural} are not in this epsilon. Preparing the data is assumed "
    "to have looked at each of the {plural} by itself."
)
TUNING = "The choice among the runs is in this epsilon ({selection}). Preparing the data is not."
OUTSIDE = (
    "How the {plural} were collected and are kept, who has access to the machine, and side channels such as the time "
    "that training took."
)
UTILITY = (
    "What was measured on data declared public stands under Results, if there is such a section. Clipping and noise "
    "cost rare groups more than common ones; by how much was not measured."
)


def claims_section(record: Record) -> str:
    """The section of a whole card; "" where nothing may be claimed."""
    if not record.private:
        return ""
    answers = {question: answer for question, answer in claims(record).items() if answer}
    return f"## In the terms of NIST SP 800-226\n\n{table('claim', answers)}\n"


def claims(record: Record) -> dict[str, str]:
    """What reviewers ask -> the answer. The record must have a guarantee."""
    plural, number = units(record.unit), counted(record.unit)
    tuned = TUNING.format(selection=selection_in_short(record.selection)) if record.selection else NO_TUNING
    return {
        "privacy parameters": f"{claim(record)}, approximate differential privacy",
        "unit of privacy": f"one {record.unit}; neighbours: {record.relation}, the number of {number} is public",
        "trust model": TRUST.format(plural=plural),
        "release": RELEASE,
        "mechanism": f"{record.mechanism.name}; noise: {record.mechanism.noise_generator}",
        "composition": COMPOSITION.format(
            steps=steps_claimed(record), plural=plural, accountant=record.accountant.name
        ),
        "tuning and preparation": tuned.format(plural=plural),
        "utility and bias": UTILITY,
        "correctness": "The numbers can be computed again: `hf-dp verify`. What is assumed is listed under Privacy.",
        "outside the guarantee": OUTSIDE.format(plural=plural),
    }
