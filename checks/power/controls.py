#!/usr/bin/env python3
"""Shows which broken promises `power.py` sees: the harness must be able to fail.

    checks/power/controls.py PROGRAM [--states N] [NAME...]

PROGRAM is the example `rank`, built with `--cfg mutants`. For each promise about what is durable when, and for each file system, disks
are judged until one fails, at most N. Exits 1 if a promise that must be seen is not seen on any of them.
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("program")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--states", default="1500")
    options = parser.parse_args()
    unseen = []
    for name in options.names or PROMISES:
        run, wanted = PROMISES[name]
        seen = {}
        for system in SYSTEMS:
            command = [sys.executable, POWER, options.program, "--systems", system, "--runs", run]
            command += ["--states", options.states, "--mutant"]
            done = subprocess.run(command, env=os.environ | {"ASHORE_MUTANT": name}, capture_output=True, text=True)
            lines = done.stdout.splitlines()
            if done.returncode == 0 and lines[-1:] == ["seen"]:
                seen[system] = lines[-2]
            elif done.returncode != 1 or not lines:
                sys.exit(f"{name} on {system} ended with {done.returncode}: {done.stdout}{done.stderr}")
        print(f"{name}: {', '.join(seen) or 'not seen'}", *seen.values(), sep="\n    ", flush=True)
        if wanted and not seen:
            unseen.append(name)
    if unseen:
        print(f"not seen, and were to be: {', '.join(unseen)}")
    return bool(unseen)


if __name__ == "__main__":
    sys.exit(main())
