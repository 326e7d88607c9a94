#!/usr/bin/env python3
"""Kills one or all ranks of a job with its root or second tier in an object store, and goes on with another
number of ranks.

    checks/stores/ranks.py PROGRAM [--rounds N] [--seed N]

PROGRAM is the example `rank`, built with the feature `s3`; `checks/stores/run.py` sets where the server is.
In each round, a job of four ranks goes on from the newest step, and saves. At a random moment the script
kills one rank, or all of them. The reports of the survivors must agree with the steps that exist, which are
compared byte by byte. A job with another number of ranks, whose processes meet in another directory and know
only the URL, must go on from there. Rounds with a tier have the root in a directory and the store behind it:
the next job has another directory, and must go on from the newest step of the store.
"""
import argparse
import os
import pathlib
import random
import sys
import tempfile
import time
import uuid

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "ranks"))
import jobs
from jobs import Failed, expect

WORLD, TIMEOUT_MS = 4, 8000


def look(program, root):
    """The steps; none where no job has come so far as to make the root."""
    try:
        return jobs.look(program, root)
    except Failed as failure:
        if "no step was ever saved" not in str(failure):
            raise
        return {}


def round_of(program, root, number, chance):
    """One job that is killed, and the one that goes on."""
    token = f"stores-{uuid.uuid4().hex[:8]}"
    before = look(program, root)
    with tempfile.TemporaryDirectory() as here:
        command = [program, "saves", "directory", here, root, "1000", str(TIMEOUT_MS)]
        processes = {rank: jobs.start(command, rank, WORLD, token) for rank in range(WORLD)}
        whom = "all" if number % 2 else "one"
        dead = {*range(WORLD)} if whom == "all" else {(number // 2) % WORLD}
        try:
            time.sleep(chance.uniform(1.0, 4.0))
            for rank in dead:
                processes[rank].kill()
            ended = jobs.ends(processes, 60)
        finally:
            for process in processes.values():
                process.kill()
    listed = look(program, root)
    try:
        jobs.judge(before, listed, ended, dead, TIMEOUT_MS)
    except Failed as failure:
        raise Failed(f"{failure}\n" + "\n".join(f"rank {rank.rank}: {rank.output}" for rank in ended)) from None
    durable = max((len(rank.durable) for rank in ended), default=0)

    world, newest = [2, 3, 5][number % 3], max(listed, default=0)
    with tempfile.TemporaryDirectory() as elsewhere:
        command = [program, "saves", "directory", elsewhere, root, "1", "30000"]
        os.chdir(elsewhere)
        ended = jobs.ends({rank: jobs.start(command, rank, world, token, 1) for rank in range(world)}, 100)
        os.chdir("/")
    for rank in ended:
        expect(rank.status == 0 and rank.clean and rank.met, f"rank {rank.rank} of the next job did not end in order: {rank.output}")
        expect(int(rank.met[1]) == newest, f"the newest step was {newest}: {rank.output}")
        expect(list(rank.durable) == [newest + 1], f"rank {rank.rank} of the next job did not save: {rank.output}")
    after = jobs.look(program, root)
    expect(sorted(after) == sorted([*listed, newest + 1])[-jobs.KEPT:], f"listed are {after} after {listed}")
    print(f"ranks: {whom} of {WORLD} killed after {durable} saves, newest {newest}; {world} went on", flush=True)
    return newest


def round_of_tier(program, tier, number, chance):
    """One job with a tier that is killed, and the one that goes on elsewhere from the tier alone."""
    os.environ["ASHORE_TIER"] = tier
    token = f"tiers-{uuid.uuid4().hex[:8]}"
    known = max(look(program, tier), default=0)
    whom = "all" if number % 2 else "one"
    dead = {*range(WORLD)} if whom == "all" else {(number // 2) % WORLD}
    with tempfile.TemporaryDirectory() as home:
        command = [program, "saves", "directory", home, home, "1000", str(TIMEOUT_MS)]
        processes = {rank: jobs.start(command, rank, WORLD, token) for rank in range(WORLD)}
        try:
            time.sleep(chance.uniform(1.0, 4.0))
            for rank in dead:
                processes[rank].kill()
            ended = jobs.ends(processes, 60)
        finally:
            for process in processes.values():
                process.kill()
    said = "\n".join(f"rank {rank.rank}: {rank.output}" for rank in ended)
    for rank in ended:
        expect(not rank.met or int(rank.met[1]) == known, f"the newest step of the tier was {known}:\n{said}")
        expect(rank.rank in dead or rank.status == 0 and (rank.met or rank.failed), f"rank {rank.rank} did not end in order:\n{said}")
    there = look(program, tier)
    durable = {step: attempt for rank in ended for step, attempt in rank.durable.items()}
    for step in [step for step in there if step > known]:
        expect(there[step] == durable.get(step, there[step]), f"step {step} is another attempt in the tier: {there}\n{said}")

    world, newest = [2, 3, 5][number % 3], max(there, default=0)
    with tempfile.TemporaryDirectory() as elsewhere:
        command = [program, "saves", "directory", elsewhere, elsewhere, "1", "30000"]
        ended = jobs.ends({rank: jobs.start(command, rank, world, token, 1) for rank in range(world)}, 100)
    for rank in ended:
        expect(rank.status == 0 and rank.clean and rank.met, f"rank {rank.rank} of the next job did not end in order: {rank.output}")
        expect(int(rank.met[1]) == newest, f"the newest step of the tier was {newest}: {rank.output}")
    after = look(program, tier)
    expect(after.get(newest + 1) == ended[0].durable[newest + 1], f"step {newest + 1} was not promoted: {after}")
    print(f"ranks: {whom} of {WORLD} killed after {len(durable)} saves, newest in the tier {newest}; {world} went on elsewhere", flush=True)
    return newest


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("program", type=pathlib.Path)
    arguments.add_argument("--rounds", type=int, default=4)
    arguments.add_argument("--seed", type=int, default=time.time_ns())
    given = arguments.parse_args()
    os.environ |= {
        "AWS_ENDPOINT_URL": os.environ["ASHORE_TEST_MOTO"], "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": os.environ["ASHORE_TEST_KEY"], "AWS_SECRET_ACCESS_KEY": os.environ["ASHORE_TEST_SECRET"],
    }  # fmt: skip
    program, root = str(given.program.resolve()), f"s3://bucket/ranks-{uuid.uuid4().hex}"
    print(f"ranks: seed {given.seed}", flush=True)
    chance = random.Random(given.seed)
    try:
        reached = [round_of(program, root, number, chance) for number in range(given.rounds)]
        expect(reached[-1] > 0, "no job saved a step before it was killed")
        tier = f"s3://bucket/tiers-{uuid.uuid4().hex}"
        reached = [round_of_tier(program, tier, number, chance) for number in range(given.rounds)]
        expect(reached[-1] > 0, "no job promoted a step before it was killed")
    except Failed as failure:
        sys.exit(f"ranks: {failure}")


if __name__ == "__main__":
    main()
