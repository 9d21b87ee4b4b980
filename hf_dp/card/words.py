"""A `Record` -> what people and the Hub read: the card's YAML block, its section in words, and its picture."""

import math
from collections.abc import Iterable, Sequence
from decimal import ROUND_CEILING, Decimal
from importlib.resources import files
from string import Template

from hf_dp.audit import AuditRecord, power
from hf_dp.card.record import Record, RecordedSelection, TradeoffCurve, in_json
from hf_dp.ledger import ExecutedSegment
from hf_dp.mechanism import DISCRETE, METRIC_NOISE, PAIR, UNIT, bound_in, is_owned, taken_of_a_group
from hf_dp.pictures import tradeoff_svg

PICTURE = "privacy_tradeoff.svg"
MOST_SHOWN = 4  # successive values of one setting that are listed; privacy.json has them all
SHARES = {0.001: "1 in 1,000", 0.01: "1 in 100", 0.1: "1 in 10"}  # the false-positive rates that the card names


def yaml_block(record: Record) -> dict[str, object]:
    """The `privacy:` block of the model card's YAML. Epsilon is rounded up.

    If settings changed during a run, noise_multiplier, sample_rate, num_steps and clip_norm are lists with an entry for
    each segment, in the order of training.
    """
    return {
        "epsilon": rounded_up(in_json(record.epsilon), digits=5),
        "delta": record.delta,
        "unit": record.unit,
        "relation": record.relation,
        "mechanism": record.mechanism.name,
        "noise_multiplier": _one_or_all([s.joint_noise_multiplier for s in settings(record)]),
        "sample_rate": _one_or_all([s.sample_rate for s in settings(record)]),
        "num_steps": _one_or_all([s.num_steps for s in settings(record)]),
        "clip_norm": _one_or_all([s.clip_norm for s in settings(record)]),
        "accountant": _accountant(record),
        **({"num_steps_claimed": steps_claimed(record)} if ended_early(record) else {}),
        **({"selection": selection_in_short(record.selection)} if record.selection else {}),
    } | ({} if record.private else {"not_private": record.reason})


def section(record: Record) -> str:
    """The card's section, from the template card.md, or card_not_private.md where no guarantee may be claimed."""
    old = record.schema_version == 1
    name = ("card.1.md" if old else "card.md") if record.private else "card_not_private.md"
    shown = in_words(record) | {
        "assumptions": _bullets(record.assumptions),
        "not_covered": _bullets(record.not_covered),
        "covered": _bullets(record.covered),
        "attacker": "\n".join(f"| {share} | {limit} |" for share, limit in attackers_limits(record)),
        "picture": PICTURE,
    }
    text = Template(files("hf_dp.card").joinpath(name).read_text(encoding="utf-8")).substitute(shown)
    text = _after_first_paragraph(text, _plan_in_words(record)) if ended_early(record) else text
    text = _with_selection(text, record.selection) if record.selection else text
    return _with_audit(text, record.audit) if record.audit else text


def in_words(record: Record) -> dict[str, str]:
    """Name -> text, for the places in the templates that are no lists. Numbers are rounded to the safe side."""
    k, bound = record.mechanism.records_per_unit, bound_in(record.unit)
    shown = {
        "reason": record.reason or "",
        "delta": f"{record.delta:.6g}",
        "unit": record.unit,
        "units": units(record.unit),
        "counted": counted(record.unit),
        "drawn": record.unit if bound is None else UNIT,
        "relation": record.relation,
        "taken": _taken(k) if bound is None else "; each of them is drawn by itself",
        "num_examples": f"{record.mechanism.num_examples:,}",
        "mechanism": record.mechanism.name,
        "clip_norm": in_turn(s.clip_norm for s in settings(record)),
        "num_steps": f"{record.num_steps:,} (planned: {record.mechanism.num_steps_planned:,})",
        "sample_rate": in_turn(s.sample_rate for s in settings(record)),
        "noise_multiplier": in_turn(s.joint_noise_multiplier for s in settings(record)),
        "released": ", then ".join(dict.fromkeys(released(s.loss_bound) for s in settings(record))),
        "accountant": _accountant(record),
    }
    if record.private:
        shown |= _in_words(record.epsilon, record.delta)
        shown["epsilon_rdp"] = str(rounded_up(in_json(record.epsilon_rdp), digits=4))
        discrete = any(s.noise == DISCRETE for s in record.segments)
        shown["any_accountant"] = "Rényi accounting at whole orders" if discrete else "any accountant"
        shown["whence"] = "the segments and delta"
        shown["other_bound"] = (
            "at whole orders, which discrete noise is proved for; no other bound is claimed"
            if discrete
            else f"an independent bound by Rényi accounting is {shown['epsilon_rdp']}"
        )
        if record.selection:
            shown["any_accountant"] = (
                "Rényi accounting of repeated selection (dp-accounting's `RepeatAndSelectDpEvent`)"
            )
            shown["whence"] = "the runs, the distribution and delta"
            shown["other_bound"] = "the selection included; no other bound is claimed"
        if (bound or 1) > 1:
            shown["any_accountant"] = (
                "an accountant of mixtures of Gaussians (dp-accounting's `from_mixture_gaussian_mechanism`, with "
                "Bin(G, q) of a group's G records in a step)"
            )
            shown["other_bound"] = "of a mixture of Gaussians; no other bound is claimed"
        shown |= _attackers_in_words(record, record.tradeoff) if record.tradeoff else {}
    return shown


