"""A trainer that publishes its weights, and two servers that follow them, killed and started again until all are done.

    published.py DIR VERSIONS

Each life is a forked child. The trainer saves its steps, too, and goes on from the newest one: the weights it then
publishes are older ones, under the next number. Prints how often each was killed.
"""

import hashlib
import os
import random
import signal
import sys
import threading
import time
import traceback

import torch
from torch import nn

import ashore.chain
import ashore.torch

RATE = 1e-6


class Net(nn.Module):
    """A model with a tied weight that predicts bytes."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(64, 96)
        self.hidden = nn.Linear(96, 96)
        self.norm = nn.LayerNorm(96)
        self.head = nn.Linear(96, 64, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.hidden(self.wte(x)))))


def digest(tensors):
    """Of the bytes of all tensors, by no library of ours."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(torch.as_tensor(tensor).detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:24]


def log(dir, name):
    return open(os.path.join(dir, name), "a", buffering=1)


@torch.no_grad()
def rounds(masters, model):
    for p, master in zip(model.parameters(), masters.parameters()):
        p.copy_(master)


def train(dir, versions):
    torch.manual_seed(1)
    masters, model = Net(), Net().bfloat16()
    optimizer = torch.optim.AdamW(masters.parameters(), lr=RATE)
    progress = {"step": 0}
    state = ashore.torch.state(masters=masters, optimizer=optimizer, progress=progress)
    settings = dict(arena=4 << 20, chunk=1 << 20, keep_last=2, alone=True)
    intents = log(dir, "intents")
    with (
        ashore.CheckpointExecutor(os.path.join(dir, "steps"), **settings) as executor,
        ashore.chain.Publisher(os.path.join(dir, "chain"), grace=4, full_every=8) as publisher,
    ):
        if (found := executor.latest()) is not None:
            ashore.torch.restore(found, state)
        rounds(masters, model)
        while (publisher.newest or 0) < versions:
            batch = torch.randint(0, 64, (4, 9), generator=torch.Generator().manual_seed(progress["step"]))
            loss = nn.functional.cross_entropy(model(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten())
            model.zero_grad()
            loss.backward()
            executor.fence()  # from here on no save and no publish reads the masters or the model
            for p, master in zip(model.parameters(), masters.parameters()):
                master.grad = p.grad.float()
            optimizer.step()
            rounds(masters, model)
            progress["step"] += 1
            intents.write(f"{digest(model.state_dict())}\n")
            publish = executor.publish_delta(publisher, model.state_dict(), values=dict(progress))
            if progress["step"] % 5 == 0:
                ashore.torch.save(executor, progress["step"], state, overwrite=True)
            publish.wait(60)


def follow_in_place(dir, versions):
    model = Net().bfloat16()
    follow = ashore.chain.Follow(os.path.join(dir, "chain"), targets=model.state_dict(), poll_every=0.02)
    looks = log(dir, "in_place")
    while (follow.version or 0) < versions:
        follow.advance(0.1)
        if follow.version is not None:
            looks.write(f"{follow.version} {digest(model.state_dict())}\n")
            assert torch.isfinite(model(torch.arange(8)).float()).all()


def follow_double(dir, versions):
    follow = ashore.chain.Follow(
        os.path.join(dir, "chain"), switch="double", copy_to=os.path.join(dir, "own"), poll_every=0.02
    )
    looks, ended = log(dir, "double"), threading.Event()

    def serve():
        while True:
            last = ended.is_set()
            weights = follow.weights()
            if weights.version is not None:
                # The bits of bfloat16, which torch does not take from NumPy.
                looks.write(f"{weights.version} {digest({name: array.view('uint16') for name, array in weights.items()})}\n")
            if last:
                return
            time.sleep(0.001)

    server = threading.Thread(target=serve)
    server.start()
    try:
        while (follow.version or 0) < versions:
            follow.advance(0.1)
    finally:
        ended.set()
        server.join()


ROLES = {"trainer": train, "in_place": follow_in_place, "double": follow_double}


def life(role, dir, versions):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        ROLES[role](dir, versions)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def drive(dir, versions):
    chance = random.Random(os.getpid())
    os.mkdir(os.path.join(dir, "chain"))
    lives = {role: life(role, dir, versions) for role in ROLES}
    kills = dict.fromkeys(ROLES, 0)
    while lives:
        time.sleep(chance.uniform(0.05, 0.6))
        for role, child in list(lives.items()):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                assert status == 0, f"{role} failed: {status}"
                del lives[role]
        if lives and sum(kills.values()) < versions // 2:
            role = chance.choice(sorted(lives))
            os.kill(lives[role], signal.SIGKILL)
            os.waitpid(lives[role], 0)
            lives[role] = life(role, dir, versions)
            kills[role] += 1
    print(kills)


if __name__ == "__main__":
    torch.set_num_threads(1)
    drive(sys.argv[1], int(sys.argv[2]))
