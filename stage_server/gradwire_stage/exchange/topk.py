"""topk: each replica sends its largest gradients only, and keeps the others until they have grown.

Lin et al., Deep Gradient Compression (2018): momentum correction, momentum factor masking, and a density that falls
exponentially at first. What each sends goes to all (a sparse all-gather), who add in the same order: the same bits. The
threshold comes from a sample, because to find the largest elements exactly takes longer than to send them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from gradwire_protocol.gradient_codecs import GradientCodec, top_count
from gradwire_stage.exchange import collectives, sparse
from gradwire_stage.exchange.collectives import Group, Steps, all_gather
from gradwire_stage.exchange.feedback import Kept, drop_infinite

_FIRST_DENSITY = 0.25
# Most elements that are looked at together: their largest says whether any is above the threshold.
_LARGEST_GROUP = 16
# Share of the groups, at most, that are expected to have one.
_GROUPS_WITH_ONE = 0.25
# A sample has so many elements above the threshold: its share of all is then known to about 6 %.
_SAMPLED = 256
# By how much more elements than wanted are looked for, so that the sample's error seldom leaves too few.
_MARGIN = 1.15


class TopK:
    """The reducer of topk (`reducers.Reducer`)."""

    def __init__(self, codec: GradientCodec) -> None:
        self._codec = codec
        # Gradients that have not been sent; with momentum, their velocities added up. A whole number of groups.
        self._unsent = Kept()
        self._velocity = Kept()

    def all_reduce(self, group: Group, gradient: torch.Tensor, step: int) -> Steps[torch.Tensor]:
        elements = gradient.numel()
        if len(group.members) == 1 or not elements:
            alone = yield from collectives.all_reduce(group, gradient)
            return alone
        unsent, velocity = self._add(gradient)
        most = top_count(elements, self._density(step))
        places = largest(unsent, most, step)
        values = unsent.index_select(0, places).to(_wire_type(gradient.dtype))
        # What rounding took off the values is kept, too.
        unsent.index_add_(0, places, values.to(unsent.dtype), alpha=-1)
        if velocity is not None:
            velocity.index_fill_(0, places, 0.0)
        payloads = yield from all_gather(group, sparse.pack(places, values, elements))
        total = torch.zeros(elements, dtype=unsent.dtype, device=unsent.device)
        for member, payload in zip(group.members, payloads, strict=True):
            theirs, parts = sparse.unpack(payload, elements, most, values.dtype, f"replica {member}")
            total.index_add_(0, theirs, parts.to(total.dtype))
        if not bool(values.isfinite().all()):
            drop_infinite(unsent)
            if velocity is not None:
                drop_infinite(velocity)
        return total.to(gradient.dtype)

    def state(self) -> dict[str, torch.Tensor]:
        return self._unsent.state("unsent") | self._velocity.state("velocity")

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, kept in (("unsent", self._unsent), ("velocity", self._velocity)):
            if name in state and (name == "unsent" or self._codec.momentum):
                kept.put(state[name], _LARGEST_GROUP)

    def _add(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Add a gradient to what has not been sent; return that, and the velocity if there is momentum."""
        elements = gradient.numel()
        unsent = self._unsent.like(gradient, _LARGEST_GROUP)
        if not self._codec.momentum:
            unsent[:elements] += gradient
            return unsent, None
        velocity = self._velocity.like(gradient, _LARGEST_GROUP)
        velocity[:elements].mul_(self._codec.momentum).add_(gradient)
        unsent += velocity
        return unsent, velocity

    def _density(self, step: int) -> float:
        density, steps = self._codec.density, self._codec.warm_up
        if step >= steps or density >= _FIRST_DENSITY:
            return density
        return float(_FIRST_DENSITY * (density / _FIRST_DENSITY) ** (step / steps))


def largest(elements: torch.Tensor, count: int, step: int) -> torch.Tensor:
    """Return the places, ascending, of about the `count` largest magnitudes but zeros, and never more.

    NaN counts as the largest. elements: flat, a whole number of groups. The sample is another one in every step.
    """
    threshold = _threshold(elements, count, step)
    # Strided groups, which are compared as vectors; taken row by row their places ascend, too.
    groups = elements.view(_group_size(elements.numel(), count), -1)
    peaks = torch.maximum(groups.amax(dim=0), groups.amin(dim=0).neg_())
    columns = _reaching(peaks, threshold)
    starts = torch.arange(0, elements.numel(), groups.shape[1], device=elements.device)
    candidates = (starts[:, None] + columns).view(-1)
    magnitudes = elements.index_select(0, candidates).abs_()
    passing = _reaching(magnitudes, threshold)
    if passing.numel() > count:
        chosen = magnitudes.index_select(0, passing).topk(count, sorted=False).indices
        kept = torch.zeros(passing.numel(), dtype=torch.bool, device=passing.device)
        passing = passing[kept.index_fill_(0, chosen, True)]
    return candidates.index_select(0, passing)


def _group_size(elements: int, count: int) -> int:
    """Return a power of two that divides `elements`, the larger the fewer are wanted."""
    size = _LARGEST_GROUP
    while size > 1 and size * count > _GROUPS_WITH_ONE * elements:
        size //= 2
    return size


def _threshold(elements: torch.Tensor, count: int, step: int) -> torch.Tensor:
    """Return the magnitude that somewhat more than `count` elements reach, by a sample; above 0."""
    wanted = elements.numel() * _SAMPLED // count
    # Odd, so that it meets all columns of a matrix.
    stride = max(1, elements.numel() // max(wanted, 1)) | 1
    sample = elements[step % stride :: stride].abs()
    above = math.ceil(_MARGIN * count * sample.numel() / elements.numel())
    threshold = sample.topk(min(above, sample.numel()), sorted=False).values.amin()
    return threshold.clamp_(min=torch.finfo(threshold.dtype).smallest_normal)


def _reaching(magnitudes: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Return the places of magnitudes that are not below the threshold, NaN among them. Both are flat."""
    return (magnitudes < threshold).logical_not_().nonzero().view(-1)


def _wire_type(data_type: torch.dtype) -> torch.dtype:
    return data_type if data_type.itemsize < 4 else torch.float32
