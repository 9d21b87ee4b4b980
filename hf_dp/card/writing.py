"""Mechanism + ledger -> a `Record`; and from it `privacy.json`, and in README.md a `privacy:` block, two tags and a
section.

Everything written is public: settings, numbers of steps, epsilon. Nothing that was computed on a training record goes
in.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from hf_dp import accounting, durable
from hf_dp.accounting import RATES, Epsilon, Selection, Tradeoff, selection, tradeoff, tradeoff_below
from hf_dp.audit import Counts, audit_record
from hf_dp.card.assumptions import EPSILON_OF_SELECTION, GENERATORS, epsilon_is, kind_of, sampler, sentences
from hf_dp.card.claims import claims_section
from hf_dp.card.description import (
    Described,
    front_matter,
    model_section,
    name_on_the_hub,
    results_section,
    title,
    training_section,
)
from hf_dp.card.readme import (
    is_ours,
    of_a_whole_model,
    read_readme,
    to_json,
    with_front_matter,
    with_keys,
    with_section,
    with_whole_card,
    words_of,
    yaml_of,
)
from hf_dp.card.record import (
    Accountant,
    EpsilonAt,
    Record,
    RecordedLevel,
    RecordedMechanism,
    RecordedSelection,
    TradeoffCurve,
)
from hf_dp.card.schema import PRIVACY_JSON, SCHEMA_VERSION, read_record
from hf_dp.card.usage import Model, model_in
from hf_dp.card.words import PICTURE, picture, released, section, yaml_block
from hf_dp.config import MIN_DELTA
from hf_dp.errors import AccountingError, LedgerError
from hf_dp.ledger import LEDGER_NAME, LedgerHeader, LedgerRecord
from hf_dp.mechanism import Mechanism, Segment

TAGS = ("differential-privacy", "differential_privacy", "dp-sgd")  # both spellings are in use
LIBRARIES = ("hf_dp", "torch", "transformers", "peft", "accelerate", "datasets", "dp-accounting", "numpy")
NOTHING_CLAIMED = Epsilon(math.inf, math.inf, math.inf)
Bounds = tuple[tuple[EpsilonAt, ...], TradeoffCurve | None]  # epsilon at several deltas, and the attacker's limits


def library_versions(names: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Name -> version of the libraries that are installed; others are left out."""
    found = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def privacy_record(
    mechanism: Mechanism,
    ledger: LedgerRecord,
    *,
    libraries: Mapping[str, str],
    declared: Mapping[str, object],
    audit: Counts | None = None,
) -> Record:
    """Every number that is needed to compute epsilon again, what is assumed, and what is not covered. All of it public.

    Epsilon is that of the costliest plan under which a step was taken. It is not that of the steps charged so far:
    their number may follow from what they released, so their epsilon stands beside it as `epsilon_of_steps_taken`.
    Where nothing may be claimed (no noise, a debugging seed) every epsilon is infinite, `private` is False and `reason`
    says why.

    Args:
        mechanism: what was planned.
        ledger: what was charged, and under which plans (where it has none, that of `mechanism`); of the same N, unit,
            relation and delta.
        libraries: name -> version, as `library_versions()` gives them.
        declared: what the user vouched for: `public_eval`, and anything else worth recording (public, and possible in
            JSON).
        audit: what the canaries of an audited run showed.

    Raises:
        LedgerError: the ledger is not of this mechanism. Names every difference.
        AccountingError: its segments cannot be accounted.
    """
    _check_same_run(mechanism, ledger.header)
    delta = mechanism.delta
    segments = tuple(s for s in ledger.executed if s.num_steps)
    assert sum(s.num_steps for s in segments) == ledger.num_steps, "the ledger's own sums differ"
    noises = [s.noise for s in segments] or [mechanism.noise]
    plans = ledger.plans or ((mechanism.segments(),) if ledger.num_steps else ())
    claim = _claim(mechanism, ledger, plans)
    return Record(
        schema_version=SCHEMA_VERSION,
        private=not claim.reason,
        reason=claim.reason,
        epsilon=claim.epsilon.epsilon,
        epsilon_pld=claim.epsilon.pld,
        epsilon_rdp=claim.epsilon.rdp,
        delta=delta,
        epsilon_at=claim.bounds[0],
        tradeoff=claim.bounds[1],
        accountant=_accountant(noises, mechanism.unit),
        unit=mechanism.unit,
        relation=mechanism.relation,
        mechanism=_mechanism(mechanism),
        num_steps=ledger.num_steps,
        segments=segments,
        plans=tuple(plans),
        epsilon_of_steps_taken=claim.epsilon_of_steps_taken,
        ledger_file=LEDGER_NAME,
        ledger_head=ledger.head,
        declared=dict(declared),
        libraries=dict(libraries),
        **sentences(bool(declared.get("public_eval")), noises, mechanism.unit, version=SCHEMA_VERSION)._asdict(),
        audit=audit and audit_record(audit, claim.segments or ledger.segments, delta, claim.epsilon.epsilon),
    )


