"""Mechanism + ledger -> `privacy.json`, and into README.md a `privacy:` block, two tags and a section in words.

Everything written is public: settings, counts of steps, epsilon. Nothing computed on a record goes in, noised or not.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import Any

from hf_dp import accounting, durable
from hf_dp.accounting import RATES, Selection, Tradeoff, selection, tradeoff, tradeoff_below
from hf_dp.audit import Counts, audit_record
from hf_dp.card.readme import read_readme, to_json, with_front_matter, with_section
from hf_dp.card.words import PICTURE, picture, released, section, units, yaml_block
from hf_dp.config import MIN_DELTA
from hf_dp.errors import AccountingError, LedgerError
from hf_dp.ledger import LEDGER_NAME, ExecutedSegment, LedgerHeader, LedgerRecord
from hf_dp.mechanism import DISCRETE, UNIT, Mechanism, Segment, generator_of

SCHEMA_VERSION = 3
PRIVACY_JSON = "privacy.json"
TAGS = ("differential-privacy", "dp-sgd")
GAUSSIAN = {
    "name": "Poisson-subsampled Gaussian (DP-SGD)",
    "noise": "Gaussian of standard deviation noise_multiplier x sensitivity on every coordinate, float32",
    "noise_precision": "float32",
    "epsilon_is": "the smaller of PLD and RDP, both upper bounds",
}
WHOLE_NUMBERS = {
    "name": "Poisson-subsampled discrete Gaussian (DP-SGD)",
    "noise": "discrete Gaussian of standard deviation 2**22 steps of the grid on every coordinate; 2**22 steps are noise_multiplier x "
    "sensitivity",
    "noise_precision": "whole numbers",
    "epsilon_is": "RDP at whole orders, an upper bound",
}
EPSILON_OF_SELECTION = "RDP of the best of a random number of runs, an upper bound"
INFINITE = "infinite"  # what stands for epsilon in JSON and YAML, which have no portable word for infinity
LIBRARIES = ("hf_dp", "torch", "transformers", "peft", "accelerate", "datasets", "dp-accounting", "numpy")

IDEALIZED = (
    "Arithmetic is idealized: the noise is drawn and added in floating point and accounted as if in real numbers. No claim "
    "is made against attacks on floating-point rounding."
)
ON_THE_GRID = (
    "Each example's clipped gradient is rounded to whole numbers whose norm is bounded exactly, and sum and noise are whole numbers, "
    "drawn and added without rounding. The floating point before may do what it likes, but it works on one example at a time: what comes "
    "of an example depends on it, on the released weights and on its own dropout mask, and on no other example.",
    "The random bits behind draws, noise and dropout masks are as good as independent and uniform.",
)
ASSUMPTIONS = (
    "The number of training {units} is public.",
    "The choice of records and the noise come from a generator ({generator}) keyed with secret randomness of the operating "
    "system, which is never stored.",
    "One person, one {kind}: whoever is in several {units} is protected less, the more {units} the less.",
)
RUN_AS_DRAWN = (
    "The number of runs was drawn, once, by the randomness of the operating system and nobody knew it before the last one had ended; each "
    "run drew its settings from a fixed list; none was left out, repeated or stopped because of what it showed."
)
OTHER_RUNS = "The other runs that this model was selected from: their models, scores, curves and number, none of which is given away."
SCORES = "The score by which this model was selected is computed on evaluation data, whose own records this epsilon does not protect."
SAMPLER = "Poisson: each record by itself, afresh in each step"
GROUP_SAMPLER = (
    "Poisson: each group by itself, afresh in each step; of a drawn group one record, each as likely as another"
)
COVERED = (
    "The model's weights, all checkpoints of this training together, and the optimizer's state in them: they were computed from "
    "the noisy sums alone.",
    "Whatever is made from the model without the training records: merged, converted or quantised weights, and all that it "
    "generates.",
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
PUBLIC_EVAL = "Evaluation data: whoever trained the model declared them public; numbers and choices made with them are not covered."
PRIVATE_EVAL = "Evaluation data: not declared public; numbers computed on them are not covered."


def kind_of(noises: Iterable[str]) -> dict[str, str]:
    """The words for a mechanism, or an account, of these kinds of noise: whole numbers where all are, or where one is for an account."""
    return WHOLE_NUMBERS if DISCRETE in noises else GAUSSIAN


def library_versions(names: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Installed versions by name, without importing any of them; a library that is not installed is left out."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def privacy_record(
    mechanism: Mechanism,
    ledger: LedgerRecord,
    *,
    libraries: Mapping[str, str],
    declared: Mapping[str, Any],
    audit: Counts | None = None,
) -> dict[str, Any]:
    """Every number that is needed to compute epsilon again, what is assumed, and what is not covered. All of it public.

    Epsilon is computed here: from the first step on that of the costliest of the plans, not of the steps charged so far, whose number may
    follow from what they released; that of those stands beside it as what it is. Where nothing may be claimed (no noise, a debugging seed)
    every epsilon is the word "infinite", `private` is False and `reason` says why.

    Args:
        mechanism: what was planned.
        ledger: what was charged, and under which plans (where it has none, that of `mechanism`); of the same N, unit, relation and delta.
        libraries: name -> version, as `library_versions()` gives them.
        declared: what the user vouched for: `public_eval`, and anything else worth recording (public, JSON-able).
        audit: what the canaries of an audited run showed.

    Raises:
        LedgerError: the ledger is not of this mechanism. Names every difference.
        AccountingError: its segments cannot be accounted.
    """
    _check_same_run(mechanism, ledger.header)
    segments = [s for s in ledger.executed if s.num_steps]
    assert sum(s.num_steps for s in segments) == ledger.num_steps, "the ledger's own sums differ"
    noises = [s.noise for s in segments] or [mechanism.noise]
    reason = _reason_against(mechanism, ledger.header, segments)
    plans = ledger.plans or ((mechanism.segments(),) if ledger.num_steps else ())
    claimed = () if reason else accounting.claimed(ledger.segments, plans, mechanism.delta)
    nothing = accounting.Epsilon(*[math.inf] * 3)
    spent, of_steps = (
        nothing if reason else accounting.spent(segments, mechanism.delta) for segments in (claimed, ledger.segments)
    )
    if not reason and not math.isfinite(spent.epsilon):
        reason = "the noise is too weak for any finite epsilon at this delta"
    of_audit = {}
    if audit is not None:
        of_audit["audit"] = audit_record(audit, claimed or ledger.segments, mechanism.delta, spent.epsilon)
    return {
        **_stated(reason, spent),
        "delta": mechanism.delta,
        **further_bounds(claimed, mechanism.delta, claimed=not reason),
        "accountant": _accountant(noises),
        "unit": mechanism.unit,
        "relation": mechanism.relation,
        "mechanism": _mechanism(mechanism),
        "num_steps": ledger.num_steps,
        "segments": [s.stated() for s in segments],
        "plans": [[s.stated() for s in plan] for plan in plans],
        "epsilon_of_steps_taken": _number(of_steps.epsilon),
        "ledger": {"file": LEDGER_NAME, "head": ledger.head},
        "declared": dict(declared),
        **sentences(declared, noises, mechanism.unit),
        "libraries": dict(libraries),
        **of_audit,
    }


def _accountant(noises: list[str]) -> dict[str, str]:
    version = library_versions(["dp-accounting"]).get("dp-accounting", "unknown")
    return {"name": "dp-accounting", "version": version, "epsilon_is": kind_of(noises)["epsilon_is"]}


def _stated(reason: str | None, claimed: accounting.Epsilon) -> dict[str, Any]:
    """Whether there is a guarantee, and its epsilon by each accountant."""
    return {
        "schema_version": SCHEMA_VERSION,
        "private": not reason,
        "reason": reason,
        "epsilon": _number(claimed.epsilon),
        "epsilon_pld": _number(claimed.pld),
        "epsilon_rdp": _number(claimed.rdp),
    }


def with_selection(record: Mapping[str, Any], selected: Selection) -> dict[str, Any]:
    """The record of one run -> that of the run which a selection kept: epsilon is that of the whole.

    Raises:
        AccountingError: the selection has no finite epsilon.
    """
    delta = record["delta"]
    epsilon = selection.spent(selected, delta)
    noises = [s["noise"] for s in record["segments"]]
    return {
        **record,
        "epsilon": epsilon,
        "epsilon_pld": INFINITE,
        "epsilon_rdp": epsilon,
        **bounds_of_selection(selected, delta),
        "accountant": record["accountant"] | {"epsilon_is": EPSILON_OF_SELECTION},
        **sentences(record["declared"], noises, record["unit"], selected=True),
        "selection": selected.stated(delta),
    }


def sentences(
    declared: Mapping[str, Any], noises: Sequence[str], unit: str, *, selected: bool = False
) -> dict[str, list[str]]:
    """What is assumed, what epsilon holds for and what it does not, given what the user vouched for, kinds of noise used and unit."""
    named = ", then ".join(GENERATOR_NAMES[name] for name in sorted({*map(generator_of, noises)}, reverse=True))
    named_unit = {"units": units(unit), "kind": units(unit).removesuffix("s")}
    arithmetic = ON_THE_GRID if {*noises} == {DISCRETE} else (IDEALIZED,)
    return {
        "assumptions": [
            *arithmetic,
            *(text.format(generator=named, **named_unit) for text in ASSUMPTIONS),
            *([RUN_AS_DRAWN] if selected else []),
        ],
        "covered": list(COVERED),
        "not_covered": [
            PUBLIC_EVAL if declared.get("public_eval") else PRIVATE_EVAL,
            *([OTHER_RUNS, SCORES] if selected else []),
            *NOT_COVERED,
        ],
    }


def write_card(folder: str | Path, record: Mapping[str, Any]) -> None:
    """Writes `privacy.json` and the picture of its trade-off curve into `folder` and states it in README.md.

    README.md is made where there is none. In it only the `privacy:` block, the two tags (taken away where nothing may be
    claimed) and the text between hf_dp's own comment marks are touched; every other character stays.
    Writing twice is writing once. Each file is replaced in one piece or not at all.

    Raises:
        ConfigError: README.md is not UTF-8, its YAML cannot be read, or its marks are damaged; it is then left alone, and
            privacy.json is written all the same.
    """
    folder = Path(folder)
    durable.replace(folder / PRIVACY_JSON, to_json(record).encode())
    if record["private"]:
        durable.replace(folder / PICTURE, picture(record).encode())
    else:
        (folder / PICTURE).unlink(missing_ok=True)
    readme = folder / "README.md"
    text = with_front_matter(read_readme(readme), yaml_block(record), TAGS, tagged=record["private"])
    durable.replace(readme, with_section(text, section(record)).encode())


def further_bounds(segments: Sequence[Segment], delta: float, *, claimed: bool) -> dict[str, Any]:
    """Epsilon at several deltas, and the best attacker's rates; nothing where nothing is claimed."""
    if not claimed:
        return {"epsilon_at": [], "tradeoff": None}
    return _bounds(tradeoff(segments, delta), delta, lambda d: accounting.spent(segments, d).epsilon)


