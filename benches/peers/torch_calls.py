#!/usr/bin/env python3
"""Times the call of `ashore.torch.save` by the number of tensors, from a state prepared once; the first two saves are shown apart.

    torch_calls.py [--dir DIR] [--saves 20]

Parameters of 4 KiB each, with SGD's momentum: as many tensors of momentum as parameters. Milliseconds, medians. Beside the time of
the call is the CPU time of its thread, which a machine that does other things changes less; then the wait of the fence behind it,
and the walk of `state_dict` by torch itself.
"""
import argparse
import statistics
import tempfile
import time

import torch

import ashore
import ashore.torch


def timed(call):
    """Milliseconds, those of this thread's CPU, and the result."""
    began, busy = time.perf_counter(), time.thread_time()
    result = call()
    return 1e3 * (time.perf_counter() - began), 1e3 * (time.thread_time() - busy), result


def main():
    parser = argparse.ArgumentParser(description="the call of ashore.torch.save")
    parser.add_argument("--dir", default=None)
    parser.add_argument("--saves", type=int, default=20)
    options = parser.parse_args()
    print("| tensors | first two saves | save | its CPU time | fence | torch's own state_dict |\n|---|---|---|---|---|---|")
    for count in (900, 40_000):
        model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(32, 32)) for _ in range(count // 2)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for parameter in model:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        state = ashore.torch.state(model=model, optimizer=optimizer)
        with tempfile.TemporaryDirectory(dir=options.dir) as root:
            with ashore.CheckpointExecutor(root, arena=256 << 20, keep_last=1, links=False) as executor:
                calls, busy, fences = [], [], []
                for step in range(2 + options.saves):
                    optimizer.step()
                    taken, cpu, save = timed(lambda step=step: ashore.torch.save(executor, step, state))
                    calls.append(taken)
                    busy.append(cpu)
                    fences.append(timed(executor.fence)[0])
                    save.wait()
        own = statistics.median(timed(lambda: (model.state_dict(), optimizer.state_dict()))[0] for _ in range(5))
        first = ", ".join(f"{taken:.2f}" for taken in calls[:2])
        later = (f"{statistics.median(values[2:]):.2f} ms" for values in (calls, busy, fences))
        print(f"| {count:,} | {first} ms | {' | '.join(later)} | {own:.2f} ms |", flush=True)


if __name__ == "__main__":
    main()
