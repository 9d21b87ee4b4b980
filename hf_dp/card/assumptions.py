"""Kinds of noise, a unit and what was declared -> the sentences of a record.

They are part of privacy.json and are compared when a card is verified: if one is reworded, records with the old words
no longer verify, so that needs a new schema version.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hf_dp.card.words import counted, units
from hf_dp.mechanism import DISCRETE, PAIR, UNIT, bound_in, generator_of, is_owned, taken_of_a_group

GAUSSIAN = {
    "name": "Poisson-subsampled Gaussian (DP-SGD)",
    "noise": "Gaussian of standard deviation noise_multiplier x sensitivity on every coordinate, float32",
    "noise_precision": "float32",
    "epsilon_is": "the smaller of PLD and RDP, both upper bounds",
}
WHOLE_NUMBERS = {
    "name": "Poisson-subsampled discrete Gaussian (DP-SGD)",
    "noise": "discrete Gaussian of standard deviation 2**22 steps of the grid on every coordinate; 2**22 steps are "
    "noise_multiplier x sensitivity",
    "noise_precision": "whole numbers",
    "epsilon_is": "RDP at whole orders, an upper bound",
}
EPSILON_OF_MIXTURE = "PLD of a mixture of Gaussians, an upper bound"
EPSILON_OF_SELECTION = "RDP of the best of a random number of runs, an upper bound"
IDEALIZED = (
    "Arithmetic is idealized: the noise is drawn and added in floating point and accounted as if in real numbers. No "
    "claim is made against attacks on floating-point rounding."
)
ON_THE_GRID = (
    "Each example's clipped gradient is rounded to whole numbers whose norm is bounded exactly, and sum and noise are "
    "whole numbers, drawn and added without rounding. The floating point before may do what it likes, but it works on "
    "one example at a time: what comes of an example depends on it, on the released weights and on its own dropout "
    "mask, and on no other example.",
    "The random bits behind draws, noise and dropout masks are as good as independent and uniform.",
)
ASSUMPTIONS = (
    "The number of training {counted} is public.",
    "The choice of records and the noise come from a generator ({generator}) keyed with secret randomness of the "
    "operating system, which is never stored.",
)
ONE_PERSON = ("One person, one {kind}: whoever is in several {units} is protected less, the more {units} the less.",)
OF_OWNERS = (
    "Who owns which record stays the same when an owner's records are emptied. Which records were trained on follows "
    "from the lists of owners, in the records' order, and never from what a record says, and so is the same with an "
    "owner's records as without.",
    "One person, one name in the lists of owners: whoever has several names is protected less, and so is whoever a "
    "record is about that does not name them.",
)
INDEPENDENCE = (
    "What comes of an example in a pass depends on no other example. Where several shared a pass, its operations were "
    "followed before the first step, and gradients compared with those of each example alone, on made-up records of "
    "few and many tokens: the model's code and PyTorch are trusted to treat sizes between those compared alike.",
)
INDEPENDENCE_SINCE = 4  # the version of privacy.json
RUN_AS_DRAWN = (
    "The number of runs was drawn, once, by the randomness of the operating system and nobody knew it before the last "
    "one had ended; each run drew its settings from a fixed list; none was left out, repeated or stopped because of "
    "what it showed."
)
OTHER_RUNS = (
    "The other runs that this model was selected from: their models, scores, curves and number, none of which is given "
    "away."
)
SCORES = (
    "The score by which this model was selected is computed on evaluation data, whose own records this epsilon does "
    "not protect."
)
SAMPLER = "Poisson: each record by itself, afresh in each step"
GROUP_SAMPLER = "Poisson: each group by itself, afresh in each step; {taken}"
OWNED_SAMPLER = (
    "Poisson: each record by itself, afresh in each step; of an owner {bound:,} records at most, chosen by who owns "
    "which alone"
)
BOUNDED_SAMPLER = "Poisson: each record by itself, afresh in each step; of a group its first {bound:,} records at most"
COVERED = (
    "The model's weights, all checkpoints of this training together, and the optimizer's state in them: they were "
    "computed from the noisy sums alone.",
    "Whatever is made from the model without the training records: merged, converted or quantised weights, and all "
    "that it generates.",
)
NOT_COVERED = (
    "What the base model and its tokenizer had learnt before, from whatever data.",
    "Other models trained on the same records, and settings that were chosen by trying them on these records: their "
    "epsilons add to this one.",
    "Side channels: how long training took, its use of memory, and anybody with access to the machine.",
)
GENERATORS = {
    "philox": "Philox4x64 keyed with 128 bits of the operating system's entropy, never stored",
    "chacha20": "the cipher ChaCha20 keyed with 128 bits of the operating system's entropy, never stored",
}
GENERATOR_NAMES = {"philox": "Philox4x64, which is no cipher", "chacha20": "the cipher ChaCha20"}
OWNERSHIP = (
    "Who owns which record, how many, and together with whom: what an owner's records say is protected, not that they "
    "are theirs."
)
PUBLIC_EVAL = (
    "Evaluation data: whoever trained the model declared them public; numbers and choices made with them are not "
    "covered."
)
PRIVATE_EVAL = "Evaluation data: not declared public; numbers computed on them are not covered."


class Sentences(NamedTuple):
    """The sentences of a record: what is assumed, what epsilon holds for, and what it does not hold for."""

    assumptions: tuple[str, ...]
    covered: tuple[str, ...]
    not_covered: tuple[str, ...]


def kind_of(noises: Iterable[str]) -> dict[str, str]:
    """The words for a mechanism, or an account, with these kinds of noise: those for whole numbers if any noise is
    discrete.
    """
    return WHOLE_NUMBERS if DISCRETE in noises else GAUSSIAN


def epsilon_is(noises: Iterable[str], unit: str, *, selected: bool = False) -> str:
    """How the accountants' numbers make up the epsilon that is claimed."""
    if selected:
        return EPSILON_OF_SELECTION
    return EPSILON_OF_MIXTURE if (bound_in(unit) or 1) > 1 else kind_of(noises)["epsilon_is"]


