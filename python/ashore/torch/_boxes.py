"""DTensors as boxes: the part of a tensor that this rank holds, and its position in the whole tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ._errors import invalid

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# The shape of the whole tensor, and the index of the first element.
Place = tuple[list[int], list[int]]


def is_dtensor(tensor: torch.Tensor) -> bool:
    """True for a DTensor. Programs without DTensors need not import their module."""
    return type(tensor) is not torch.Tensor and type(tensor).__name__ == "DTensor" and hasattr(tensor, "placements")


def mine(tensor: DTensor, name: str) -> tuple[torch.Tensor, Place] | None:
    """Returns the part of a DTensor that this rank holds, and its place. None if this rank holds nothing.

    A rank outside of the mesh holds nothing. A rank may also hold nothing if the tensor is shorter than its
    mesh.
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
