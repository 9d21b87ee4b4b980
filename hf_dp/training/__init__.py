"""A model, records and a `PrivacyConfig` go in; a privately trained model with its card comes out. Wiring only."""

from typing import TYPE_CHECKING, Any

from hf_dp.training.evaluation import STEPS_TAKEN
from hf_dp.training.fitted import rate_in_force
from hf_dp.training.loop import PrivateLoop, plan
from hf_dp.training.options import REFUSED, check_options
from hf_dp.training.progress import print_plan_of
from hf_dp.training.trackers import MetricsFile
from hf_dp.training.trainer import DPSeq2SeqTrainer, DPTrainer, DPTrainerMixin

if TYPE_CHECKING:
    from hf_dp.training.on_trl import DPDPOTrainer, DPRewardTrainer, DPSFTTrainer

ON_TRL = ("DPDPOTrainer", "DPRewardTrainer", "DPSFTTrainer")  # imported when they are first used

__all__ = [
    "REFUSED",
    "STEPS_TAKEN",
    "DPDPOTrainer",
    "DPRewardTrainer",
    "DPSFTTrainer",
    "DPSeq2SeqTrainer",
    "DPTrainer",
    "DPTrainerMixin",
    "MetricsFile",
    "PrivateLoop",
    "check_options",
    "plan",
    "print_plan_of",
    "rate_in_force",
]


def __getattr__(name: str) -> Any:
    if name not in ON_TRL:
        raise AttributeError(f"module 'hf_dp.training' has no attribute {name!r}")
    try:
        from hf_dp.training import on_trl
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "trl":
            raise
        raise ImportError(f"{name} needs the package trl: pip install 'hf_dp[trl]'") from error
    return getattr(on_trl, name)
