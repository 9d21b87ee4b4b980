"""A model, records and a `PrivacyConfig` go in; a privately trained model with its card comes out. Wiring only."""

from hf_dp.training.evaluation import STEPS_TAKEN
from hf_dp.training.loop import PrivateLoop, plan
from hf_dp.training.options import REFUSED, check_options
from hf_dp.training.progress import print_plan_of
from hf_dp.training.trainer import DPSeq2SeqTrainer, DPTrainer, DPTrainerMixin

__all__ = [
    "REFUSED",
    "STEPS_TAKEN",
    "DPSeq2SeqTrainer",
    "DPTrainer",
    "DPTrainerMixin",
    "PrivateLoop",
    "check_options",
    "plan",
    "print_plan_of",
]
