"""The reference of every comparison: one training step in this process, over micro-batches, with the user's own module.

Gradients are sums over micro-batches, divided once by the total weight. The weight is rows, unless the loss gives
(sum, weight) or ends in a mean-reduced cross entropy, whose own weight counts then (masked targets have none).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # torch's own convention
from torch import nn
from torch.overrides import TorchFunctionMode

from gradwire.batches import split_sizes
from gradwire.draws import SeededDraws
from gradwire.graph import ExportedModel
from gradwire.graph.capture import set_mode
from gradwire.graph.precision import autocast
from gradwire.graph.wrapper import Wrapper
from gradwire_protocol.v1 import graph_pb2

_STEP = 1  # of a run, as its servers count


def reference_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[..., Any] | nn.Module | None,
    exported: ExportedModel,
    batch: tuple[Any, ...] | Mapping[str, Any],
    *,
    micro_batches: int,
    max_grad_norm: float | None,
    precision: torch.dtype | None = None,
    seed: int = 0,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Take a run's first step; return the loss, and by name the gradients that the optimizer saw.

    exported: the model as data, which says what of the batch is split, what the loss means, and what draws random
    numbers. precision: run model and loss under autocast to this type, the backward pass outside of it. seed: of the
    run. ModelError if random numbers are drawn that the graph does not draw. The random state stays as it is.
    """
    module = Wrapper(model, loss, exported.batch, with_loss=True, with_output=False)
    set_mode(module, training=True)
    weighted_mean = exported.proto.loss_form == graph_pb2.LOSS_FORM_SUM_AND_WEIGHT
    total = total_weight = 0.0
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for number, (rows, tensors) in enumerate(_micro_batches(exported, batch, micro_batches)):
            with SeededDraws(exported.draws, device, seed=seed, step=_STEP, micro_batch=number) as random:
                with _CrossEntropyWeight() as seen, autocast(precision, model):
                    parts = module(*tensors)
                if module.outputs.loss == 2:
                    weighted, weight = parts[0], float(parts[1])
                else:
                    weight = seen.weight if weighted_mean else float(rows)
                    weighted = parts[0] * weight
                weighted.backward()
            random.check_complete()
            total += weighted.item()
            total_weight += weight
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for gradient in gradients.values():
        gradient.div_(total_weight)
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(list(model.parameters()), max_grad_norm)
    optimizer.step()
    return total / total_weight, gradients


def _micro_batches(
    exported: ExportedModel, batch: tuple[Any, ...] | Mapping[str, Any], micro_batches: int
) -> Iterator[tuple[int, list[Any]]]:
    """Yield the rows of each micro-batch, and the tensors of the batch in the order of the graph's inputs."""
    flat = exported.flatten_batch(batch, graph_pb2.GRAPH_KIND_TRAIN)
    first = 0
    for rows in split_sizes(flat.rows, micro_batches, exported.batch.micro_batch_rows):
        part = slice(first, first + rows)
        first += rows
        whole = ((leaf.value, flat.values[leaf.value]) for leaf in exported.batch.tensors)
        yield (
            rows,
            [
                value[part] if name in flat.batched and isinstance(value, torch.Tensor) else value
                for name, value in whole
            ],
        )


class _CrossEntropyWeight(TorchFunctionMode):
    """Notes the weight of the last mean-reduced cross entropy: the sum of its targets' weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = 0.0

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        if function in (F.cross_entropy, F.nll_loss) and keywords.get("reduction", "mean") == "mean":
            target = args[1] if len(args) > 1 else keywords["target"]
            class_weights = args[2] if len(args) > 2 else keywords.get("weight")
            self.weight = _target_weight(args[0], target, class_weights, keywords.get("ignore_index", -100))
        return function(*args, **keywords)


def _target_weight(
    scores: torch.Tensor, target: torch.Tensor, class_weights: torch.Tensor | None, ignored: int
) -> float:
    if target.is_floating_point():  # class probabilities: the mean is over rows and positions
        return float(target.numel() // scores.shape[1 if scores.dim() > 1 else 0])
    counted = target[target != ignored]
    return float(counted.numel() if class_weights is None else class_weights[counted].sum())
