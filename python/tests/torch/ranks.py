"""One of several ranks that save DTensors by DCP: ranks.py ROOT RANK WORLD RENDEZVOUS."""

import sys

import ashore
import ashore.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def whole(name, *shape):
    torch.manual_seed(len(name))
    return torch.rand(shape)


def state(mesh, fill=None):
    tensors = {
        "rows": (whole("rows", 7, 3), Shard(0)),  # unequal shares
        "columns": (whole("columns", 2, 10), Shard(1)),
        "short": (whole("short", 1, 3), Shard(0)),  # some ranks have nothing
        "everywhere": (whole("everywhere", 5), Replicate()),
    }
    made = {name: distribute_tensor(tensor, mesh, [placement]) for name, (tensor, placement) in tensors.items()}
    made |= {"plain": whole("plain", 4), "object": {"text": "of rank 0", "set": {1, 2}}}
    if fill is not None:
        for value in made.values():
            if isinstance(value, torch.Tensor):
                value.fill_(fill)
        made["object"] = {"text": "?", "set": {0}}
    return {"deep": made}


def check(loaded):
    for name, shape in (("rows", (7, 3)), ("columns", (2, 10)), ("short", (1, 3)), ("everywhere", (5,)), ("plain", (4,))):
        value = loaded["deep"][name]
        value = value.full_tensor() if isinstance(value, DTensor) else value
        assert torch.equal(value, whole(name, *shape)), name
    assert loaded["deep"]["object"] == {"text": "of rank 0", "set": {1, 2}}


def main(root, rank, world, rendezvous):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    with ashore.CheckpointExecutor(
        root, arena=8 << 20, chunk=1 << 20, ranks=(rank, world, rank), run="one", detect="all"
    ) as executor:
        dcp.save(state(mesh), storage_writer=ashore.torch.StorageWriter(executor, 1))
        saved = state(mesh)
        done = dcp.async_save(saved, storage_writer=ashore.torch.StorageWriter(executor, 2))
        executor.fence()
        for value in saved["deep"].values():
            if isinstance(value, torch.Tensor):
                value.zero_()
        done.result()
        dist.barrier()
        for step in (1, 2):
            loaded = state(mesh, 9.0)
            dcp.load(loaded, storage_reader=ashore.torch.StorageReader(ashore.Catalog(root).checkpoint(step)))
            check(loaded)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
