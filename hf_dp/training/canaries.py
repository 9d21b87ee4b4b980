"""An `AuditConfig` and a run's secret key -> canaries among its records, by fair coins; what the run reveals -> their
scores.

The m canaries are public, synthetic slots behind the N records. The mechanism has N + m units, each drawn with
q = B / (N + m), so its claim holds in an audited run as in any other. A canary whose coin says "out" keeps its slot and
contributes nothing, as its neighbour under the zero-out relation does. Coins and scores stay in memory. What the audit
reports is computed from noisy sums, or from the finished model, and from made-up canaries: no number in it was computed
on a record without noise.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_dp.audit import Counts, Floats, counted, log_likelihood_ratio
from hf_dp.config import AuditConfig, PrivacyConfig
from hf_dp.errors import AuditError, ConfigError
from hf_dp.mechanism import StepSettings
from hf_dp.per_example import IGNORED, Record, public_sizes
from hf_dp.randomness import Key, Role, keyed_stream
from hf_dp.sampling import Container, Draw, LogicalBatchCollator, Reader, Records, read_records
from hf_dp.training.host import PrivateTrainer

SLOTS = "canaries"  # key of a container: the gradient canaries that were drawn, and whose coins say "in"
LENGTH = 6  # tokens of a random-token canary
COINS, DIRECTIONS, TOKENS = range(3)  # numbers of streams under the run's key


class Slot(int):
    """A gradient canary in a draw, among the records."""


class Canaries:
    """The canaries of one trainer. Without a config there are none, and all methods do nothing.

    Attributes:
        num: m.
        included: the coins, [m]; all "out" before the first toss.
        rows: the records of token canaries, whether in or out; [] for gradient canaries.
    """

    def __init__(self, config: AuditConfig | None) -> None:
        self.config = config
        self.num = 0 if config is None else config.num_canaries
        self.included = np.zeros(self.num, dtype=bool)
        self.rows: list[dict[str, Any]] = []
        self._key: Key | None = None
        self._signs = torch.zeros(0)
        self._scores: Floats = np.zeros(self.num)
        self._before: Floats | None = None
        self._seen = 0

    # ---- before the first step -------------------------------------------------------------------------------------

    def toss(self, key: Key) -> None:
        """Tosses fair coins under the run's key, which comes from the operating system; once in a trainer's life."""
        if self.num and self._key is None:
            self._key = key
            self.included = self._uniforms(COINS, self.num) < 0.5

    def make_rows(self, record: Mapping[str, Any], vocabulary: int, known: int | None) -> None:
        """Makes token canaries up, with the columns of `record`.

        Args:
            record: any one of the data set; only the names and types of its columns are used.
            vocabulary: how many token ids the model has.
            known: how many of them the tokenizer produces, if there is one; the ids above are new tokens.

        Raises:
            ConfigError: the columns are not those of a causal language model, or there are too few new tokens.
        """
        if self.config is None or self.config.kind == "gradient" or self.rows:
            return
        self._refuse_columns(record)
        drawn = self._uniforms(TOKENS, self.num * LENGTH).reshape(self.num, LENGTH)
        if self.config.kind == "random-token":
            tokens = (3 + drawn * max(1, vocabulary - 3)).astype(int)
        else:
            if known is None or vocabulary - known < self.num:
                raise ConfigError(
                    f"new-token canaries need {self.num} token ids that the tokenizer never gives, found "
                    f"{0 if known is None else max(0, vocabulary - known)}: "
                    f"model.resize_token_embeddings(len(tokenizer) + {self.num}) before LoRA, and pass "
                    "processing_class=tokenizer; or take kind='gradient' or 'random-token'"
                )
            targets = (drawn[:, 0] * known).astype(int)
            tokens = np.stack([known + np.arange(self.num), targets], axis=1)
        self.rows = [_row(record, ids.tolist()) for ids in tokens]

    def _refuse_columns(self, record: Mapping[str, Any]) -> None:
        known = {"input_ids", "attention_mask", "labels", "token_type_ids"}
        strange = sorted(set(record) - known)
        if "input_ids" not in record or strange or np.ndim(record.get("labels", [0])) != 1:
            raise ConfigError(
                "token canaries are rows of input_ids with a label a token, as of a causal language model; got the "
                f"columns {', '.join(sorted(record))}: take AuditConfig(kind='gradient'), which fits any model"
            )

    # ---- in the data loader ----------------------------------------------------------------------------------------

    def among(self, dataset: Records) -> Records:
        """The data set, followed by m slots."""
        return WithCanaries(dataset, self) if self.num else dataset

    def collated(self, cut: LogicalBatchCollator) -> LogicalBatchCollator:
        """The collator of logical batches; with canaries, one that passes gradient canaries on by their numbers."""
        if not self.num:
            return cut
        return WithSlots(cut.collate, cut.max_examples, cut.max_tokens, cut.pass_cost, cut.length_of)

    # ---- in a step -------------------------------------------------------------------------------------------------

    def add_to(self, clipped_sum: Tensor, container: Mapping[str, Any], clip_norm: float) -> None:
        """Adds the gradient canaries drawn in this process's part: vectors of norm C, each in its own direction."""
        slots = container.get(SLOTS, [])
        if slots:
            part, signs = self._columns(clipped_sum)
            part[:, slots] += clip_norm / math.sqrt(len(part)) * signs[:, slots]

    def observe(self, noisy_sum: Tensor, level: StepSettings) -> None:
        """Scores canaries by what a step released, as an attacker would who sees every step and knows the canaries."""
        if self.config is None or self.config.kind != "gradient":
            return
        part, signs = self._columns(noisy_sum)
        seen = (part * signs).sum(0, dtype=torch.float64) / (math.sqrt(len(part)) * level.clip_norm)
        sigma = level.noise_multiplier or 1.0  # without noise, any value ranks canaries by how often they were drawn
        self._scores += log_likelihood_ratio(seen.cpu().numpy()[None], level.sample_rate, sigma)
        self._seen += 1

    def _columns(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """The vector as [k, m], and signs of the same shape.

        Canary j points along the j-th column, so the directions of all canaries are orthogonal.
        """
        k = len(flat) // self.num
        if k == 0:
            raise ConfigError(
                f"{self.num} gradient canaries need as many trainable parameters, got {len(flat)}: fewer canaries"
            )
        if not self._signs.numel():
            signs = np.where(self._uniforms(DIRECTIONS, k * self.num) < 0.5, np.float32(-1), np.float32(1))
            self._signs = torch.from_numpy(signs).view(k, self.num).to(flat.device)
        return flat[: k * self.num].view(k, self.num), self._signs

    # ---- before and after a training -------------------------------------------------------------------------------

    def weigh(self, losses: Callable[[list[dict[str, Any]]], Floats]) -> None:
        """Scores token canaries by how much the model's loss on them has fallen since the first call."""
        if self.rows:
            found = losses(self.rows)
            self._before = found if self._before is None else self._before
            self._scores = self._before - found
            self._seen += 1

    def counts(self) -> Counts | None:
        """What the audit saw; None without an audit, or before the first step.

        Raises:
            AuditError: see `counted`.
        """
        if self.config is None or not self._seen:
            return None
        return counted(self.config.kind, self._scores, self.included, self.config.control_auc)

    def _uniforms(self, stream: int, count: int) -> Floats:
        if self._key is None:
            raise AuditError("canaries are tossed when training begins")
        return keyed_stream(self._key, Role.CANARIES, stream).random(count)


class WithCanaries(Reader):
    """Records, followed by m slots.

    The slot of a canary that is in holds its row, or its `Slot`; that of a canary that is out holds nothing.
    """

    def __init__(self, dataset: Records, canaries: Canaries) -> None:
        self._dataset, self._canaries = dataset, canaries
        self._alone = canaries.config is not None and canaries.config.control

    def __len__(self) -> int:
        return len(self._dataset) + self._canaries.num

    def __getitem__(self, index: int) -> Record:
        return self._dataset[index]

    def read(self, indices: list[int]) -> list[Record]:
        """The records of a draw, then the canaries in it that are in."""
        n, rows = len(self._dataset), self._canaries.rows
        kept = [] if self._alone else [i for i in indices if i < n]
        drawn = [i - n for i in indices if i >= n and self._canaries.included[i - n]]
        return read_records(self._dataset, kept) + [dict(rows[j]) if rows else Slot(j) for j in drawn]


class WithSlots(LogicalBatchCollator):
    """Makes micro-batches of the records alone, and puts the slots among them beside these."""

    def __call__(self, features: list[Record]) -> Container:
        """The container of the records, with the slots under `SLOTS`."""
        assert isinstance(features, Draw), "canaries come in draws"
        records = Draw((f for f in features if not isinstance(f, Slot)), features.number)
        return {**super().__call__(records), SLOTS: [int(f) for f in features if isinstance(f, Slot)]}


def refuse_audit(config: AuditConfig | None, privacy: PrivacyConfig) -> None:
    """Refuses settings that an audited run cannot have.

    Raises:
        ConfigError: naming all of them.
    """
    if config is None:
        return
    wrong = []
    if privacy.log_loss_up_to is not None:
        wrong.append("log_loss_up_to would count the canaries: leave it out")
    if privacy.noise == "discrete":
        wrong.append(
            "canaries have no place on the grid of noise='discrete': audit the run with noise='gaussian-chacha20'"
        )
    if privacy.unit_column is not None:
        wrong.append("with a unit_column a slot is a group of records: leave it out of the audited run")
    if config.control and privacy.noise_multiplier != 0:
        wrong.append("a positive control is a run without noise: noise_multiplier=0")
    if wrong:
        raise ConfigError("Cannot audit this run: " + "; ".join(wrong) + ".")


def begin_audit(
    trainer: PrivateTrainer, canaries: Canaries, checkpoint: Path | None
) -> Callable[[list[dict[str, Any]]], Floats]:
    """Tosses the coins of a trainer's canaries and weighs them for the first time, just before the first step.

    Returns:
        A function rows -> the model's loss on each, to weigh them again with.

    Raises:
        ConfigError: the training resumes, or canaries cannot be made up for its data or model.
    """
    if canaries.num and checkpoint is not None:
        raise ConfigError(
            "an audited run does not resume: coins and scores are kept in memory alone. Start it anew in another "
            "output_dir"
        )

    def losses(rows: list[dict[str, Any]]) -> Floats:
        trainer.model.eval()
        collation = trainer._collation()
        size, found = trainer.args.per_device_train_batch_size, []
        with torch.no_grad(), trainer.compute_loss_context_manager():
            for start in range(0, len(rows), size):
                for batch in collation([dict(row) for row in rows[start : start + size]]):
                    those = trainer.example_losses(trainer.model, batch.mapped(trainer._prepare_inputs))
                    found.append(those.double().cpu().numpy())
        return np.concatenate(found)

    if canaries.num:
        assert trainer._run is not None
        canaries.toss(trainer._run.sampling_key)
        base, tokenizer = trainer._base_model(), trainer.processing_class
        vocabulary, _ = public_sizes(type(base).__name__, base.config)
        record = trainer._columns_for_model()[0][0]
        canaries.make_rows(record, vocabulary, None if tokenizer is None else len(tokenizer))
        canaries.weigh(losses)
    return losses


def _row(record: Mapping[str, Any], ids: list[int]) -> dict[str, Any]:
    """A record of these tokens. If the data set has labels, only the last token is a target."""
    columns = {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "token_type_ids": [0] * len(ids),
        "labels": [IGNORED] * (len(ids) - 1) + ids[-1:],
    }
    return {name: columns[name] for name in record}
