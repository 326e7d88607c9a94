"""DTensors as boxes: what this rank holds of a tensor, and where in the whole it lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ._errors import invalid

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# The shape of the whole tensor, and the index of the first element.
Place = tuple[list[int], list[int]]


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor, without an import of their module by programs that have none."""
    return type(tensor) is not torch.Tensor and type(tensor).__name__ == "DTensor" and hasattr(tensor, "placements")


def mine(tensor: DTensor, name: str) -> tuple[torch.Tensor, Place] | None:
    """What this rank holds of a DTensor, and its place; None where it holds nothing.

    A rank outside of the mesh holds nothing, and so may one of a tensor that is shorter than its mesh.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(placement.is_partial() for placement in tensor.placements):
        raise invalid(f"a DTensor whose placement is partial has no values yet tensor={name}", name)
    if tensor.device_mesh.get_coordinate() is None:
        return None
    local = tensor.to_local().detach()
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if tuple(shape) != tuple(local.shape):
        raise invalid(f"a DTensor lies in several boxes on this rank: save it by full_tensor() tensor={name}", name)
    return (local, (list(tensor.shape), list(offset))) if local.numel() > 0 or tensor.numel() == 0 else None
