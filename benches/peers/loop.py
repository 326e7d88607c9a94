#!/usr/bin/env python3
"""Stands for a training program: multiplies matrices on one thread until its stdin ends, then prints when each ended.

    loop.py
"""
import json
import os
import sys
import threading
import time

os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
import numpy  # noqa: E402  reads the environment when it is loaded

SIDE = 512


def main():
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    a, b = numpy.random.default_rng(0).random((2, SIDE, SIDE), dtype=numpy.float32)
    c, times = numpy.empty_like(a), []
    while not ended.is_set():
        numpy.matmul(a, b, out=c)
        times.append(time.monotonic())
    json.dump(times, sys.stdout)


if __name__ == "__main__":
    main()
