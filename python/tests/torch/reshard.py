"""One of four ranks: saves a DTensor by DCP in each of several placements, and loads each into all the others.

reshard.py ROOT RANK WORLD RENDEZVOUS
"""

import sys
import time

import ashore
import ashore.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

WHOLE = torch.arange(35.0).reshape(5, 7)


def placed(meshes):
    """The tensor in every placement; shares are unequal, and with [Shard(0), Shard(0)] one rank's share may be empty."""
    line, square = meshes
    for placement in (Shard(0), Shard(1), Replicate()):
        yield line, [placement]
    for placements in ([Shard(0), Shard(0)], [Shard(0), Shard(1)], [Replicate(), Shard(0)], [Shard(1), Replicate()]):
        yield square, placements


def resharding(executor, root, meshes):
    kinds = list(placed(meshes))
    for step, (mesh, placements) in enumerate(kinds, 1):
        state = {"t": distribute_tensor(WHOLE, mesh, placements)}
        dcp.save(state, storage_writer=ashore.torch.StorageWriter(executor, step))
    for step in range(1, len(kinds) + 1):
        for mesh, placements in kinds:
            state = {"t": distribute_tensor(torch.zeros(5, 7), mesh, placements)}
            dcp.load(state, storage_reader=ashore.torch.StorageReader(ashore.Catalog(root).checkpoint(step)))
            assert torch.equal(state["t"].full_tensor(), WHOLE), (step, mesh, placements)
    return len(kinds)


def order(executor, step, rank, mesh):
    """Ranks whose keys have another order save and load the same."""
    # torch makes and gathers them together, so in one order.
    made = {name: distribute_tensor(WHOLE + ord(name), mesh, [Shard(0)]) for name in "abc"}
    state = dict(sorted(made.items(), reverse=rank % 2 == 1))
    dcp.save(state, storage_writer=ashore.torch.StorageWriter(executor, step))
    for tensor in state.values():
        tensor.zero_()
    dcp.load(state, storage_reader=ashore.torch.StorageReader(executor.checkpoint(step)))
    assert all(torch.equal(state[name].full_tensor(), WHOLE + ord(name)) for name in "abc")


def failing(executor, step, rank, mesh):
    """A rank that fails while it plans or writes fails the save on all, at once; the next save is none the worse."""

    def fails(*_):
        raise ValueError("this rank fails")

    state = {"a": distribute_tensor(WHOLE, mesh, [Shard(0)]), "object": 1}
    for when in ("plan", "write"):
        writer = ashore.torch.StorageWriter(executor, step)
        bad = state
        if rank == 2 and when == "plan":
            writer.prepare_local_plan = fails
        elif rank == 2:
            bad = {**state, "object": lambda: None}  # cannot be pickled
        began = time.monotonic()
        try:
            dcp.save(bad, storage_writer=writer)
        except CheckpointException as e:
            said = str(e.failures[2][0])
            assert "this rank fails" in said if when == "plan" else "pickle" in said, e.failures
        else:
            raise AssertionError("the save did not fail")
        assert time.monotonic() - began < 60 and step not in executor.catalog.steps()
        step += 1
    dcp.save(state, storage_writer=ashore.torch.StorageWriter(executor, step))
    assert executor.latest().step == step


def main(root, rank, world, rendezvous):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    meshes = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (2, world // 2))
    ranks = {"ranks": (rank, world, rank), "run": "one"}
    with ashore.CheckpointExecutor(root, arena=8 << 20, chunk=1 << 20, **ranks) as executor:
        steps = resharding(executor, root, meshes)
        order(executor, steps + 1, rank, meshes[0])
        failing(executor, steps + 2, rank, meshes[0])
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
