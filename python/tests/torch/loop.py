"""A training loop that is killed and started again until it is done; it prints its lives, and its end as bits.

    loop.py ROOT STEPS KILLS[:FORGET]...

Each life of the loop is a forked child. FORGET is an object that a restore leaves out, to see that it matters. Several
loops run one after the other, to import torch once.
"""

import hashlib
import os
import random
import signal
import sys
import time
import traceback

import numpy
import torch
from torch import nn

import ashore
import ashore.torch

LENGTH = 24


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Dropout(0.2), nn.ReLU(), nn.Linear(64, 4))


def digest(*trees):
    found = hashlib.sha256()

    def add(tree):
        if isinstance(tree, dict):
            for key, value in sorted(tree.items(), key=str):
                found.update(str(key).encode())
                add(value)
        elif isinstance(tree, (list, tuple)):
            for value in tree:
                add(value)
        elif isinstance(tree, torch.Tensor):
            found.update(tree.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(tree).encode())

    add(trees)
    return found.hexdigest()


def live(root, steps, forget, report):
    """One life: from the newest durable step, or from the beginning, to the end."""
    torch.manual_seed(1)
    numpy.random.seed(2)
    random.seed(3)
    data = torch.randn(LENGTH, 4, 8)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=3)
    progress = {"step": 0, "order": torch.randperm(LENGTH), "skipped": 0}
    rng = ashore.torch.Rng()
    objects = dict(net=net, optimizer=optimizer, scheduler=scheduler, scaler=scaler, progress=progress, rng=rng)
    state = ashore.torch.state(**objects)

    with ashore.CheckpointExecutor(root, arena=4 << 20, chunk=1 << 20, keep_last=2, alone=True, detect="all") as executor:
        found = executor.latest()
        if found is not None:
            objects.pop(forget, None)
            keys = ashore.torch.restore(found, ashore.torch.state(**objects), strict=forget is None)
            assert forget is None or keys.unexpected_keys
        report(f"begins at {progress['step']}")
        with ashore.torch.fence_before(executor, optimizer):
            while progress["step"] < steps:
                step = progress["step"]
                batch = data[progress["order"][step % LENGTH]]
                batch = batch + numpy.random.rand() + random.random()
                optimizer.zero_grad()
                loss = net(batch).square().mean() * (float("inf") if step % 7 == 3 else 1.0)
                scaler.scale(loss).backward()
                before = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                progress["skipped"] += scaler.get_scale() < before
                scheduler.step()
                progress["step"] += 1
                if progress["step"] % LENGTH == 0:
                    progress["order"] = torch.randperm(LENGTH)
                ashore.torch.save(executor, step + 1, state)
                report(f"saved {step + 1}")
        executor.fence()
        assert progress["skipped"] > 0
    report("ends " + digest(state.tree()))


def drive(root, steps, kills, seed, forget=None):
    chance = random.Random(seed)
    lives, killed = [], 0
    while True:
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                live(root, steps, forget, lambda line: os.write(writes, line.encode() + b"\n"))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(writes)
        lines = os.fdopen(reads)
        said = [next(lines, "").strip()]
        if killed < kills:
            # Some time after some save: at any place of the loop, and of saves in flight.
            for _ in range(chance.randrange(max(1, 2 * steps // (kills + 1)))):
                said.append(next(lines, "").strip())
            time.sleep(chance.random() * 0.01)
            os.kill(child, signal.SIGKILL)
        said += [line.strip() for line in lines]
        _, status = os.waitpid(child, 0)
        lives.append(said[0])
        if said[-1].startswith("ends "):
            print(f"{'; '.join(lives)}; {said[-1]}", flush=True)
            return
        assert os.WIFSIGNALED(status), f"a life failed: {said}"
        killed += 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    root, steps, *loops = sys.argv[1:]
    for loop in loops:
        kills, _, forget = loop.partition(":")
        drive(os.path.join(root, loop), int(steps), int(kills), 7, forget or None)
