"""Records, a sampler of draws and Trainer's loader options -> this process's logical batches, cut into micro-batches,
on its device.
"""

from typing import Any, cast

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from hf_dp.sampling.microbatch import DrawnRecords, LogicalBatchCollator
from hf_dp.sampling.poisson import PoissonSampler


def logical_batches(
    records: DrawnRecords, sampler: PoissonSampler, cut: LogicalBatchCollator, args: Any, device: torch.device
) -> DataLoader[Any]:
    """One batch a draw, as Trainer wants to be handed them: accelerate moves them to the device and leaves them as they
    are.

    Args:
        records: the training set.
        sampler: yields this process's part of each draw.
        cut: makes micro-batches of it.
        args: `TrainingArguments`, for `dataloader_*`.
        device: where the batches go.
    """
    loader: DataLoader[Any] = DataLoader(
        cast(Any, records),
        batch_sampler=sampler,
        collate_fn=cut,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),  # newer transformers only
    )
    # num_processes=1: accelerate would otherwise unite two draws, recycle batches and drop empty ones
    return prepare_data_loader(
        loader, device=device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )
