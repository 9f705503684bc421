"""Equality: one training step on a cluster against the same step in this process.

Tolerances: in float64, 1e-10 for loss, gradients and updated weights. In float32, 1e-5 for loss and gradients, while
weights are shown but not judged: Adam divides rounding by rounding, so that only a float64 run can judge them. Under
autocast to bfloat16, 3e-2 for loss and gradients: bfloat16's epsilon is 8e-3, and one process that rounds in another
place than the cluster is that far from it. Errors below that are for a comparison in float64 to find.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gradwire.batches import Batch, as_arguments
from gradwire.graph.precision import precision_type
from gradwire.reference import reference_step
from gradwire_protocol.codecs import AUTO
from gradwire_protocol.errors import ModelError, PlanError
from gradwire_protocol.exchanges import parse_exchange
from gradwire_protocol.gradient_codecs import AUTO as AUTO_GRADIENTS
from gradwire_protocol.gradient_codecs import parse_compression

if TYPE_CHECKING:
    from gradwire.cluster import Cluster
    from gradwire.plan import Plan

_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far one tensor is from the reference.

    absolute: the largest difference of an element. relative: that ÷ the tensor's largest reference value.
    """

    name: str
    relative: float
    absolute: float


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What the comparison found. Differences are sorted, largest first; `equal` is the verdict."""

    data_type: str
    tolerance: float
    loss: float
    reference_loss: float
    gradients: tuple[Difference, ...]
    weights: tuple[Difference, ...]
    weights_judged: bool
    # Parameters that have a gradient on one side only.
    mismatched: tuple[str, ...]

    @property
    def loss_difference(self) -> float:
        """Relative difference of the losses."""
        return abs(self.loss - self.reference_loss) / max(abs(self.reference_loss), torch.finfo(torch.float32).tiny)

    @property
    def gradient_difference(self) -> float:
        """The largest of the gradients' differences."""
        return self.gradients[0].relative if self.gradients else 0.0

    @property
    def weight_difference(self) -> float:
        """The largest of the updated weights' and buffers' differences."""
        return self.weights[0].relative if self.weights else 0.0

    @property
    def equal(self) -> bool:
        """Whether everything that is judged lies within the tolerance."""
        judged = [self.loss_difference, self.gradient_difference]
        if self.weights_judged:
            judged.append(self.weight_difference)
        return not self.mismatched and all(difference <= self.tolerance for difference in judged)

    def to_record(self) -> dict[str, Any]:
        """Return the verdict and the largest differences for JSON, without the tensors' own."""
        return {
            "data_type": self.data_type,
            "equal": self.equal,
            "loss": self.loss,
            "reference_loss": self.reference_loss,
            "loss_difference": self.loss_difference,
            "gradient_difference": self.gradient_difference,
            "weight_difference": self.weight_difference,
            "weights_judged": self.weights_judged,
            "mismatched": list(self.mismatched),
            "tolerance": self.tolerance,
            "text": str(self),
        }

    def __str__(self) -> str:
        weights = f", updated weights {self.weight_difference:.1e}" if self.weights_judged else ""
        verdict = "equal to one process" if self.equal else "NOT EQUAL to one process"
        text = (
            f"{self.data_type}: {verdict}; largest relative differences: loss {self.loss_difference:.1e}, "
            f"gradients {self.gradient_difference:.1e}{weights} (allowed {self.tolerance:.0e})"
        )
        if self.mismatched:
            text += f"; gradients on one side only: {', '.join(self.mismatched[:5])}"
        return text


