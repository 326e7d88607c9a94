"""Serves a model whose weights follow a chain: follow.py CHAIN STEP

Ends when the weights are those of training step STEP. With a GPU, the model lies in GPU memory; otherwise
versions are written straight into the model's memory.
"""

import sys
import time

import torch
from torch import nn

import ashore
from ashore.chain import Follow
from ashore.torch import apply_update


def followed(chain, **settings):
    """Returns the follower as soon as the trainer has begun."""
    while True:
        try:
            return Follow(chain, **settings)
        except ashore.NotFoundError:
            time.sleep(0.2)


def main(chain, last):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(nn.Embedding(256, 128), nn.Linear(128, 256), nn.Tanh(), nn.Linear(256, 256))
    model = model.to(device, torch.bfloat16).eval()
    tensors = model.state_dict()
    follow = followed(chain) if device == "cuda" else followed(chain, targets=tensors)
    step = 0
    while step < last:
        update = follow.next()  # read and checked; the model is still the version before
        step = update.values()["step"]
        # Apply between two batches, while nothing reads the model.
        version = apply_update(follow, update, tensors) if device == "cuda" else follow.apply(update)
        with torch.inference_mode():
            answer = model(torch.arange(32, device=device)).argmax(-1)
        print(f"version {version} of step {step}: {answer[:4].tolist()}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
