#!/usr/bin/env python3
"""Shows which broken promises `power.py` detects, because a harness must be able to fail.

    checks/power/controls.py PROGRAM [--states N] [NAME...]

PROGRAM is the example `rank`, built with `--cfg mutants`. For each promise about what is durable when, and
for each file system, the script judges disks until one fails, at most N. Exits 1 if a broken promise that
must be seen is seen on no file system, or if a model in which an fsync counts before it has returned is not
refuted on every file system.
"""
import argparse
import os
import pathlib
import subprocess
import sys

POWER = pathlib.Path(__file__).resolve().parent / "power.py"
SYSTEMS = ["ext4", "xfs", "btrfs"]

# Each with the run that it concerns, and whether it must be seen. The others are seen by the crash model alone: the page
# `docs/faults.md` says why.
PROMISES = {
    "ShardFsync": ("one", True),
    "FileFsync": ("one", True),
    "AttemptFsync": ("one", True),
    "ParentFsync": ("one", True),
    "OwnerFsync": ("one", False),
    "TrashFsync": ("one", False),
    "PublishFirst": ("one", True),
    "TruncateLate": ("one", False),
    "SessionFsync": ("ranks", False),
    "Receipts": ("ranks", False),
    "ToldFirst": ("ranks", False),
}


def seen(system, options, *more, **variables):
    """The disk that `power.py` refuses first, or None."""
    command = [sys.executable, POWER, options.program, "--systems", system, "--states", options.states, *more]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines[-1:] == ["seen"]:
        return lines[-2]
    if done.returncode != 1 or not lines:
        sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return None


def report(name, by_system):
    """Prints where a fault is seen, and returns on how many file systems."""
    where = {system: line for system, line in by_system.items() if line}
    print(f"{name}: {', '.join(where) or 'not seen'}", *where.values(), sep="\n    ", flush=True)
    return len(where)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("program")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--states", default="1500")
    options = parser.parse_args()
    unseen = []
    for name in options.names or PROMISES:
        run, wanted = PROMISES[name]
        by_system = {s: seen(s, options, "--runs", run, "--mutant", ASHORE_MUTANT=name) for s in SYSTEMS}
        if not report(name, by_system) and wanted:
            unseen.append(name)
    if not options.names:
        early = "a model in which an fsync counts early"
        if report(early, {s: seen(s, options, "--runs", "one", "--early") for s in SYSTEMS}) < len(SYSTEMS):
            unseen.append(early)
    if unseen:
        print(f"not seen, and were to be: {', '.join(unseen)}")
    return bool(unseen)


if __name__ == "__main__":
    sys.exit(main())
