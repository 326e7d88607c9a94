#!/usr/bin/env python3
"""Runs `abuse` while its wall clock, and the times of its files, jump forwards and back.

    checks/abuse/jumps.py PROGRAM ROOT SECONDS

libfaketime gives the processes another wall clock, up to ten years away, which changes every few
milliseconds. Their monotonic clock stays correct, as it does when a real clock is set. libfaketime does not
change the clock with which a kernel stamps files, so this script sets the times of the files in the root at
random instead. `abuse` judges every save, list, prune and sweep. The check also fails when no jump has
reached the library: the run log, which the library writes by the wall clock, must jump back and forth by
years.
"""
import json
import os
import pathlib
import random
import subprocess
import sys
import time

YEAR_S = 365 * 24 * 3600
JUMPS_S = [0, 1, 3600, 86_400, YEAR_S, 10 * YEAR_S]


def library():
    found = sorted(pathlib.Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not found:
        sys.exit("jumps: libfaketime is missing: .ci/install installs it")
    return found[0]


def jump():
    return random.choice([-1, 1]) * random.choice(JUMPS_S)


def set_times(root):
    """Sets the times of one file or directory below the root, which may go at any moment."""
    for directory, _, files in os.walk(root):
        name = os.path.join(directory, random.choice(files or ["."]))
        if random.random() < 0.2:
            try:
                os.utime(name, (time.time(), time.time() + jump()), follow_symlinks=False)
            except FileNotFoundError:
                pass


def run(program, root, seconds):
    """Returns how often the clock jumped."""
    pathlib.Path(root).mkdir()
    clock = pathlib.Path(root).with_suffix(".clock")
    clock.write_text("+0")
    variables = {
        "LD_PRELOAD": str(library()), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1",
    }  # fmt: skip
    process = subprocess.Popen([program, root, seconds], env=os.environ | variables, stdin=subprocess.DEVNULL)
    jumps = 0
    while process.poll() is None:
        # Replaced as a whole: a program that reads half a number would have another clock.
        new = clock.with_suffix(".new")
        new.write_text(f"{jump():+d}")
        new.replace(clock)
        set_times(root)
        jumps += 1
        time.sleep(0.01)
    if process.returncode:
        sys.exit(f"jumps: the program ended with {process.returncode}")
    return jumps


def logged(root):
    """The times in the run logs, in the order in which each process wrote them."""
    for log in sorted(pathlib.Path(root, ".runs").iterdir()):
        at = [json.loads(line).get("at") for line in log.read_text().splitlines()]
        yield [time_us for time_us in at if time_us]


def main():
    program, root, seconds = sys.argv[1:]
    jumps = run(str(pathlib.Path(program).resolve()), root, seconds)
    years = [[(b - a) / 1e6 / YEAR_S for a, b in zip(at, at[1:])] for at in logged(root)]
    forth, back = (sum(step * sign > 0.9 for log in years for step in log) for sign in (1, -1))
    print(f"the clock jumped {jumps} times; the run logs went {forth} times forth and {back} times back by a year or more")
    return not (forth and back)


if __name__ == "__main__":
    sys.exit(main())
