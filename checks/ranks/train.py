#!/usr/bin/env python3
"""Kills ranks of a sharded training in the middle of saves and goes on with other numbers of ranks. The
weights must be, bit for bit, the weights of a run without interruption.

    checks/ranks/train.py PROGRAM

PROGRAM is the example 07_ranks; `stages.py` kills it under launchers. Exits 1 when a run ends with other weights, or does not end.
"""
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time

STEPS = 60
LIMIT_S = 120


def alone(program, root):
    """The last line of a run by one process."""
    told = subprocess.run([program, root, str(STEPS)], check=True, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S).stdout
    return re.search(r"sum=\w+", told)[0]


def start(program, root, world, run):
    """Starts the processes of a job, as torchrun would."""
    def rank(number):
        told = {"RANK": number, "WORLD_SIZE": world, "LOCAL_RANK": number, "TORCHELASTIC_RUN_ID": run, "TORCHELASTIC_RESTART_COUNT": 0}
        environment = os.environ | {name: str(value) for name, value in told.items()}
        return subprocess.Popen([program, root, str(STEPS)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return [rank(number) for number in range(world)]


def end(ranks):
    """Waits until all ranks have ended; returns their exit codes."""
    until = time.monotonic() + LIMIT_S
    for rank in ranks:
        try:
            rank.communicate(timeout=max(1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            for other in ranks:
                other.kill()
            sys.exit("a rank goes on after the others have ended")
    return [rank.returncode for rank in ranks]


def steps(root):
    found = [int(path.name.removeprefix("step-")) for path in pathlib.Path(root).glob("step-*")]
    return max(found, default=0)


def killed(program, root, seed):
    """Kills one rank, rank 0, or all, again and again, and goes on with other numbers of ranks; returns the story."""
    rng, story = random.Random(seed), []
    for turn in range(30):
        world = [4, 2, 3, 8, 1][turn % 5] if turn else 4
        before, ranks = steps(root), start(program, root, world, f"{seed}-{turn}")
        whom = rng.choice(["one", "first", "all", "none"] if turn > 12 else ["one", "first", "all"])
        time.sleep(rng.uniform(0.02, 0.5))
        for rank in {"one": ranks[-1:], "first": ranks[:1], "all": ranks, "none": []}[whom]:
            rank.kill()
        codes = end(ranks)
        story.append(f"{world} ranks, killed {whom}: {before} to {steps(root)}")
        if all(code == 0 for code in codes):
            return story
    sys.exit(f"never ended: {story}")


def main():
    program = sys.argv[1]
    folder = tempfile.mkdtemp(prefix="ashore-train-")
    try:
        expected = alone(program, f"{folder}/alone")
        for seed in range(3):
            root = f"{folder}/{seed}"
            story = killed(program, root, seed)
            assert alone(program, root) == expected, story
            print(f"the same weights after {len(story)} starts: {'; '.join(story)}")
    finally:
        shutil.rmtree(folder)


main()
