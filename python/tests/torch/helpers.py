"""What the tests of `ashore.torch` share."""

import contextlib

import ashore
import torch
from torch import nn


@contextlib.contextmanager
def executor(root, **settings):
    with ashore.CheckpointExecutor(root, **{"arena": 4 << 20, "chunk": 1 << 20, "alone": True, **settings}) as made:
        yield made


def skips_saves(saves, monkeypatch):
    """Begins a large step 1 right before each save, which the policy `skip` therefore leaves out."""
    prepared = saves._save_prepared

    def behind(save):
        def call(*given, **options):
            # What is immutable needs no fence before the next save.
            prepared(1, ["large"], [torch.zeros(32 << 20)], immutable=True)
            return save(*given, **options)

        return call

    for name in ("save", "_save_prepared"):
        monkeypatch.setattr(saves, name, behind(getattr(saves, name)))


class Net(nn.Module):
    """Tied weights, a buffer that forward writes, one that is not saved, channels_last, a tied 0-d parameter."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(6)
        self.embed = nn.Linear(6, width, bias=False)
        self.head = nn.Linear(6, width)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.tied_scale = self.scale
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.register_buffer("none", None)
        self.register_buffer("empty", torch.empty(0, 4))

    def forward(self, x):
        x = self.norm(self.conv(x)).mean((2, 3))
        return self.tied_scale * (self.head(x) + self.embed(x))


def train(net, optimizer, steps=1, *, scheduler=None):
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def bits(tree):
    """A copy of a tree of tensors and values whose equality is that of bits."""
    if isinstance(tree, dict):
        return {key: bits(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(bits(value) for value in tree)
    if isinstance(tree, torch.Tensor):
        return str(tree.dtype), tuple(tree.shape), tree.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
    return tree