class _Claim(NamedTuple):
    """What may be claimed of a run: the steps, their epsilon and further bounds; or `reason`, why nothing may be."""

    segments: tuple[Segment, ...]
    epsilon: Epsilon
    epsilon_of_steps_taken: float
    bounds: Bounds
    reason: str | None


def _claim(mechanism: Mechanism, ledger: LedgerRecord, plans: Sequence[tuple[Segment, ...]]) -> _Claim:
    reason = _reason_against(mechanism, ledger)
    if reason:
        return _Claim((), NOTHING_CLAIMED, math.inf, ((), None), reason)
    claimed = accounting.claimed(ledger.segments, plans, mechanism.delta)
    epsilon = accounting.spent(claimed, mechanism.delta)
    of_steps_taken = accounting.spent(ledger.segments, mechanism.delta).epsilon
    bounds = further_bounds(claimed, mechanism.delta)
    too_weak = None if math.isfinite(epsilon.epsilon) else "the noise is too weak for any finite epsilon at this delta"
    return _Claim(claimed, epsilon, of_steps_taken, bounds, too_weak)


def with_selection(record: Record, selected: Selection) -> Record:
    """The record of one run -> that of the run which a selection kept: epsilon is that of the runs and the choice
    together.

    Raises:
        AccountingError: the selection has no finite epsilon.
    """
    epsilon = selection.spent(selected, record.delta)
    epsilon_at, curve = bounds_of_selection(selected, record.delta)
    noises, version = [s.noise for s in record.segments], record.schema_version
    return replace(
        record,
        epsilon=epsilon,
        epsilon_pld=math.inf,
        epsilon_rdp=epsilon,
        epsilon_at=epsilon_at,
        tradeoff=curve,
        accountant=record.accountant._replace(epsilon_is=EPSILON_OF_SELECTION),
        selection=RecordedSelection.of(selected, record.delta),
        **sentences(record.public_eval, noises, record.unit, selected=True, version=version)._asdict(),
    )


def write_card(folder: str | Path, record: Record, described: Described | None = None, *, name: str = "") -> None:
    """Writes `privacy.json` and the picture of its trade-off curve into `folder`, and states the record in README.md.

    README.md is made where there is none. Of an existing one, only the `privacy:` block, the tags (taken away where
    nothing may be claimed) and the text between hf_dp's own comment marks are changed; every other character stays.
    Where a model lies in the folder, and a template made the whole text, the whole card is written in its place. What
    somebody wrote is kept. Writing twice is writing once. Each file is replaced in one piece or not at all.

    Args:
        folder: of the model.
        record: what is stated.
        described: what only the training knows; without it, what an earlier card says of it stays.
        name: of the model's folder, or on the Hub, `USER/MODEL`; by default that of `described`, of the card that is
            there, or the folder's.

    Raises:
        ConfigError: README.md is not UTF-8, its YAML cannot be read, or its marks are damaged; it is then left alone,
            and privacy.json is written all the same.
    """
    folder = Path(folder)
    durable.replace(folder / PRIVACY_JSON, to_json(record.stated()).encode())
    if record.private:
        durable.replace(folder / PICTURE, picture(record).encode())
    else:
        (folder / PICTURE).unlink(missing_ok=True)
    readme, model = folder / "README.md", model_in(folder)
    text = with_front_matter(read_readme(readme), yaml_block(record), TAGS, tagged=record.private)
    text = with_section(text, section(record))
    if model is not None and is_ours(text):
        known = name or (described.name if described else "") or name_on_the_hub(words_of(text, "model") or "")
        text = _whole_card(text, record, model, described, known or folder.resolve().name)
    durable.replace(readme, text.encode())


def _whole_card(text: str, record: Record, model: Model, described: Described | None, name: str) -> str:
    selected = record.selection is not None
    called = title(record, model, yaml_of(text), name)
    text = with_keys(text, front_matter(model, yaml_of(text), described, called, selected=selected))
    sections = {"model": model_section(record, model, yaml_of(text), name), "claims": claims_section(record)}
    if described is not None or words_of(text, "training") is None:
        sections["training"] = training_section(record, described or Described())
    if described is not None or selected:  # the results that a model was selected by are not covered, nor typical
        sections["results"] = "" if selected or described is None else results_section(described)
    return with_whole_card(text, sections)


def carry_card(source: Path, target: Path, *, name: str) -> None:
    """Writes card, record and ledger of the adapter in `source` beside the whole model in `target`, which it is part
    of now.

    The words of README.md stay; what its YAML says of an adapter becomes what holds for a whole model. `name` is the
    whole model's.

    Raises:
        ConfigError: as `write_card`, or the record cannot be read.
    """
    for carried in (LEDGER_NAME, "README.md"):
        if (source / carried).is_file():
            durable.replace(target / carried, (source / carried).read_bytes())
    readme = target / "README.md"
    durable.replace(readme, of_a_whole_model(read_readme(readme)).encode())
    write_card(target, Record.of(read_record(source)), name=name)


def further_bounds(segments: Sequence[Segment], delta: float) -> Bounds:
    """Epsilon of these steps at several deltas, and the best attacker's limits."""
    curve = tradeoff(segments, delta)
    return _epsilon_at(delta, lambda d: accounting.spent(segments, d).epsilon), _recorded(curve)


def bounds_of_selection(selected: Selection, delta: float) -> Bounds:
    """Epsilon at several deltas and the best attacker's limits for the run that a selection kept."""
    top = selection.spent(selected, delta)
    curve = tradeoff_below(top, delta, lambda epsilons: selection.deltas(selected, epsilons))
    return _epsilon_at(delta, lambda d: selection.spent(selected, d)), _recorded(curve)


def _epsilon_at(delta: float, epsilon_of: Callable[[float], float]) -> tuple[EpsilonAt, ...]:
    """Epsilon at delta and at a tenth, a hundredth and a thousandth of it, where an accountant has an answer."""
    found = []
    for divisor in (1, 10, 100, 1000):
        if delta / divisor >= MIN_DELTA:
            with suppress(AccountingError):
                found.append(EpsilonAt(delta / divisor, epsilon_of(delta / divisor)))
    return tuple(found)


def _recorded(curve: Tradeoff) -> TradeoffCurve:
    return TradeoffCurve(curve.advantage, RATES, curve.true_positive_rates)


def _accountant(noises: Sequence[str], unit: str) -> Accountant:
    version = library_versions(["dp-accounting"]).get("dp-accounting", "unknown")
    return Accountant("dp-accounting", version, epsilon_is(noises, unit))


def _mechanism(m: Mechanism) -> RecordedMechanism:
    words = kind_of([m.noise])
    return RecordedMechanism(
        name=words["name"],
        num_examples=m.num_examples,
        num_examples_is_public=True,
        expected_batch_size=m.expected_batch_size,
        clip_norm=m.clip_norm,
        clipping="Euclidean norm of each example's whole gradient",
        sampler=sampler(m.unit, m.records_per_unit),
        released=released(m.loss_bound),
        loss_bound=m.loss_bound,
        sensitivity=m.sensitivity,
        noise=words["noise"],
        generator=m.generator,
        noise_generator=GENERATORS[m.generator],
        noise_precision=words["noise_precision"],
        sample_rate=m.sample_rate,
        joint_noise_multiplier=m.joint_noise_multiplier,
        target_epsilon=m.target_epsilon,
        num_steps_planned=m.num_steps,
        records_per_unit=m.records_per_unit,
        contribution_bound=m.contribution_bound,
        levels=_levels(m),
    )


def _levels(m: Mechanism) -> tuple[RecordedLevel, ...]:
    starts = accumulate((level.num_steps for level in m.levels), initial=0)
    return tuple(
        RecordedLevel(
            num_steps=level.num_steps,
            sample_rate=settings.sample_rate,
            joint_noise_multiplier=settings.joint_noise_multiplier,
            clip_norm=settings.clip_norm,
            expected_batch_size=settings.expected_batch_size,
        )
        for level, settings in zip(m.levels, map(m.at, starts), strict=False)
    )


def _check_same_run(mechanism: Mechanism, header: LedgerHeader) -> None:
    different = [
        f"{name} is {getattr(header, name)!r} in the ledger and {getattr(mechanism, name)!r} in the run"
        for name in ("num_examples", "unit", "relation", "delta")
        if getattr(header, name) != getattr(mechanism, name)
    ]
    if different:
        raise LedgerError(f"the ledger is of another run: {'; '.join(different)}. No card is written from it.")


def _reason_against(mechanism: Mechanism, ledger: LedgerRecord) -> str | None:
    """Why nothing may be claimed, or None."""
    if mechanism.debug or ledger.header.debug:
        return "a fixed debugging seed made sampling and noise predictable"
    charged = [s.joint_noise_multiplier for s in ledger.executed if s.num_steps]
    if 0 in (charged or [mechanism.joint_noise_multiplier]):
        return "no noise was added (noise_multiplier is 0)"
    return None