def verify(
    cluster: Cluster,
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    loss: Callable[..., Any] | nn.Module | None,
    batch: Any,
    plan: Plan,
    max_grad_norm: float | None = None,
    double: bool = False,
    precision: str | None = None,
    seed: int = 0,
    micro_batch_rows: int | None = None,
) -> Verification:
    """Train one step on the cluster and one here, from the same weights on the same batch, and compare.

    make_optimizer: called with each side's copy of the model, of which each has its own. The model itself is not
    changed; its parameters are float64 or float32. batch: as a loader gives it. double: compare copies of model and
    batch in float64, which judges the updated weights too. precision: as of a trainer, on both sides; without effect
    in float64, which autocast leaves as it is. seed: of dropout and the like, on both sides. micro_batch_rows: as of
    a trainer. The cluster needs free servers for the plan.

    ModelError if the model draws random numbers in a way that one process cannot follow, or on another kind of device
    than the servers do.
    """
    _check_codecs(plan)
    distributed, eager = copy.deepcopy(model), copy.deepcopy(model)
    batch = as_arguments(batch)
    if double:
        distributed, eager, batch = distributed.double(), eager.double(), _doubled(batch)
        # A loss may hold tensors, such as the weights of classes.
        loss = copy.deepcopy(loss).double() if isinstance(loss, nn.Module) else loss
        precision = None
    data_type = _data_type(eager)
    autocast_type = precision_type(precision, eager)
    with cluster.trainer(
        distributed,
        make_optimizer(distributed),
        loss=loss,
        example=batch,
        plan=plan,
        seed=seed,
        max_grad_norm=max_grad_norm,
        precision=precision,
        micro_batch_rows=micro_batch_rows,
        description="verification",
    ) as trainer:
        if trainer.exported.draws:
            _check_devices(cluster, trainer.servers, eager)
        result, gradients = trainer.step_with_gradients(*_positional(batch), **_keywords(batch))
        weights, exported = trainer.state_dict(), trainer.exported
    reference_loss, reference_gradients = reference_step(
        eager,
        make_optimizer(eager),
        loss,
        exported,
        batch,
        micro_batches=plan.microbatches,
        max_grad_norm=max_grad_norm,
        precision=autocast_type,
        seed=seed,
    )
    tolerance = _TOLERANCES[data_type if autocast_type is None else autocast_type]
    return Verification(
        data_type=_name(data_type) + (f" under {_name(autocast_type)} autocast" if autocast_type else ""),
        tolerance=tolerance,
        loss=result.loss,
        reference_loss=reference_loss,
        gradients=differences(gradients, reference_gradients, tolerance, rounded_to=autocast_type),
        # Tied names once; buffers count as weights.
        weights=differences(
            weights,
            {**dict(eager.named_parameters()), **dict(eager.named_buffers())},
            tolerance,
            reference_gradients,
            rounded_to=autocast_type,
        ),
        weights_judged=data_type is torch.float64,
        mismatched=tuple(sorted(gradients.keys() ^ reference_gradients.keys())),
    )


def differences(
    tensors: Mapping[str, torch.Tensor],
    references: Mapping[str, torch.Tensor],
    tolerance: float,
    gradients: Mapping[str, torch.Tensor] | None = None,
    *,
    rounded_to: torch.dtype | None = None,
) -> tuple[Difference, ...]:
    """Return the relative difference of each floating tensor that both have, largest first.

    The scale is the tensor's largest reference value, but at least what rounding of the largest value of all tensors
    can amount to: a gradient that is zero but for rounding (of a bias before a normalisation) has no scale of its own.
    gradients: leave out elements whose gradient is not above that floor: their update is rounding divided by rounding.
    rounded_to: what values were rounded to on their way, if that is coarser than their own type.
    """
    names = [name for name in references if name in tensors and references[name].is_floating_point()]
    floor = _rounding_floor(references, names, tolerance, rounded_to)
    gradient_floor = _rounding_floor(gradients or {}, list(gradients or {}), tolerance, rounded_to)
    found = []
    for name in names:
        reference = references[name].detach().double().cpu()
        difference = tensors[name].double() - reference
        if gradients is not None and name in gradients:
            difference = difference[gradients[name].abs() > gradient_floor]
        scale = max(_largest(reference), floor)
        largest = _largest(difference)
        relative = largest / scale if scale > 0 else largest
        found.append(Difference(name=name, relative=relative, absolute=largest))
    # NaN sorts first: it is a difference.
    return tuple(sorted(found, key=lambda item: (not math.isnan(item.relative), -item.relative)))


