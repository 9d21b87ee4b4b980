"""nn.Linear(10, 1) and SGD on made-up records, without privacy and at three epsilons -> their accuracy, and a card."""

import argparse
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from hf_dp import PrivacyConfig, PrivateLoop, plan

NUM_EXAMPLES, BATCH, EPOCHS, LEARNING_RATE = 2000, 100, 10, 2.0


def made_up_records(count: int) -> TensorDataset:
    """Ten features, and whether their noisy sum is above 0."""
    features = torch.randn(count, 10)
    return TensorDataset(features, (features.sum(1) + torch.randn(count) > 0).float())


def example_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """One loss an example."""
    features, labels = batch
    return nn.functional.binary_cross_entropy_with_logits(model(features)[:, 0], labels, reduction="none")


def train(data: TensorDataset, epsilon: float | None, folder: Path) -> tuple[nn.Module, float]:
    """The model, and the epsilon spent; without privacy for None."""
    model = nn.Linear(10, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    if epsilon is None:
        for _ in range(EPOCHS * NUM_EXAMPLES // BATCH):
            optimizer.zero_grad()
            example_losses(model, data[torch.randperm(NUM_EXAMPLES)[:BATCH]]).mean().backward()
            optimizer.step()
        return model, float("inf")
    privacy = PrivacyConfig(target_epsilon=epsilon, expected_batch_size=BATCH)
    loop = PrivateLoop(model, optimizer, example_losses, plan(privacy, NUM_EXAMPLES, num_train_epochs=EPOCHS), folder)
    for draw in loop.draws(data):
        loop.backward(draw)
        optimizer.step()
    torch.save(model.state_dict(), folder / "model.pt")
    loop.write_card(folder)
    return model, loop.privacy_spent().epsilon


def main() -> None:
    """The table, on stdout; models and cards in --output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("out/plain_loop"))
    output = parser.parse_args().output
    train_data, (features, labels) = made_up_records(NUM_EXAMPLES), made_up_records(10_000).tensors
    print("epsilon   accuracy on 10,000 new records")
    for epsilon in (None, 3.0, 1.0, 0.1):
        folder = output / f"epsilon-{epsilon}"
        shutil.rmtree(folder, ignore_errors=True)  # another training in the same folder is refused
        model, spent = train(train_data, epsilon, folder)
        right = ((model(features)[:, 0] > 0) == (labels > 0)).float().mean()
        print(f"{spent:7.3f}   {right:.1%}")
    print(f"models with their cards: {output}/epsilon-*")


if __name__ == "__main__":
    main()
