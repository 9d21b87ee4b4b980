"""A trainer and rows -> its model's loss on each row."""

import datasets
import numpy as np
import torch

from hf_dp.audit import Floats
from hf_dp.training import DPTrainer


def row_losses(trainer: DPTrainer, rows: datasets.Dataset) -> Floats:
    """The model's loss on each row, [n], in evaluation mode; rows of similar length are batched together."""
    was_training = trainer.model.training
    trainer.model.eval()
    size, order = trainer.args.per_device_train_batch_size, np.argsort([len(ids) for ids in rows["input_ids"]])
    found = np.zeros(len(rows))
    with torch.no_grad(), trainer.compute_loss_context_manager():
        for start in range(0, len(rows), size):
            some = order[start : start + size]
            batch = trainer._prepare_inputs(trainer.data_collator([rows[int(i)] for i in some]))
            found[some] = trainer.example_losses(trainer.model, batch).double().cpu().numpy()
    trainer.model.train(was_training)
    return found
