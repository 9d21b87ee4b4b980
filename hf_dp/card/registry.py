"""A `Record` and the card -> a draft entry for the OpenDP registry of deployments of differential privacy.

The form is that of https://github.com/opendp/deployments-registry-data (`schemas/deployments-schema.yaml`, tier 3).
What only people know is left to be filled in, and says so.
"""

import datetime
from collections.abc import Mapping

import yaml

from hf_dp.card.claims import claims
from hf_dp.card.readme import yaml_of
from hf_dp.card.record import Record
from hf_dp.card.words import counted, rounded_up, units
from hf_dp.errors import ConfigError
from hf_dp.mechanism import DISCRETE

REGISTRY = "dp_registry.yaml"
TO_FILL_IN = "TO BE FILLED IN"


class _Literal(yaml.SafeDumper):
    """Texts of several lines as blocks, which keep their lines."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Literal.add_representer(str, _text)


def registry_entry(record: Record, card: str, name: str) -> str:
    """The entry as YAML.

    Args:
        record: of the training.
        card: the text of README.md, whose YAML names base and task.
        name: of the model.

    Raises:
        ConfigError: nothing may be claimed of this model, or the card's YAML cannot be read.
    """
    if not record.private:
        raise ConfigError(f"an entry of the registry states a guarantee, and this model has none: {record.reason}")
    entry = {"url_slug": name.lower().replace("/", "-"), "status": "Draft", "tier": 3}
    deployment = {
        "basic": _basic(record, yaml_of(card), name),
        **_guarantee(record),
        **_how(record),
        "administrative": {"registry_authors": [TO_FILL_IN]},
    }
    return yaml.dump({**entry, "deployment": deployment}, Dumper=_Literal, sort_keys=False, width=10_000)


def _basic(record: Record, front: Mapping[str, object], name: str) -> dict[str, object]:
    task, base = front.get("pipeline_tag"), front.get("base_model")
    what = f" for {task}" if task else ""
    return {
        "name": name,
        "data_curators": [f"{TO_FILL_IN}: who trained and publishes the model"],
        "intended_use": f"{TO_FILL_IN}: what the model is for",
        "data_product_type": "Machine learning model",
        "data_product_region": f"{TO_FILL_IN}: the region that the data describe, or whose laws apply",
        "description": f"A model{what}, fine-tuned{f' from {base}' if base else ''} by DP-SGD on "
        f"{record.mechanism.num_examples:,} {counted(record.unit)}. {TO_FILL_IN}: what they are.",
        "publication_date": datetime.date.today().isoformat(),
    }


def _guarantee(record: Record) -> dict[str, object]:
    plural = counted(record.unit)
    return {
        "dp_variant": {
            "variant_name": "Approximate DP",
            "data_domain": f"Lists of {record.mechanism.num_examples:,} training {plural}. {TO_FILL_IN}: what a "
            f"{record.unit} is.",
            "unprotected_quantities": _list([f"The number of training {plural}.", *record.not_covered]),
        },
        "privacy_loss": {
            "privacy_unit": f"One {record.unit} of the training data",
            "privacy_unit_details": f"Two data sets are adjacent if one is the other with one {record.unit} replaced "
            f"by an empty one ({record.relation}). The number of {plural} is public.",
            "privacy_parameters": {"epsilon": rounded_up(record.epsilon, digits=4), "delta": record.delta},
            "privacy_parameters_details": f"{record.accountant.name} {record.accountant.version}: "
            f"{record.accountant.epsilon_is}.",
        },
    }


def _how(record: Record) -> dict[str, object]:
    answers, plural = claims(record), units(record.unit)
    arithmetic = "whole numbers" if all(s.noise == DISCRETE for s in record.segments) else "floating point"
    versions = ", ".join(f"{library} {version}" for library, version in record.libraries.items())
    return {
        "deployment_model": {
            "model_name": "Central",
            "actors": _list([answers["trust model"], f"Side channels and access: {answers['outside the guarantee']}"]),
            "release_type": "One release",
            "release_type_details": f"{answers['release']} {TO_FILL_IN}: whether the {plural} will be used again.",
            "data_source_type": "Static",
            "access_type": "Non-interactive",
        },
        "accounting": {"post_processing": " ".join(record.covered), "composition": answers["composition"]},
        "implementation": {
            "preprocessing_and_hyperparameter_tuning": answers["tuning and preparation"],
            "mechanisms": _list(
                [
                    f"{record.mechanism.name}: sample rate {record.mechanism.sample_rate:.6g}, {record.num_steps:,} "
                    f"steps, noise multiplier {record.mechanism.joint_noise_multiplier:.6g}, clipping bound "
                    f"{record.mechanism.clip_norm:.6g}; {record.mechanism.sampler}.",
                    f"Noise: {record.mechanism.noise}; {record.mechanism.noise_generator}; added in {arithmetic}.",
                    f"Libraries: {versions}.",
                ]
            ),
            "justification": _list([*record.assumptions, f"{TO_FILL_IN}: why this epsilon."]),
        },
    }


def _list(sentences: list[str]) -> str:
    return "".join(f"- {sentence}\n" for sentence in sentences)
