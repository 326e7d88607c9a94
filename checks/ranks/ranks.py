#!/usr/bin/env python3
"""Runs coordinators between real processes: `ranks.py PROGRAM MEANS...`.

PROGRAM is the example `rank`. MEANS are `directory`, `etcd` (starts an etcd-server) and `mpi` (by mpirun).
Each of them runs the conformance suite with several processes. With `directory` and `etcd` the script also
kills a rank amid its rounds: the others must name that rank, and the next job under the same token must work.
"""

import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid

import jobs

WORLD = 4


def check(holds, what):
    if not holds:
        sys.exit(f"ranks: {what}")


def start(program, arguments, rank, token):
    return jobs.start([program, *arguments], rank, WORLD, token)


def outputs(processes, patience=300):
    """Waits for all processes, and returns the exit code and output of each."""
    until = time.monotonic() + patience
    results = []
    for process in processes:
        try:
            output, _ = process.communicate(timeout=max(until - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            output, _ = process.communicate()
            check(False, f"a rank did not end in {patience} s:\n{output}")
        results.append((process.returncode, output))
    return results


def suite(program, arguments):
    token = f"suite-{uuid.uuid4()}"
    processes = [start(program, ["suite", *arguments], rank, token) for rank in range(WORLD)]
    ended = [(code == 0 and f"all behaviours rank={rank}" in output, rank, output)
             for rank, (code, output) in enumerate(outputs(processes))]  # fmt: skip
    # All of them, because one that fails leaves the others without a rank.
    failed = "\n".join(f"rank {rank} failed:\n{output}" for passed, rank, output in ended if not passed)
    check(not failed, failed)


def kill(program, arguments, victim, noticed_ms):
    """Kills one rank twice under one token; each time the others end with an error that names it."""
    token = f"kill-{uuid.uuid4()}"
    for _ in range(2):
        processes = [start(program, ["rounds", *arguments], rank, token) for rank in range(WORLD)]
        for process in processes:
            line = process.stdout.readline()
            check(line.startswith("met "), f"a rank did not meet the others: {line}")
        time.sleep(0.5)
        processes[victim].send_signal(signal.SIGKILL)
        results = outputs(processes, 60)
        for rank, (code, output) in enumerate(results):
            if rank == victim:
                continue
            ended = re.search(r"ended kind=(\w+) ranks=\[([\d, ]*)\] after_ms=(\d+)", output)
            check(code == 0 and ended, f"rank {rank} did not end in order: {output}")
            # Rank 0 knows of all ranks; the others wait for rank 0, which has ended when it saw the dead one.
            if rank == 0 or victim == 0:
                check(ended[1] == "Unavailable" and ended[2] == str(victim), f"rank {rank} names another: {output}")
                check(int(ended[3]) < noticed_ms, f"rank {rank} noticed it late: {output}")
            else:
                check(ended[2] == "0", f"rank {rank} names another: {output}")


def by_directory(program):
    with tempfile.TemporaryDirectory() as root:
        suite(program, ["directory", root])
        for victim in (2, 0):
            kill(program, ["directory", root], victim, 5000)


def by_etcd(program):
    with jobs.etcd() as address:
        suite(program, ["etcd", address])
        for victim in (2, 0):
            kill(program, ["etcd", address], victim, 15000)


def by_mpi(program):
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(WORLD), program, "suite", "mpi"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    for rank in range(WORLD):
        check(f"all behaviours rank={rank}" in done.stdout, f"rank {rank} failed:\n{done.stdout}")
    check(done.returncode == 0, f"mpirun failed:\n{done.stdout}")


def main():
    program, *means = sys.argv[1:]
    check(means, "give the program and at least one of directory, etcd, mpi")
    for name in means:
        began = time.monotonic()
        {"directory": by_directory, "etcd": by_etcd, "mpi": by_mpi}[name](program)
        print(f"ranks: {name}: {time.monotonic() - began:.0f} s")


main()
