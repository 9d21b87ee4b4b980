"""Model, optimizer, loss and a plan -> private steps of an ordinary PyTorch loop on any `nn.Module`, without Trainer.

`PrivateLoop.draws` yields Poisson draws, `backward` takes the place of `loss.backward()`, and the optimizer steps as
usual. What is done in the wrong order (a step without a release, two releases in one step, gradients from elsewhere) is
an error before the weights change.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import default_collate

from hf_dp import accounting
from hf_dp.config import PrivacyConfig
from hf_dp.errors import CaptureError, ConfigError, ReleaseError
from hf_dp.mechanism import Mechanism
from hf_dp.per_example import (
    Batch,
    MicroBatch,
    Reads,
    Record,
    State,
    has_changed,
    hooks_in,
    per_example_factors,
    reads_of_code,
    records_of_the_same_shape,
    self_check,
)
from hf_dp.randomness import require_cryptography
from hf_dp.sampling import (
    DRAW_NUMBER,
    FAILURE,
    Collate,
    Collation,
    Draw,
    DrawnRecords,
    LogicalBatchCollator,
    PoissonSampler,
    Records,
    Seals,
    code_of,
    micro_batches,
    refuse_data_that_remember,
    taken_by_the_model,
    tokens_of_a_pass,
)
from hf_dp.step import (
    Passes,
    Place,
    PrivacySpent,
    PrivateRun,
    PrivateStep,
    Session,
    WeightGuard,
    coarse_products,
    foreign_parameters,
)
from hf_dp.training import earlier
from hf_dp.training.cards import write_card
from hf_dp.training.passes import (
    COUPLED,
    Subject,
    are_coupled,
    compared_lengths,
    examined,
    written_by,
)
from hf_dp.training.settled import refuse_other_passes

BACKWARD, STEP = "loop.backward(draw)", "optimizer.step()"  # what a draw may wait for


def plan(privacy: PrivacyConfig, num_examples: int, *, num_train_epochs: float, max_steps: int = -1) -> Mechanism:
    """The mechanism of a loop over `num_examples` records, with sigma calibrated if a target epsilon is given.

    It is what `accounting.plan_mechanism` makes of the settings.

    Raises:
        ConfigError: settings that do not fit the data; a `budget_file` or a `unit_column`, which loops do not support.
        AccountingError: a target out of reach.
    """
    for name, value in (("budget_file", privacy.budget_file), ("unit_column", privacy.unit_column)):
        if value is not None:
            raise ConfigError(f"a PrivateLoop takes no {name}: leave it out, or use DPTrainer")
    return accounting.plan_mechanism(privacy, num_examples, num_train_epochs=num_train_epochs, max_steps=max_steps)


class PrivateLoop:
    """One private training in a loop of your own:

        for draw in loop.draws(data):
            loop.backward(draw)
            optimizer.step()

    Guarantee: that of `mechanism`, for the weights that the optimizer leaves, as long as nothing else computes weights
    from the records. A loop runs in one process and does not resume. Another training on the same records adds to what
    was spent.

    Args:
        model: parameters with `requires_grad` are trained, all of them by `optimizer`. Every pass is in training mode.
        optimizer: a torch optimizer whose `step` takes no closure. From now on it steps only on what this loop
            released.
        example_losses: (model, batch) -> one loss an example, [B], each a function of its example alone. The batch is
            what `collate` makes of records: a mapping, or a tuple, of tensors with one row an example.
        mechanism: from `hf_dp.plan(PrivacyConfig(...), num_examples, num_train_epochs=...)`.
        output_dir: where the ledger is kept; each training needs a folder of its own.

    Attributes:
        alone_because: why each example has a pass of its own, known when `draws` begins; "" if a pass may hold many.

    Raises:
        ConfigError: several processes; a mechanism that releases more than the gradient; trainable parameters that the
            optimizer does not hold, or the reverse. Names all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        example_losses: Callable[[nn.Module, Any], Tensor],
        mechanism: Mechanism,
        output_dir: str | Path,
    ) -> None:
        wrong = [*_wrong_setting(mechanism), *_wrong_parameters(model, optimizer)]
        if wrong:
            raise ConfigError("PrivateLoop: " + "; ".join(wrong) + ".")
        self.model = model
        if mechanism.generator == "chacha20":
            require_cryptography()
        self.mechanism = mechanism
        self._example_losses = example_losses
        self._device = next(model.parameters()).device
        self._place = Place(Path(output_dir))
        self._run: PrivateRun | None = None
        self._draw: Draw[MicroBatch] | None = None
        self._yielded = Seals(())
        self._failure: str | None = None
        self.alone_because = ""
        self._step = PrivateStep(model, mechanism, Passes(self._losses, self._device, self._on_device))
        self._examine: Callable[[], Collation]
        self._code: dict[str, object] = {}  # a user's, that is called in a step
        self._read: Reads = {}
        self._examined = State(model)
        self._waits = False  # whether the draw under way still waits for `backward`
        self._guard = WeightGuard()
        self._guard.watch(model, optimizer)

    def draws(
        self,
        dataset: Records,
        *,
        collate: Collate = default_collate,
        max_examples: int = 256,
        check_records: list[Record] | None = None,
    ) -> Iterator[Draw[MicroBatch]]:
        """T draws, or fewer if one more would exceed the target epsilon.

        Each keeps every record independently with probability q; it may be empty. First come the inventory and the
        self-check, on made-up records; then the ledger is opened.

        Args:
            dataset: with `len` and integer indices; it has as many records as the mechanism was planned for.
            collate: records -> a batch with one row a record. It is given one record at a time, unless it is torch's
                `default_collate`.
            max_examples: the most records of one pass. It affects memory and speed, never the result.
            check_records: a few public records for the self-check; without them they have the first record's shapes.

        Raises:
            ConfigError: another number of records than planned, records that cannot be made up, what comes out
                otherwise each time it is read or collated, or a budget that is spent.
            UnsupportedParameterError: trainable parameters without an exact per-example rule; names all of them.
            SelfCheckError: something couples the examples of a batch.
            LedgerError: `output_dir` holds the ledger of another training.
            ReleaseError: the last draw still lacks its release or its step.
        """
        m = self.mechanism
        if len(dataset) != m.num_examples:
            raise ConfigError(
                f"expected the {m.num_examples:,} records of the plan, got {len(dataset):,}: plan with N of these"
            )
        self._examine = partial(self._checked_with, dataset, collate, max_examples, check_records)
        collation = self._examine()
        earlier.refuse_again(self.model, self._place.folder, dataset, m)
        begun = earlier.weights_of(self.model)
        run = PrivateRun.open(m, self._place, Session(dataset, continues=self._run is not None))
        self._run = run
        try:
            records = DrawnRecords(dataset, m.num_examples)
            rate = lambda number: run.at(number).sample_rate  # noqa: E731  # each level of a schedule has its own
            size = 1 if self.alone_because else max_examples
            cut = LogicalBatchCollator(collation, size, pass_cost=tokens_of_a_pass(self._device))
            for kept in PoissonSampler(m.num_examples, rate, m.num_steps, key=run.sampling_key):
                container = cut(records.__getitems__(kept))
                self._failure = container.get(FAILURE)
                batches = [] if self._failure else list(micro_batches(container))
                self._draw, self._waits = Draw(batches, container[DRAW_NUMBER]), True
                self._yielded = Seals.of(batches, [batch.size for batch in batches])
                yield self._draw
                if waits_for := self._waits_for():
                    raise ReleaseError(f"draw {self._draw.number} is over without {waits_for}: each takes one, once")
                self._guard.check()
                if run.exhausted:
                    return
        finally:
            self._draw, self._waits = None, False
            run.close()
            earlier.note(self.model, begun, self._place.folder, run.spent(), m, dataset)

    def backward(self, draw: Draw[MicroBatch]) -> None:
        """Writes p.grad = (clipped sum + noise) / B for every trainable parameter. The step is charged first, on disk.

        Whatever was in `p.grad` before is replaced.

        Raises:
            ReleaseError: not the draw that `draws` yielded last, or a second time. Nothing is charged or released.
            CaptureError: not one loss an example, or micro-batches that are not those that were drawn, as they were.
                Charged; nothing is released.
        """
        if self._run is None or draw is not self._draw or not self._waits:
            raise ReleaseError(
                "backward takes the draw that draws() yielded last, once (that one waits for "
                f"{self._waits_for() or 'nothing'}): two releases of one draw cost more than two charges say"
            )
        self._guard.before_pass()
        self._check_again_if_changed()
        self._step(self._run, lambda: self._checked(draw), draw.number)
        self._guard.released()
        self._waits = False

    def privacy_spent(self) -> PrivacySpent:
        """(epsilon, delta) that is claimed of the training so far; 0 before the first draw."""
        return PrivacySpent(0.0, self.mechanism.delta, 0) if self._run is None else self._run.spent()

    def write_card(self, folder: str | Path, *, public_eval: bool = False) -> None:
        """Writes the privacy section of `folder`/README.md, and privacy.json beside it, from what was charged.

        Args:
            folder: made if it is missing.
            public_eval: declares that the data of any evaluation reported beside them are public.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        if self._run is not None:
            write_card(self._run, Path(folder), public_eval=public_eval)

    # ---- parts -----------------------------------------------------------------------------------------------------

    def _losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._example_losses(model, tuple(batch.values()) if all(k.isdigit() for k in batch) else batch)

    def _checked_with(
        self, dataset: Records, collate: Collate, max_examples: int, check_records: list[Record] | None
    ) -> Collation:
        """How records are collated, after all that a step calls was examined."""
        self._code = {"the loss": self._example_losses, "collate": collate, "the data set": code_of(dataset)}
        refuse_data_that_remember(dataset, collate)
        collation = Collation(
            collate, records_of_the_same_shape(dataset[0]) if check_records is None else check_records
        )
        self._check(collation, max_examples)
        return collation

    def _check(self, collation: Collation, max_examples: int) -> None:
        """Inventory, proof and self-check; decides whether each example has a pass of its own."""
        self.model.train()
        subject = Subject(
            self.model, self._losses, collation, collation.tried, self._on_device, code=self._example_losses
        )
        with taken_by_the_model():
            rows, reason = examined(subject, "noise='discrete'" if self.mechanism.is_discrete else "")
            batches = subject.batches(collation.tried)
            factors_of = partial(per_example_factors, forms=rows.forms)
            what = self.model, batches, self._losses, self.mechanism.clip_norm, factors_of
            self_check(*what, one_a_pass=bool(reason))
            if not reason and are_coupled(subject, rows, batches, max_examples):
                reason = COUPLED
        copied = written_by(self.model, self._losses, batches[1]) if reason else ()
        compared = None if reason else compared_lengths(subject, rows)
        passes = Passes(
            self._losses,
            self._device,
            self._on_device,
            factors_of=factors_of,
            alone=bool(reason),
            copied=copied,
            compared=compared,
            collated_alone=collation.alone,
        )
        self._step, self.alone_because = PrivateStep(self.model, self.mechanism, passes), reason
        self._examined, self._read = State(self.model), self._reads()

    def _reads(self) -> Reads:
        """What the user's code in a step reads besides its arguments."""
        return reads_of_code(self._code, self.model)

    def _check_again_if_changed(self) -> None:
        """What was changed of the model since it was examined, but for its parameters' values, is examined anew."""
        self.model.train()
        self._examined.begin()
        if self._examined.changes() or has_changed(self._read, self._reads()):
            before = self.alone_because
            self._examine()
            refuse_other_passes(before, self.alone_because)

    def _on_device(self, batch: Batch) -> Batch:
        return cast(Batch, send_to_device(batch, self._device))

    def _checked(self, draw: Draw[MicroBatch]) -> Draw[MicroBatch]:
        """The draw, after checking that its records could be collated and are all there."""
        if self._failure is not None:
            raise CaptureError(self._failure)
        sizes = [batch.size if isinstance(batch, MicroBatch) else 0 for batch in draw]
        self._yielded.refuse_others(
            draw,
            sizes,
            "Change records in collate, which is given each by itself; backward brings micro-batches to the model's "
            "device",
        )
        return draw

    def _waits_for(self) -> str | None:
        return BACKWARD if self._waits else STEP if self._guard.waiting else None


def _wrong_setting(m: Mechanism) -> Iterator[str]:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        yield f"a loop runs in one process, found {dist.get_world_size()}: use DPTrainer"
    if m.loss_bound is not None:
        yield "log_loss_up_to releases more than the gradient: leave it out, or use DPTrainer"
    yield from coarse_products()
    if m.debug:
        yield "debug_seed is for tests of DPTrainer: leave it out"


def _wrong_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    held = {p for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
    trainable = {p: name for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for p, name in trainable.items() if p not in held]
    if not trainable:
        yield "the model has no trainable parameter"
    if missing:
        yield (
            f"the optimizer does not hold {', '.join(missing)}: freeze them (requires_grad_(False)), or give them to it"
        )
    yield from foreign_parameters(model, optimizer)
    if hooked := list(hooks_in(model)):
        yield f"hooks on gradients of {', '.join(hooked)}, which would not run: remove them"
