"""A trainer's callbacks -> those that decide by numbers on evaluation data: refused unless these were declared public.

Found in two ways: by what their code names, before the first step; and by what has changed when an evaluation is over.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from hf_dp.errors import UnsupportedOptionError

READS = {
    "log_history",
    "best_metric",
    "evaluate",
    "predict",
    "metrics",
}  # exact numbers, by the names that Trainer has for them
STOPS = {"should_training_stop", "should_epoch_stop"}
REMEDY = (
    "what is kept, or when training ends, would follow exact numbers on data that nobody declared public: declare the "
    "evaluation data public with PrivacyConfig(public_eval=True), or leave it out and train the planned steps"
)


def deciders(callbacks: Iterable[Any]) -> Iterator[str]:
    """The callbacks, instances or classes, that stop training and read metrics; those of transformers' early stopping
    first of all.
    """
    for callback in callbacks:
        kind = callback if isinstance(callback, type) else type(callback)
        if issubclass(kind, EarlyStoppingCallback) or (_names(kind) & STOPS and _names(kind) & READS):
            yield f"callback {kind.__name__}: {REMEDY}"


def refuse_deciders(callbacks: Iterable[Any], *, public_eval: bool) -> None:
    """Before they are asked anything.

    Raises:
        UnsupportedOptionError: naming all that decide by evaluation data that were not declared public.
    """
    if not public_eval and (found := list(deciders(callbacks))):
        raise UnsupportedOptionError("cannot be combined with differential privacy: " + "; ".join(found))


@contextmanager
def nothing_decided(trainer: Any) -> Iterator[None]:
    """Around an evaluation in a training, on data not declared public: afterwards training goes on just as it would
    have.

    Raises:
        UnsupportedOptionError: a callback stopped training, asked for a checkpoint, or changed a learning rate.
    """
    before = _course(trainer)
    yield
    if trainer.is_in_train and (changed := [name for name, value in _course(trainer).items() if value != before[name]]):
        raise UnsupportedOptionError(f"a callback changed {', '.join(changed)} in an evaluation: {REMEDY}")


def _course(trainer: Any) -> dict[str, Any]:
    control, optimizer = trainer.control, trainer.optimizer
    return {
        **{name: getattr(control, name) for name in ("should_training_stop", "should_epoch_stop", "should_save")},
        "max_steps": trainer.state.max_steps,
        "the learning rate": [] if optimizer is None else [group.get("lr") for group in optimizer.param_groups],
    }


def _names(kind: type) -> set[str]:
    """What the class's own methods name: attributes, variables and arguments, those of functions within them too."""
    own = [k for k in kind.__mro__ if issubclass(k, TrainerCallback) and not k.__module__.startswith("transformers.")]
    codes = [value.__code__ for k in own for value in vars(k).values() if callable(value) and _has_code(value)]
    found: set[str] = set()
    while codes:
        code = codes.pop()
        found |= {*code.co_names, *code.co_varnames, *code.co_freevars}
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return found


def _has_code(value: Any) -> bool:
    return isinstance(getattr(value, "__code__", None), CodeType)