def _taken(records_per_unit: int) -> str:
    return "" if records_per_unit == 1 else f"; a step takes {taken_of_a_group(records_per_unit)}"


def selection_in_short(selection: RecordedSelection) -> str:
    """The selection in one line."""
    return f"best of a random number of runs, {selection.distribution} with mean {selection.mean:g}"


def _with_selection(text: str, selection: RecordedSelection) -> str:
    """The section with a paragraph about the selection after its first one."""
    words = (
        "**Selected from a random number of runs.** This training was run a number of times drawn from the "
        f"{selection.distribution} distribution with mean {selection.mean:g}, each time with settings drawn from a "
        "fixed list and fresh randomness, and the model with the best score was kept. Epsilon, and all that follows "
        "from it here, is that of the whole: the runs, their number and the choice. A single run by itself has "
        f"epsilon {rounded_up(selection.epsilon_of_one_run, digits=3)}. What else the runs gave is not part of this "
        "model and not covered."
    )
    return _after_first_paragraph(text, words)


def _after_first_paragraph(text: str, words: str) -> str:
    head, first, rest = text.split("\n\n", 2)
    return f"{head}\n\n{first}\n\n{words}\n\n{rest}"


def steps_claimed(record: Record) -> int:
    """The number of steps whose epsilon is claimed: those of the longest plan, or those taken if they are more.

    Records before version 3 have no plans and claim the steps taken.
    """
    return max([record.num_steps, *(sum(s.num_steps for s in plan) for plan in record.plans)])


def ended_early(record: Record) -> bool:
    """Whether a guarantee is claimed for steps that were planned but not taken."""
    return record.private and steps_claimed(record) > record.num_steps


def _plan_in_words(record: Record) -> str:
    """What is claimed of a run that took fewer steps than planned, and what holds for the steps that it took."""
    alone = rounded_up(in_json(record.epsilon_of_steps_taken or 0.0), digits=3)
    return (
        f"**Steps taken: {record.num_steps:,} of {steps_claimed(record):,}.** Epsilon is that of the whole plan, "
        f"because when a training ends may follow from what it released (a filter). Epsilon of {record.num_steps:,} "
        f"steps alone, {alone}, would hold only had that number been fixed beforehand (an odometer; Rogers et al. "
        "2016)."
    )


def attackers_limits(record: Record) -> list[tuple[str, str]]:
    """Three points of the trade-off curve: (share of non-members wrongly accused, largest share of members found).

    Empty for a record without a curve.
    """
    curve = record.tradeoff
    if not curve:
        return []
    limits = dict(zip(curve.false_positive_rates, curve.true_positive_rates, strict=True))
    return [(share, percent(limits[rate])) for rate, share in SHARES.items()]


def _with_audit(text: str, audit: AuditRecord) -> str:
    """The section with its audit: at the end, or at the head where the audit refutes the claim."""
    seen = "the noisy sums of all steps" if audit.kind == "gradient" else "the loss of the finished model on them"
    shares = ", ".join(f"{v} of {r}" for r, v in audit.guesses)
    words = (
        f"{audit.num_canaries:,} of the records are canaries ({audit.kind}): made up, each trained on or left out by a "
        f"fair coin of its own. Guessing the coins from {seen}, right guesses were {shares} (area under the curve "
        f"{audit.area_under_curve:.3f}). With a confidence of {audit.confidence:.0%} epsilon is at least "
        f"**{audit.epsilon_at_least:.3f}** ({audit.epsilon_at_least_if_gaussian:.3f} were its trade-off function "
        f"Gaussian); so many canaries can show {audit.ceiling:.3f} at most ({audit.ceiling_if_gaussian:.3f}). Method: "
        f"{audit.method}; {power(audit.control_area_under_curve)}. A bound below the claim is no evidence of more "
        "privacy than claimed."
    )
    if not audit.refuted:
        return f"{text.rstrip()}\n\n**Audit.** {words}\n"
    heading, rest = text.split("\n", 1)
    verdict = "**REFUTED: the claim below is contradicted by this training's own audit.**"
    return f"{heading}: REFUTED\n\n{verdict} {words}\n{rest}"


def picture(record: Record) -> str:
    """The SVG of a record's trade-off curve. The record must have one."""
    assert record.tradeoff is not None, "only a record with a guarantee has a curve"
    curve = record.tradeoff
    points = list(zip(curve.false_positive_rates, curve.true_positive_rates, strict=True))
    return tradeoff_svg(points, percent(curve.advantage))


def units(unit: str) -> str:
    """The plural of a unit, in short; records, where each may be of several units."""
    return {UNIT: "records", PAIR: "pairs"}.get(UNIT if is_owned(unit) else unit, "groups")


def counted(unit: str) -> str:
    """What N counts, in the plural: units, or records where each is drawn by itself."""
    return units(unit if bound_in(unit) is None else UNIT)


def released(loss_bound: float | None) -> str:
    """What a step releases, in words."""
    if loss_bound is None:
        return "the gradient"
    return (
        f"the gradient, the training loss (each example's clamped to [0, {loss_bound:g}]) and the batch size, all with "
        "noise, as one release inside this epsilon; sigma is that of the whole release, the gradient has sqrt(1 + 2 / "
        f"{METRIC_NOISE:g}²) of it"
    )


def _in_words(epsilon: float, delta: float) -> dict[str, str]:
    """Epsilon, the largest ratio of probabilities, and the best guesser's chance of being right about a fair coin.

    (epsilon, delta) bounds that chance by (e^epsilon + delta) / (1 + e^epsilon): Kairouz, Oh, Viswanath 2015, theorem
    2.1.
    """
    accuracy = (1 + delta * math.exp(-epsilon)) / (1 + math.exp(-epsilon))
    factor = rounded_up(math.exp(epsilon), digits=3) if epsilon < 14 else f"10^{math.ceil(epsilon / math.log(10))}"
    return {
        "epsilon": str(rounded_up(epsilon, digits=3)),
        "factor": str(factor),
        "accuracy": f"{min(100.0, math.ceil(accuracy * 1e4) / 100):.2f} %",
    }


def _attackers_in_words(record: Record, curve: TradeoffCurve) -> dict[str, str]:
    """The trade-off curve in words; each limit is rounded up."""
    advantage = curve.advantage
    return {
        "best_guess": percent((1 + advantage) / 2),
        "advantage": percent(advantage),
        "epsilon_at": "; ".join(f"{rounded_up(at.epsilon, digits=3)} at {at.delta:.3g}" for at in record.epsilon_at[1:])
        or "not computed",
    }


def percent(share: float) -> str:
    """A percentage with one decimal, rounded up, so that a limit is never shown too low."""
    return f"{min(1000, math.ceil(round(share * 1000, 9))) / 10:.1f} %"


def rounded_up(value: float | str, *, digits: int) -> float | str:
    """Rounds up to significant digits; a word is returned as it is."""
    if isinstance(value, str) or value == 0:
        return value
    exact = Decimal(value)
    return float(exact.quantize(Decimal(1).scaleb(exact.adjusted() - digits + 1), rounding=ROUND_CEILING))


def _accountant(record: Record) -> str:
    by = "RDP" if record.private and record.epsilon != record.epsilon_pld else "PLD"
    return f"{record.accountant.name} {record.accountant.version} ({by})"


def settings(record: Record) -> tuple[ExecutedSegment, ...]:
    """The segments; before the first step, the plan's settings with 0 steps."""
    m = record.mechanism
    planned = ExecutedSegment(
        m.sample_rate, m.joint_noise_multiplier, m.clip_norm, m.expected_batch_size, 0, loss_bound=m.loss_bound
    )
    return record.segments or (planned,)


def _one_or_all(values: Sequence[float]) -> float | Sequence[float]:
    return values[0] if len(values) == 1 else values


def in_turn(values: Iterable[float]) -> str:
    """The values one after another or, if there are many, their range."""
    found = [f"{value:.6g}" for value in values]
    if len(found) <= MOST_SHOWN:
        return ", then ".join(found)
    least, most = (f"{value:.6g}" for value in (min(map(float, found)), max(map(float, found))))
    return f"{least} to {most}, one after another in {len(found)} runs of steps" if least != most else least


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)
