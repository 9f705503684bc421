"""Values that cross the network between stages in parts: each shard sends its own, and those who read them gather.

So of what every shard has whole each byte crosses once, and not once for each shard.
"""

from __future__ import annotations

import torch

from gradwire_stage.group.tensor_group import Shards


def sent_part(tensor: torch.Tensor, dimension: int, *, shards: int, shard: int) -> torch.Tensor:
    """Return what this shard sends; parts need not be equal. The same memory, and the same wish for a gradient."""
    part = tensor.detach().tensor_split(shards, dimension)[shard]
    return part.requires_grad_(tensor.requires_grad)


def gathered(group: Shards, name: str, part: torch.Tensor, dimension: int) -> torch.Tensor:
    """Return the whole of what the shards have got, a new tensor."""
    return torch.cat(group.all_gather(name, part), dimension)
