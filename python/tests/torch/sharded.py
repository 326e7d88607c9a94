"""One of several ranks that train with DTensors and save them by `ashore.torch.save`, or a process without ranks.

sharded.py ROOT RANK WORLD RENDEZVOUS BEGIN END: goes on from the newest step, which is BEGIN, or from nothing at 0.
"""

import hashlib
import sys

import ashore
import ashore.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

# With one more dimension of the mesh where the ranks are four.
PLACEMENTS = {
    "rows": ([Shard(0)], [Shard(0), Shard(1)]),
    "columns": ([Shard(1)], [Replicate(), Shard(1)]),
    "short": ([Shard(0)], [Shard(0), Shard(0)]),  # some ranks have nothing
    "everywhere": ([Replicate()], [Replicate(), Replicate()]),
}
SHAPES = {"rows": (7, 6), "columns": (2, 10), "short": (1, 3), "everywhere": (5,), "plain": (4,)}


class Model(nn.Module):
    def __init__(self, place):
        super().__init__()
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(place(name, whole(name, 0, shape))))
        self.register_buffer("counts", place("columns", torch.zeros(2, 10)))


def whole(name, step, shape):
    """The value of a tensor at the beginning, or its gradient in a step."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(100 * step + len(name))) - 0.5


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def train(root, rank, world, begin, end):
    dims = (2, 2) if world == 4 else (world,)
    mesh = init_device_mesh("cpu", dims) if world > 0 else None

    def place(name, tensor):
        if mesh is None or name == "plain":
            return tensor
        return distribute_tensor(tensor, mesh, PLACEMENTS[name][len(dims) - 1])

    torch.manual_seed(7 + rank)
    model = Model(place)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    progress = {"step": 0}
    state = ashore.torch.state(model=model, optimizer=optimizer, progress=progress, rng=ashore.torch.Rng())
    ranks = {"alone": True} if world == 0 else {"ranks": (rank, world, rank), "run": f"from {begin}"}
    with ashore.CheckpointExecutor(root, arena=8 << 20, chunk=1 << 20, detect="all", **ranks) as executor:
        ashore.torch.fence_before(executor, optimizer)
        if begin > 0:
            with torch.no_grad():
                for tensor in [*model.parameters(), *model.buffers()]:
                    tensor.zero_()
            ashore.torch.restore(executor.latest(), state)
            assert progress["step"] == begin, progress
        random = []
        while progress["step"] < end:
            step = progress["step"] = progress["step"] + 1
            random.append(torch.rand(1).item())
            for name, parameter in model.named_parameters():
                parameter.grad = place(name, whole(name, step, SHAPES[name]))
            optimizer.step()
            model.counts += step
            ashore.torch.save(executor, step, state)
            # What is saved is what it was in the call.
            with torch.no_grad():
                model.counts.add_(1000).sub_(1000)
    tensors = dict(model.state_dict())
    for number, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"{number}.{key}": value for key, value in entry.items()}
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        digest.update(full(tensor).numpy().tobytes())
    print("ended", digest.hexdigest(), random, flush=True)


def main(root, rank, world, rendezvous, begin, end):
    if world > 0:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    train(root, rank, world, begin, end)
    if world > 0:
        # No rank leaves the group while another one is still in it.
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))