def sampler(unit: str, records_per_unit: int) -> str:
    """How records are sampled, in words."""
    bound = bound_in(unit)
    if bound is not None:
        return (OWNED_SAMPLER if is_owned(unit) else BOUNDED_SAMPLER).format(bound=bound)
    return SAMPLER if unit in (UNIT, PAIR) else GROUP_SAMPLER.format(taken=taken_of_a_group(records_per_unit))


def sentences(
    public_eval: bool, noises: Sequence[str], unit: str, *, selected: bool = False, version: int
) -> Sentences:
    """The sentences for a run with these kinds of noise and this unit; `public_eval` is whether evaluation data were
    declared public, and `version` that of privacy.json.
    """
    named = ", then ".join(GENERATOR_NAMES[name] for name in sorted({*map(generator_of, noises)}, reverse=True))
    named_unit = {"units": units(unit), "kind": units(unit).removesuffix("s"), "counted": counted(unit)}
    arithmetic = ON_THE_GRID if {*noises} == {DISCRETE} else (IDEALIZED,)
    whose = OF_OWNERS if is_owned(unit) else ONE_PERSON
    return Sentences(
        assumptions=(
            *arithmetic,
            *(text.format(generator=named, **named_unit) for text in (*ASSUMPTIONS, *whose)),
            *(INDEPENDENCE if version >= INDEPENDENCE_SINCE else ()),
            *([RUN_AS_DRAWN] if selected else []),
        ),
        covered=COVERED,
        not_covered=(
            PUBLIC_EVAL if public_eval else PRIVATE_EVAL,
            *([OWNERSHIP] if is_owned(unit) else []),
            *([OTHER_RUNS, SCORES] if selected else []),
            *NOT_COVERED,
        ),
    )
