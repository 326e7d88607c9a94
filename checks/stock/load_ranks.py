#!/usr/bin/env python3
"""Loads a step of several ranks with torch's own `dcp.load`, as one rank of a job that torchrun starts:

    torchrun --nproc-per-node N load_ranks.py FOLDER

Every rank asks for DTensors, split by rows, then by columns, and compares the result with its part of the
expected tensors.
"""
import json
import pathlib
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

import check
import check_ranks


def asked(dtype, shape, mesh, axis):
    """A tensor to load into, which holds something else, and the place of its part in the whole tensor."""
    def filled(extent):
        tensor = torch.empty(extent, dtype=dtype)
        tensor.reshape(-1).view(torch.uint8).fill_(1 if dtype == torch.bool else 0xAA)
        return tensor
    if len(shape) <= axis:
        return filled(shape), [0] * len(shape), shape
    placement = [Shard(axis)]
    extent, at = compute_local_shape_and_global_offset(torch.Size(shape), mesh, placement)
    whole = torch.empty(shape, dtype=dtype, device="meta")
    local = filled(list(extent))
    return DTensor.from_local(local, mesh, placement, run_check=False, shape=whole.shape, stride=whole.stride()), list(at), list(extent)


def main(folder):
    dist.init_process_group("gloo")
    table = json.loads(pathlib.Path(__file__).with_name("ranks.json").read_text())
    expected = check.expectation([(t["name"], t["dtype"], t["shape"]) for t in table["tensors"]])
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    compared = 0
    for axis in (0, 1):
        state, places = {}, {}
        for name, (dtype, shape, _) in expected.items():
            state[name], *places[name] = asked(check.TORCH[dtype], shape, mesh, axis)
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
        for name, tensor in state.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            at, extent = places[name]
            assert check.raw(local) == check_ranks.cut(expected, name, at, extent), (name, axis, dist.get_rank())
            compared += local.numel()
    print(f"rank {dist.get_rank()} of {dist.get_world_size()}: {compared} elements equal", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
