#!/usr/bin/env python3
"""One save by one peer. Prints `ready` on stdout, waits for a line on stdin, saves, and prints what it cost as JSON.

    peer.py SYSTEM WORKLOAD SCALE whole|tiny DIR

The warm-up save is of the whole state, or of one tensor.
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
    """Random bits, the same for every system: compressible bits would favour systems that compress."""
    for index, (name, dtype, shape) in enumerate(tensors):
        kind = {"F32": numpy.uint32, "BF16": numpy.uint16}[dtype]
        yield name, numpy.random.default_rng(index).integers(0, 1 << (8 * workload.SIZE[dtype]), shape, dtype=kind)


def fsync(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def fsync_tree(root):
    """Fsyncs every file, every directory, and the root's entry above it; many at a time, to share the journal's commits."""
    paths = [root.parent]
    for folder, _, files in os.walk(root):
        paths += [folder, *(os.path.join(folder, name) for name in files)]
    with concurrent.futures.ThreadPoolExecutor(FSYNCS) as pool:
        list(pool.map(fsync, paths))


def main(name, kind, scale, warm, folder):
    # Libraries may print to stdout; our lines are for the parent process.
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
    # Some systems keep threads or processes that would outlive an ordinary exit.
    os._exit(0)


# The processes that a system starts import this file again.
if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4], pathlib.Path(sys.argv[5]).resolve())
