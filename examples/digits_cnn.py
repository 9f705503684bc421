"""A small ResNet with batch normalisation on scikit-learn's digits, trained as a pipeline of two stage servers.

digits_cnn_single.py is the same in one process: `diff -w examples/digits_cnn_single.py examples/digits_cnn.py`.
"""

import os

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import gradwire

STEPS = int(os.environ.get("STEPS", "300"))
BATCH, HELD_OUT = 64, 360


class Block(torch.nn.Module):
    """Two convolutions and a skip; the first convolution halves height and width by its stride."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.first_norm = torch.nn.BatchNorm2d(outputs)
        self.second = torch.nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = torch.nn.BatchNorm2d(outputs)
        self.skip = torch.nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(hidden)) + self.skip(x))


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    blocks = [Block(1, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
    return torch.nn.Sequential(*blocks, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 10))


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def read() -> tuple[torch.Tensor, torch.Tensor]:
    """Return all images, (image, 1, 8, 8) from 0 to 1, and their digits, in a fixed random order."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return images[order], torch.tensor(digits.target)[order]


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    images, digits = read()
    return images[:BATCH], digits[:BATCH]


loss = F.cross_entropy


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: torch.Tensor, digits: torch.Tensor) -> float:
    model.eval()
    return (model(images).argmax(dim=1) == digits).float().mean().item()


def main() -> None:
    images, digits = read()
    training = torch.utils.data.TensorDataset(images[HELD_OUT:], digits[HELD_OUT:])
    loader = torch.utils.data.DataLoader(training, BATCH, shuffle=True)
    model = make_model()
    optimizer = make_optimizer(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    with gradwire.local(stage_servers=2) as cluster:
        plan = gradwire.Plan(stages=2, microbatches=4)
        trainer = cluster.trainer(model, optimizer, loss=loss, example=make_batch(), plan=plan)
        torch.manual_seed(2)  # both scripts draw the same batches
        for step in range(1, STEPS + 1):
            x, y = next(iter(loader))
            value = trainer.step(x, y).loss
            scheduler.step()
            if step % 50 == 0:
                print(f"step {step}: loss {value:.3f}", flush=True)
        model.load_state_dict(trainer.state_dict())
    print(f"accuracy on {HELD_OUT} held-out images: {accuracy(model, images[:HELD_OUT], digits[:HELD_OUT]):.3f}")


if __name__ == "__main__":
    main()