def bounds_of_selection(selected: Selection, delta: float) -> dict[str, Any]:
    """The same of the run that a selection kept."""
    top = selection.spent(selected, delta)
    curve = tradeoff_below(top, delta, lambda epsilons: selection.deltas(selected, epsilons))
    return _bounds(curve, delta, lambda d: selection.spent(selected, d))


def _bounds(curve: Tradeoff, delta: float, epsilon_at: Callable[[float], float]) -> dict[str, Any]:
    """Epsilon at delta and at a tenth, a hundredth and a thousandth of it, as far down as an accountant has an answer; and the curve."""
    found = []
    for divisor in (1, 10, 100, 1000):
        if delta / divisor >= MIN_DELTA:
            with suppress(AccountingError):
                found.append({"delta": delta / divisor, "epsilon": epsilon_at(delta / divisor)})
    return {
        "epsilon_at": found,
        "tradeoff": {
            "advantage": curve.advantage,
            "false_positive_rates": list(RATES),
            "true_positive_rates": list(curve.true_positive_rates),
        },
    }


def _mechanism(m: Mechanism) -> dict[str, Any]:
    return {
        "name": kind_of([m.noise])["name"],
        "num_examples": m.num_examples,
        "num_examples_is_public": True,
        "expected_batch_size": m.expected_batch_size,
        "clip_norm": m.clip_norm,
        "clipping": "Euclidean norm of each example's whole gradient",
        "sampler": sampler(m.unit),
        "released": released(m.loss_bound),
        "loss_bound": m.loss_bound,
        "sensitivity": m.sensitivity,
        "noise": kind_of([m.noise])["noise"],
        "generator": m.generator,
        "noise_generator": GENERATORS[m.generator],
        "noise_precision": kind_of([m.noise])["noise_precision"],
        "sample_rate": m.sample_rate,
        "noise_multiplier": m.joint_noise_multiplier,
        "target_epsilon": m.target_epsilon,
        "num_steps_planned": m.num_steps,
        **({"levels": _levels(m)} if m.levels else {}),
    }


def _levels(m: Mechanism) -> list[dict[str, Any]]:
    starts = accumulate((level.num_steps for level in m.levels), initial=0)
    return [
        {
            "num_steps": level.num_steps,
            "sample_rate": settings.sample_rate,
            "noise_multiplier": settings.joint_noise_multiplier,
            "clip_norm": settings.clip_norm,
            "expected_batch_size": settings.expected_batch_size,
        }
        for level, settings in zip(m.levels, map(m.at, starts), strict=False)
    ]


def sampler(unit: str) -> str:
    """How records come into a step, in words."""
    return SAMPLER if unit == UNIT else GROUP_SAMPLER


def _check_same_run(mechanism: Mechanism, header: LedgerHeader) -> None:
    different = [
        f"{name} is {getattr(header, name)!r} in the ledger and {getattr(mechanism, name)!r} in the run"
        for name in ("num_examples", "unit", "relation", "delta")
        if getattr(header, name) != getattr(mechanism, name)
    ]
    if different:
        raise LedgerError(f"the ledger is of another run: {'; '.join(different)}. No card is written from it.")


def _reason_against(mechanism: Mechanism, header: LedgerHeader, segments: Sequence[ExecutedSegment]) -> str | None:
    if mechanism.debug or header.debug:
        return "a fixed debugging seed made sampling and noise predictable"
    charged = [s.joint_noise_multiplier for s in segments] or [mechanism.joint_noise_multiplier]
    if 0 in charged:
        return "no noise was added (noise_multiplier is 0)"
    return None


def _number(epsilon: float) -> float | str:
    return epsilon if math.isfinite(epsilon) else INFINITE
