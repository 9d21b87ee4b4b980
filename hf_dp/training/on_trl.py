"""trl's trainers, made private: supervised fine-tuning, and preferences, where the pair of two answers is clipped as
one.

Each is used as trl's own, with `privacy=`. It needs the package trl.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import TrainingArguments
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from hf_dp.mechanism import PAIR
from hf_dp.per_example import IGNORED, OVER_VOCABULARY, Batch, Record, as_rows, preferences
from hf_dp.training.trainer import DPTrainerMixin

CHOSEN_AND_REJECTED = 2  # rows of a pair
REFERENCE = "ref"  # trl's name for a frozen copy of an adapter that it was given
OF_A_BATCH = {  # loss_type of DPOConfig -> what it does with the pairs of a batch
    "aot": "it sorts the log-ratios of a batch",
    "aot_unpaired": "it sorts the log-ratios of a batch",
    "sft": "it is a mean over the tokens of a batch",
}


class DPSFTTrainer(DPTrainerMixin, SFTTrainer):  # type: ignore[misc]
    """`trl.SFTTrainer` with differential privacy; see `DPTrainerMixin` for what it takes besides.

    What is trained is the mean cross entropy over a record's own targets: its text, completion or assistant's turns, as
    trl's settings choose them. Packing, and batches without padding, are refused.
    """

    config_class = SFTConfig


class DPDPOTrainer(DPTrainerMixin, DPOTrainer):  # type: ignore[misc]
    """`trl.DPOTrainer` with differential privacy; see `DPTrainerMixin` for what it takes besides.

    A record is a pair: the gradient of its loss goes over both answers, and is clipped as one. Each `loss_type` that is
    a function of one pair is trained; those of a whole batch are refused. The reference is the model without its
    adapter, `ref_model`, or log-probabilities computed beforehand (`precompute_ref_log_probs=True`).
    """

    config_class = DPOConfig
    unit_rows, row = CHOSEN_AND_REJECTED, PAIR

    @classmethod
    def unfit_settings(cls, args: TrainingArguments) -> Iterator[str]:
        """See `DPTrainerMixin`."""
        given = vars(args)
        for name in _listed(given.get("loss_type")):
            if name in OF_A_BATCH:
                yield f"loss_type={name!r}: {OF_A_BATCH[name]}; use one that is a function of one pair, such as sigmoid"
        if given.get("sync_ref_model"):
            yield "sync_ref_model=True: the reference is not saved, and would be another one after resuming; drop it"
        if given.get("precompute_ref_log_probs") and not given.get("disable_dropout", True):
            yield (
                "precompute_ref_log_probs=True with disable_dropout=False: dropout's masks are dealt out in the order "
                "of the records; leave disable_dropout at True"
            )

    @classmethod
    def adjusted(cls, args: TrainingArguments) -> TrainingArguments:
        """Reference log-probabilities are computed pair by pair: padding to another pair's length would round them."""
        if getattr(args, "precompute_ref_log_probs", False):
            args.precompute_ref_batch_size = 1  # type: ignore[attr-defined]
        return args

    @staticmethod
    def length_of(record: Record) -> int:
        """Tokens of both rows, which are padded to the longer answer."""
        answer = max(len(record["chosen_ids"]), len(record["rejected_ids"]))
        return CHOSEN_AND_REJECTED * (len(record["prompt_ids"]) + answer)

    def host_losses(self, model: nn.Module, inputs: Batch) -> Tensor:
        """trl's loss for each pair, [U].

        Raises:
            KeyError: a setting for which it is not spelt out here; it is then trl's own, with one pair a pass.
        """
        if getattr(self, "aux_loss_enabled", False) or self.ld_alpha is not None or self.use_weighting:
            raise KeyError("router_aux_loss_coef, ld_alpha, use_weighting")
        settings = preferences.Preference(
            self.beta,
            self.label_smoothing,
            self.args.discopop_tau,
            _named(self.f_divergence_type),
            self.f_alpha_divergence_coef,
        )
        rows = as_rows(inputs)
        ratios = (self._log_probabilities(model, rows) - self._references(model, rows)).unflatten(0, (-1, 2))
        lengths = rows["completion_mask"].sum(1).clamp_min(1).unflatten(0, (-1, 2))
        pairs = preferences.Pairs(*ratios.unbind(1), *lengths.unbind(1))
        return preferences.weighted_loss(pairs, self.loss_types, self.loss_weights, settings)

    def _references(self, model: nn.Module, rows: Batch) -> Tensor:
        """Log p of each row's answer under the reference, [2 U]."""
        if self.precompute_ref_logps:
            return torch.stack([rows["ref_chosen_logps"], rows["ref_rejected_logps"]], 1).flatten()
        with torch.no_grad():
            if self.ref_model is not None:
                return self._log_probabilities(self.ref_model, rows)
            with reference_adapter(model):
                return self._log_probabilities(model, rows)

    def _log_probabilities(self, model: nn.Module, rows: Batch) -> Tensor:
        """Log p of each row's answer, [2 U]."""
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        own = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
        inputs = {name: value for name, value in rows.items() if name not in own} | {"use_cache": False}
        labels = rows["input_ids"].masked_fill(rows["completion_mask"] == 0, IGNORED)
        means = OVER_VOCABULARY["ForCausalLM"](model, base, inputs, labels, 0.0)
        return preferences.answer_log_probabilities(means, labels, rows.get("attention_mask"))


class DPRewardTrainer(DPTrainerMixin, RewardTrainer):  # type: ignore[misc]
    """`trl.RewardTrainer` with differential privacy; see `DPTrainerMixin` for what it takes besides.

    A record is a pair: the gradient of its loss goes over both answers, and is clipped as one.
    """

    config_class = RewardConfig
    unit_rows, row = CHOSEN_AND_REJECTED, PAIR

    @staticmethod
    def length_of(record: Record) -> int:
        """Tokens of both rows, which are padded to the longer answer."""
        return CHOSEN_AND_REJECTED * max(len(record["chosen_ids"]), len(record["rejected_ids"]))

    def host_losses(self, model: nn.Module, inputs: Batch) -> Tensor:
        """trl's loss for each pair, [U]."""
        rows = as_rows(inputs)
        margins = rows.pop("margin", None)
        scores = model(**rows, use_cache=False).logits.squeeze(-1).unflatten(0, (-1, 2))
        return preferences.reward_loss(scores, margins, self.args.center_rewards_coefficient or 0.0)


@contextmanager
def reference_adapter(model: nn.Module) -> Iterator[None]:
    """Within, the adapted layers compute what the reference does: with trl's frozen copy of the adapter, if there is
    one, else without adapters.

    PEFT's own way of switching also switches `requires_grad`, which a pass must not do.

    Raises:
        KeyError: the adapter is not in layers, as virtual tokens are not.
    """
    if not isinstance(model, PeftModel) or model.active_peft_config.is_prompt_learning:
        raise KeyError("no layers with adapters")
    attribute, value = (
        ("_active_adapter", [REFERENCE]) if REFERENCE in model.peft_config else ("_disable_adapters", True)
    )
    layers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    before = [dict(vars(layer)) for layer in layers]
    for layer in layers:
        vars(layer)[attribute] = value
    try:
        yield
    finally:
        for layer, held in zip(layers, before, strict=True):
            vars(layer).pop(attribute)
            if attribute in held:
                vars(layer)[attribute] = held[attribute]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _named(value: Any) -> str:
    """The name of a setting that may be an enumeration's member."""
    return str(getattr(value, "value", value))
