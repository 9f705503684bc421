"""A small GPT-2 of Hugging Face's transformers, from scratch, in one process. hf_gpt2.py trains it as a pipeline."""

import os
import sysconfig
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

STEPS = int(os.environ.get("STEPS", "200"))
CONTEXT, BATCH = 96, 24
FILES = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    # One token a byte, so that no tokenizer is needed. Its head shares the embedding's weight.
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256,
            n_positions=CONTEXT,
            n_embd=128,
            n_layer=4,
            n_head=4,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def read(files: list[Path]) -> torch.Tensor:
    return torch.frombuffer(bytearray().join(file.read_bytes() for file in files), dtype=torch.uint8).long()


def make_batch(text: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Return windows of text. The model shifts the labels itself; indentation counts for nothing in them."""
    text = read(FILES[:3]) if text is None else text
    starts = torch.randint(len(text) - CONTEXT, (BATCH, 1))
    tokens = text[starts + torch.arange(CONTEXT)]
    indentation = (tokens == ord(" ")) & (tokens.roll(1, dims=1) == ord(" "))
    return {"input_ids": tokens, "labels": tokens.masked_fill(indentation, -100)}


loss = None


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, text: torch.Tensor) -> float:
    model.eval()
    torch.manual_seed(1)
    return sum(model(**make_batch(text)).loss.item() for _ in range(10)) / 10


def main() -> None:
    training, held_out = read(FILES[:-10]), read(FILES[-10:])
    model = make_model()
    optimizer = make_optimizer(model)
    print(f"held-out loss before: {held_out_loss(model, held_out):.3f} nats a byte that counts")
    model.train()
    torch.manual_seed(2)  # both scripts draw the same batches
    for step in range(1, STEPS + 1):
        batch = make_batch(training)
        value = model(**batch).loss
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            print(f"step {step}: loss {value:.3f}", flush=True)
    print(f"held-out loss after: {held_out_loss(model, held_out):.3f} nats a byte that counts")


if __name__ == "__main__":
    main()
