"""A trainer's callbacks -> those that decide by numbers on evaluation data. They are refused unless it is declared
public.

They are found in two ways: before the first step by the names in their code, and after each evaluation by what has
changed in the course of the training.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import TypeAlias

from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from hf_dp.errors import UnsupportedOptionError

Callback: TypeAlias = TrainerCallback | type[TrainerCallback]
READS = {"log_history", "best_metric", "evaluate", "predict", "metrics"}  # Trainer's names for exact numbers
STOPS = {"should_training_stop", "should_epoch_stop"}
REMEDY = (
    "what is kept, or when training ends, would follow exact numbers on data that nobody declared public: declare the "
    "evaluation data public with PrivacyConfig(public_eval=True), or leave it out and train the planned steps"
)


def deciders(callbacks: Iterable[Callback]) -> Iterator[str]:
    """Each callback, instance or class, that stops training and reads metrics, as transformers' early stopping does."""
    for callback in callbacks:
        kind = callback if isinstance(callback, type) else type(callback)
        names = _names(kind)
        reads = any(name in READS or _is_a_score(name) for name in names)
        if issubclass(kind, EarlyStoppingCallback) or (names & STOPS and reads):
            yield f"callback {kind.__name__}: {REMEDY}"


def refuse_deciders(callbacks: Iterable[Callback], *, public_eval: bool) -> None:
    """To be called before any callback is asked anything.

    Raises:
        UnsupportedOptionError: naming all callbacks that decide by evaluation data, unless that was declared public.
    """
    if not public_eval and (found := list(deciders(callbacks))):
        raise UnsupportedOptionError("cannot be combined with differential privacy: " + "; ".join(found))


@contextmanager
def nothing_decided(trainer: Trainer) -> Iterator[None]:
    """Around an evaluation during training, on data not declared public: it must not change the course of the training.

    Raises:
        UnsupportedOptionError: a callback stopped training, asked for a checkpoint, or changed a learning rate.
    """
    before = _course(trainer)
    yield
    if trainer.is_in_train and (changed := [name for name, value in _course(trainer).items() if value != before[name]]):
        raise UnsupportedOptionError(f"a callback changed {', '.join(changed)} in an evaluation: {REMEDY}")


def _course(trainer: Trainer) -> dict[str, object]:
    """What a callback may change to decide something: whether training stops or saves, its length, learning rates."""
    control, optimizer = trainer.control, trainer.optimizer
    return {
        **{name: getattr(control, name) for name in ("should_training_stop", "should_epoch_stop", "should_save")},
        "max_steps": trainer.state.max_steps,
        "the learning rate": [] if optimizer is None else [group.get("lr") for group in optimizer.param_groups],
    }


def _is_a_score(name: str) -> bool:
    """Whether a text is the name of a number of an evaluation in Trainer's logs."""
    return name.startswith("eval_") and name not in ("eval_dataset", "eval_dataloader", "eval_steps", "eval_strategy")


def _names(kind: type) -> set[str]:
    """All names and texts in the code of the class's own methods, and in functions defined inside of them."""
    own = [k for k in kind.__mro__ if issubclass(k, TrainerCallback) and not k.__module__.startswith("transformers.")]
    codes = [value.__code__ for k in own for value in vars(k).values() if callable(value) and _has_code(value)]
    found: set[str] = set()
    while codes:
        code = codes.pop()
        found |= {*code.co_names, *code.co_varnames, *code.co_freevars}
        found |= {constant for constant in code.co_consts if isinstance(constant, str)}
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return found


def _has_code(value: object) -> bool:
    return isinstance(getattr(value, "__code__", None), CodeType)
