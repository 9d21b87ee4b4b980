"""hf_dp: fine-tune Hugging Face models with differential privacy, and an epsilon that is true.

`import hf_dp` is cheap: a name is imported from its module when it is first used.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_dp.config import AuditConfig, PrivacyConfig
    from hf_dp.errors import (
        AccountingError,
        AuditError,
        CaptureError,
        ConfigError,
        HfDpError,
        LedgerError,
        RecipeError,
        SelfCheckError,
        UnsupportedOptionError,
        UnsupportedParameterError,
    )
    from hf_dp.mechanism import Mechanism
    from hf_dp.step import PrivacySpent
    from hf_dp.training import DPSeq2SeqTrainer, DPTrainer, DPTrainerMixin, PrivateLoop, plan

__all__ = [
    "AccountingError",
    "AuditConfig",
    "AuditError",
    "CaptureError",
    "ConfigError",
    "DPSeq2SeqTrainer",
    "DPTrainer",
    "DPTrainerMixin",
    "HfDpError",
    "LedgerError",
    "Mechanism",
    "PrivacyConfig",
    "PrivacySpent",
    "PrivateLoop",
    "RecipeError",
    "SelfCheckError",
    "UnsupportedOptionError",
    "UnsupportedParameterError",
    "plan",
]

_ELSEWHERE = {
    "DPSeq2SeqTrainer": "hf_dp.training",
    "DPTrainer": "hf_dp.training",
    "DPTrainerMixin": "hf_dp.training",
    "Mechanism": "hf_dp.mechanism",
    "AuditConfig": "hf_dp.config",
    "PrivacyConfig": "hf_dp.config",
    "PrivacySpent": "hf_dp.step",
    "PrivateLoop": "hf_dp.training",
    "plan": "hf_dp.training",
}  # every other name of __all__ is an error


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("hf_dp")
    if name not in __all__:
        raise AttributeError(f"module 'hf_dp' has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE.get(name, "hf_dp.errors")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
