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
    from hf_dp.training import DPDPOTrainer as DPDPOTrainer
    from hf_dp.training import DPRewardTrainer as DPRewardTrainer
    from hf_dp.training import DPSeq2SeqTrainer, DPTrainer, DPTrainerMixin, PrivateLoop, plan
    from hf_dp.training import DPSFTTrainer as DPSFTTrainer

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

_ON_TRL = ("DPDPOTrainer", "DPRewardTrainer", "DPSFTTrainer")  # not in __all__, which is there without trl
_ELSEWHERE = {
    **dict.fromkeys(_ON_TRL, "hf_dp.training"),
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
    if name not in (*__all__, *_ON_TRL):
        raise AttributeError(f"module 'hf_dp' has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE.get(name, "hf_dp.errors")), name)


def __dir__() -> list[str]:
    return [*__all__, *_ON_TRL, "__version__"]
