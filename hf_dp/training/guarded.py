"""The seams of a Trainer at which its weights are compared with what was released, and at which training must end."""

from typing import TYPE_CHECKING, Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import Trainer

from hf_dp.config import PrivacyConfig
from hf_dp.step import PrivateRun, WeightGuard, refuse_foreign_parameters
from hf_dp.training.deciders import refuse_deciders
from hf_dp.training.overrides import refuse_replaced

if TYPE_CHECKING:
    _Host = Trainer  # what a mixin may count on
else:
    _Host = object


class GuardedWeights(_Host):
    """The part of `DPTrainerMixin` that guards the weights."""

    privacy: PrivacyConfig
    model: Any  # always there once the host is built
    optimizer: Any
    _guard: WeightGuard
    _run: PrivateRun | None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; first checks that only released gradients have changed the weights."""
        self._guard.check()
        super().save_model(output_dir, _internal_call=_internal_call)

    def _refuse_side_doors(self) -> None:
        """Before training: refuses optimizers that hold more than the model, callbacks that follow private data, and
        methods replaced in vain.
        """
        refuse_replaced(self)
        refuse_deciders(self.callback_handler.callbacks, public_eval=self.privacy.public_eval)
        refuse_foreign_parameters(self.model, torch_optimizer(self.create_optimizer()))

    def _begin_pass(self) -> None:
        self._guard.watch(self.model, torch_optimizer(self.optimizer))
        self._guard.before_pass()

    def _before_evaluation(self) -> None:
        self._guard.before_evaluation()

    def _load_best_model(self) -> None:
        self._guard.check()
        self._guard.leave()  # no step follows, and the weights that are loaded were saved between two steps
        super()._load_best_model()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's; afterwards an exhausted budget ends the training, whatever callbacks say."""
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._run is not None and self._run.exhausted:
            self.control.should_training_stop = True


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside of Accelerate's wrapper: the wrapper calls its step, and step hooks are registered on it."""
    inner: torch.optim.Optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    return inner
