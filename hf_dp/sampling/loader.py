"""Records and a sampler of draws -> a loader of this process's logical batches, each cut into micro-batches."""

from typing import cast

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments

from hf_dp.per_example import Record
from hf_dp.sampling.microbatch import Container, LogicalBatchCollator
from hf_dp.sampling.poisson import PoissonSampler
from hf_dp.sampling.reading import DrawnRecords
from hf_dp.sampling.seals import Sealing


def logical_batches(
    records: DrawnRecords,
    sampler: PoissonSampler,
    cut: LogicalBatchCollator,
    args: TrainingArguments,
    device: torch.device,
) -> DataLoader[Container]:
    """One batch a draw. Accelerate only moves the batches to the device; it does not split or repeat them.

    Args:
        records: the training set.
        sampler: yields this process's slice of each draw.
        cut: makes micro-batches of the slice.
        args: for its options `dataloader_*`.
        device: where the batches go.
    """
    loader: DataLoader[Container] = DataLoader(
        cast("Dataset[Record]", records),
        batch_sampler=sampler,
        collate_fn=Sealing(cut),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),  # newer transformers only
    )
    # with num_processes > 1, accelerate would unite two draws, repeat batches and drop empty ones
    return prepare_data_loader(
        loader, device=device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )
