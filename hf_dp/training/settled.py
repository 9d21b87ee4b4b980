"""A trainer's loss and passes, found once -> found again wherever what they rest on has changed since."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from torch.nn.modules import module as torch_module
from transformers import Trainer, TrainerCallback

from hf_dp.errors import ConfigError, SelfCheckError
from hf_dp.mechanism import Mechanism
from hf_dp.per_example import Inventory, Reads, Report, State, has_changed, reads_of_code
from hf_dp.sampling import code_of, refuse_data_that_remember
from hf_dp.step import Passes, PrivateStep
from hf_dp.training import objective as objectives
from hf_dp.training.host import Objective, PrivateTrainer
from hf_dp.training.options import refuse_arguments
from hf_dp.training.passes import inventory_and_reason, users_losses
from hf_dp.training.planning import passes_for

if TYPE_CHECKING:
    _Host = Trainer  # what a mixin may count on
else:
    _Host = object


_GLOBAL_HOOKS = (  # of all modules
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


class Settled:
    """What the findings about a trainer depend on, noted when this is made: model state, loss, records and options."""

    def __init__(self, trainer: PrivateTrainer) -> None:
        self._objects, self._settings, self._state = _objects(trainer), _settings(trainer), State(trainer.model)
        self._read = reads_of(trainer)

    def note_model(self, trainer: PrivateTrainer) -> None:
        """Notes the model's state anew, after the host has prepared it, which sets hooks and wraps `forward`."""
        trainer.model.train()  # as in each step; else the mode alone would look like a change
        self._state = State(trainer.model)

    def holds(self, trainer: PrivateTrainer, *, stepped: bool = False) -> bool:
        """Whether all of it is as it was; where the weights were stepped since, but for the parameters' values."""
        if stepped:
            self._state.begin()
        same_objects = all(a is b for a, b in zip(self._objects, _objects(trainer), strict=True))
        if not same_objects or self._settings != _settings(trainer) or has_changed(self._read, reads_of(trainer)):
            return False
        return not self._state.changes()


class FirstCallback(TrainerCallback):
    """Goes before the user's callbacks: calls back when a training begins, after the host has prepared the model."""

    def __init__(self, begun: Callable[[], None]) -> None:
        self._begun = begun

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        """Called by the host before the first step."""
        self._begun()


class SettledPasses(_Host):
    """The part of `DPTrainerMixin` that finds which loss is trained, and how its passes are made."""

    objective: Objective
    private_step: PrivateStep
    step_class: type[PrivateStep]
    alone_because: str
    model: Any  # always there once the host is built
    _inventory: Inventory
    _planned_for: dict[str, object]
    _settled: Settled | None
    _learnt: Any

    if TYPE_CHECKING:

        def self_check(self) -> Report: ...  # noqa: D102
        def _planned(self) -> Mechanism: ...
        def _passes(self) -> Passes: ...

    def _settle(self) -> None:
        """Finds which loss is trained and the passes that it takes: at construction, and again where what they rest on
        changed.

        Raises:
            ConfigError: the plan is of other records, or of other settings; or as the constructor.
        """
        trainer = cast(PrivateTrainer, self)
        _refuse_other_inputs(self._planned_for, plan_inputs(trainer))
        if self._settled is not None and self._settled.holds(trainer):
            return
        refuse_arguments(self.args, public_eval=trainer.privacy.public_eval)
        refuse_data_that_remember(trainer._columns_for_model()[0], self.data_collator)
        self._learnt = None  # of the collator
        self.objective, self.alone_because = objectives.choose(trainer), ""
        self._inventory, self.alone_because = inventory_and_reason(trainer)
        self._factors_of = passes_for(self.model, self._inventory, self.args, alone_because=self.alone_because)
        before, made = vars(self).get("private_step"), self.step_class(self.model, self._planned(), self._passes())
        self.private_step = made.in_the_room_of(before)
        self._settled = Settled(trainer)

    def _settle_again_if_changed(self) -> None:
        """At the start of a step: what a callback, an evaluation or the user's code changed since is examined anew.

        Raises:
            HfDpError: as at construction and at the start of a training; or each example needs a pass of its own now.
        """
        self.model.train()
        trainer = cast(PrivateTrainer, self)
        if not cast(Settled, self._settled).holds(trainer, stepped=True):
            before = self.alone_because
            self._settle()
            self.self_check()
            refuse_other_passes(before, self.alone_because)


def refuse_other_passes(before: str, now: str) -> None:
    """Refuses a change during a training after which passes over several examples are no longer right.

    Args:
        before: why each example had a pass of its own when the training began; "" for passes over several.
        now: why it needs one now.

    Raises:
        SelfCheckError: it needs one now, and did not before. Nothing was released of this step.
    """
    if now and not before:
        raise SelfCheckError(
            "the model, its loss or an option was changed during training, and examples may no longer share a pass "
            f"({now}): change it before training"
        )


def plan_inputs(trainer: PrivateTrainer) -> dict[str, object]:
    """What the plan was made of, by the names that a user knows it by."""
    return {"train_dataset": trainer.train_dataset, "privacy": trainer.privacy}


def _refuse_other_inputs(planned: dict[str, object], now: dict[str, object]) -> None:
    others = [
        name
        for name, value in planned.items()
        if (value is not now[name] if name == "train_dataset" else value != now[name])
    ]
    if others:
        raise ConfigError(
            f"{' and '.join(others)} changed after construction: plan, epsilon, and whose each record is, were found "
            "there; make a new trainer"
        )


def reads_of(trainer: PrivateTrainer) -> Reads:
    """What the user's code in a trainer reads besides its arguments: losses, collator, data set, and the model's own
    methods.
    """
    data = {"data_collator": cast(Any, trainer).data_collator, "train_dataset": code_of(trainer.train_dataset)}
    return reads_of_code(users_losses(trainer) | data, trainer.model)


def _objects(trainer: PrivateTrainer) -> list[object]:
    names = "model data_collator train_dataset compute_loss_func class_weights _check_records".split()
    losses = [vars(trainer).get("example_losses"), vars(trainer).get("compute_loss"), type(trainer).example_losses]
    forwards = [type(module).forward for module in trainer.model.modules()]
    return [*(getattr(trainer, name) for name in names), *losses, *forwards]


def _settings(trainer: PrivateTrainer) -> tuple[object, ...]:
    return trainer.args.to_dict(), list(trainer.label_names), [len(hooks) for hooks in _GLOBAL_HOOKS]
