"""A small character model on the standard library's text, trained in one process. charlm.py trains it as a pipeline."""

import os
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F

STEPS = int(os.environ.get("STEPS", "400"))
CONTEXT, BATCH, WIDTH = 96, 24, 128
CHARACTERS = [9, 10, *range(32, 127)]  # of ASCII; anything else is left out
FILES = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


def read(files: list[Path]) -> torch.Tensor:
    codes = torch.full((256,), -1)
    codes[CHARACTERS] = torch.arange(len(CHARACTERS))
    text = codes[torch.frombuffer(bytearray().join(file.read_bytes() for file in files), dtype=torch.uint8).long()]
    return text[text >= 0]


class CharacterModel(torch.nn.Module):
    """A causal Transformer: (batch, context) of codes to (batch, context, characters) of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(len(CHARACTERS), WIDTH)
        self.positions = torch.nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.layers = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(4)
        )
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.head = torch.nn.Linear(WIDTH, len(CHARACTERS))
        self.register_buffer("mask", torch.triu(torch.ones(CONTEXT, CONTEXT, dtype=torch.bool), diagonal=1))

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(codes) + self.positions
        for layer in self.layers:
            hidden = layer(hidden, src_mask=self.mask)
        return self.head(self.norm(hidden))


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return CharacterModel()


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def make_batch(text: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    text = read(FILES[:3]) if text is None else text
    starts = torch.randint(len(text) - CONTEXT, (BATCH, 1))
    windows = text[starts + torch.arange(CONTEXT + 1)]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, text: torch.Tensor) -> float:
    model.eval()
    torch.manual_seed(1)
    return sum(loss(model(x), y).item() for x, y in (make_batch(text) for _ in range(10))) / 10


def main() -> None:
    training, held_out = read(FILES[:-10]), read(FILES[-10:])
    model = make_model()
    optimizer = make_optimizer(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    print(f"held-out loss before: {held_out_loss(model, held_out):.3f} nats a character")
    model.train()
    torch.manual_seed(2)  # both scripts draw the same batches
    for step in range(1, STEPS + 1):
        x, y = make_batch(training)
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % 50 == 0:
            print(f"step {step}: loss {value:.3f}", flush=True)
    print(f"held-out loss after: {held_out_loss(model, held_out):.3f} nats a character")


if __name__ == "__main__":
    main()
