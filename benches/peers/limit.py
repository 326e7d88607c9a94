#!/usr/bin/env python3
"""Measures the disk's limit: the seconds in which BYTES become durable when no library is involved.

    limit.py DIR BYTES

A fresh file, its space reserved, random bytes in direct writes of 8 MiB by four threads, fsync; then a small file beside it,
written, fsynced, renamed, and the directory fsynced, as every checkpoint needs. It runs twice; the second run counts.
"""
import concurrent.futures
import mmap
import os
import sys
import threading
import time

CHUNK, THREADS, PAGE = 8 << 20, 4, 4096
own = threading.local()


def prepare(noise):
    # Aligned, as direct writes require; in huge pages, because a write from many small ones becomes many
    # requests.
    own.buffer = mmap.mmap(-1, CHUNK, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    own.buffer.madvise(mmap.MADV_HUGEPAGE)
    own.buffer.write(noise)


def write(descriptor, offset, end):
    length = min(CHUNK, end - offset)
    with memoryview(own.buffer) as view, view[:length] as part:
        if os.pwrite(descriptor, part, offset) != length:
            raise OSError(f"short write at {offset}")


def main(folder, size):
    with concurrent.futures.ThreadPoolExecutor(THREADS, initializer=prepare, initargs=(os.urandom(CHUNK),)) as pool:
        # Starts every thread, and so fills every buffer, before the clock runs.
        barrier = threading.Barrier(THREADS)
        list(pool.map(lambda _: barrier.wait(), range(THREADS)))
        # The first run warms up, as the save before a timed save does.
        for _ in range(2):
            seconds = run(pool, folder, -(-size // PAGE) * PAGE)
        print(seconds)


def run(pool, folder, end):
    """One run's seconds, without the deletion of its files."""
    began = time.monotonic()
    descriptor = os.open(f"{folder}/data", os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_DIRECT, 0o644)
    os.posix_fallocate(descriptor, 0, end)
    list(pool.map(lambda offset: write(descriptor, offset, end), range(0, end, CHUNK)))
    os.fsync(descriptor)
    os.close(descriptor)
    commit(folder)
    seconds = time.monotonic() - began
    os.unlink(f"{folder}/data")
    os.unlink(f"{folder}/manifest")
    return seconds


def commit(folder):
    descriptor = os.open(f"{folder}/new", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    os.write(descriptor, b"x" * PAGE)
    os.fsync(descriptor)
    os.close(descriptor)
    os.rename(f"{folder}/new", f"{folder}/manifest")
    directory = os.open(folder, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
