#!/usr/bin/env python3
"""One save by one peer. Says `ready` on stdout, waits for a line on stdin, saves, and says as JSON what it took.

    peer.py SYSTEM WORKLOAD SCALE whole|tiny DIR

What is saved to warm up is the whole state, or one tensor.
"""
import concurrent.futures
import gc
import json
import os
import pathlib
import shutil
import sys
import time

import numpy
import systems
import tree
import workload

FSYNCS = 16


def arrays(tensors):
    """Random bits, the same for every system: what compresses well would flatter those who compress."""
    for index, (name, dtype, shape) in enumerate(tensors):
        kind = {"F32": numpy.uint32, "BF16": numpy.uint16}[dtype]
        yield name, numpy.random.default_rng(index).integers(0, 1 << (8 * workload.SIZE[dtype]), shape, dtype=kind)


def fsync(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def fsync_tree(root):
    """Every file, every directory, and the root's entry above it; many at a time, so that they share the journal's commits."""
    paths = [root.parent]
    for folder, _, files in os.walk(root):
        paths += [folder, *(os.path.join(folder, name) for name in files)]
    with concurrent.futures.ThreadPoolExecutor(FSYNCS) as pool:
        list(pool.map(fsync, paths))


def main(name, kind, scale, warm, folder):
    # Libraries may print; what we say is for who started us.
    say = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    tensors = workload.tensors(kind, scale)
    system = systems.make(name)
    state = system.state(arrays(tensors))
    use = tree.Use()
    first = folder / "first"
    first.mkdir()
    system.save(str(first / "state"), state if warm == "whole" else system.state(arrays(tensors[-1:])))()
    fsync_tree(first)
    shutil.rmtree(first)
    fsync(folder)
    gc.collect()

    print("ready", file=say)
    sys.stdin.readline()
    saved = folder / "save"
    saved.mkdir()
    use.begin()
    began = time.monotonic()
    wait = system.save(str(saved / "state"), state)
    blocked = time.monotonic() - began
    wait()
    done = time.monotonic() - began
    fsync_tree(saved)
    durable = time.monotonic() - began
    seconds, peak = use.seconds(), use.peak()

    size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    report = {
        "began": began,
        "blocked_seconds": blocked,
        "free_seconds": blocked,
        "done_seconds": done,
        "durable_seconds": durable,
        "cpu_seconds": seconds,
        "peak_bytes": peak,
        "tensors": len(tensors),
        "bytes": workload.size(tensors),
        "bytes_on_disk": size,
        "versions": system.versions,
    }
    print(json.dumps(report), file=say)
    # Some keep threads or processes that would outlive an ordinary end.
    os._exit(0)


# A system that starts processes imports this file again in them.
if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4], pathlib.Path(sys.argv[5]).resolve())
