"""Trains a small model and publishes its bf16 weights after every step: publish.py CHAIN STEPS

Run follow.py beside it, on the same directory or URL. A trainer that is killed and restarted goes on with the
next version.
"""

import sys

import torch
from torch import nn

from ashore.chain import Publisher


def main(chain, steps):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(256, 128), nn.Linear(128, 256), nn.Tanh(), nn.Linear(256, 256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    with Publisher(chain, arena=16 << 20) as publisher:
        for step in range(1, steps + 1):
            text = torch.randint(0, 256, (8, 33))
            loss = nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            # Servers read the fp32 weights rounded to bf16, as new tensors that nothing writes.
            weights = {name: tensor.detach().bfloat16() for name, tensor in model.state_dict().items()}
            published = publisher.publish(weights, values={"step": step}).wait()
            share = published.bytes / published.full_bytes
            print(f"step {step}: version {published.version}, {published.kind}, {share:.2%} of the weights", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