def _rounding_floor(
    tensors: Mapping[str, torch.Tensor], names: Iterable[str], tolerance: float, rounded_to: torch.dtype | None
) -> float:
    """Return the value whose rounding, relative to it, is the tolerance, given that of the largest value of all."""
    return max(
        (
            _largest(tensors[name].detach()) * torch.finfo(rounded_to or tensors[name].dtype).eps / tolerance
            for name in names
        ),
        default=0.0,
    )


def _check_codecs(plan: Plan) -> None:
    """PlanError if values lose precision on their way: then one process is no reference for equality."""
    codecs = plan.activation_codecs
    if set(codecs) - {"none"}:
        raise PlanError(
            "The plan's codecs change values on their way between stages, so that no cluster equals one process",
            expected='activation_compression="none"',
            got=", ".join(codecs) + (", which can choose a lossy one" if AUTO in codecs else ""),
            remedy='call gradwire.verify with dataclasses.replace(plan, activation_compression="none"): it judges '
            "all but the codecs, whose errors are bounded element by element",
        )
    if parse_exchange(plan.exchange).is_local and plan.replicas > 1:
        raise PlanError(
            "Replicas that train alone for some steps are not equal to one process, so there is nothing to compare",
            expected='exchange="ring"',
            got=repr(plan.exchange),
            remedy='compare with dataclasses.replace(plan, exchange="ring", every=None)',
        )
    if parse_exchange(plan.exchange).staleness:
        raise PlanError(
            "Weights that lack updates are not equal to one process's, so there is nothing to compare",
            expected="staleness=0",
            got=repr(plan.exchange),
            remedy='compare with dataclasses.replace(plan, exchange="parameter-server", staleness=0)',
        )
    if plan.compression == AUTO_GRADIENTS or parse_compression(plan.compression).lossy:
        raise PlanError(
            "Gradients that replicas round are not equal to one process's, so there is nothing to compare",
            expected='compression="none"',
            got=repr(plan.compression),
            remedy='compare with dataclasses.replace(plan, compression="none")',
        )


def _check_devices(cluster: Cluster, names: Collection[str], model: nn.Module) -> None:
    """ModelError if the run's servers have devices of another kind than the model, whose generators draw otherwise."""
    kinds = {server.device.kind for server in cluster.status().servers if server.server in names}
    here = {parameter.device.type for parameter in model.parameters()}
    if kinds != here:
        raise ModelError(
            "The model draws random numbers on another kind of device than the servers do",
            expected=f"parameters on {', '.join(sorted(kinds))}",
            got=", ".join(sorted(here)),
            remedy="move a copy of the model there for the comparison, or set dropout to 0",
        )


def _name(data_type: torch.dtype) -> str:
    return str(data_type).removeprefix("torch.")


def _largest(tensor: torch.Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _data_type(model: nn.Module) -> torch.dtype:
    types = {parameter.dtype for parameter in model.parameters()}
    if len(types) != 1 or not types <= {torch.float64, torch.float32}:
        raise ModelError(
            "The comparison needs parameters of one type",
            expected="float64 or float32",
            got=", ".join(sorted(map(str, types))) or "no parameters",
            remedy="convert a copy: copy.deepcopy(model).double()",
        )
    return types.pop()


def _doubled(batch: Batch) -> Any:
    """Return the batch with its floating tensors in float64."""
    return pytree.tree_map_only(torch.Tensor, lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, batch)


def _positional(batch: tuple[Any, ...] | Mapping[str, Any]) -> tuple[Any, ...]:
    return () if isinstance(batch, Mapping) else tuple(batch)


def _keywords(batch: tuple[Any, ...] | Mapping[str, Any]) -> dict[str, Any]:
    return dict(batch) if isinstance(batch, Mapping) else {}
