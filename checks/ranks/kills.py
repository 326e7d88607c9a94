#!/usr/bin/env python3
"""Kills one rank, or all of them, in place of each call by which rank 0 or rank 1 changes the directory.

    checks/ranks/kills.py PROGRAM MEANS... [--sample N]

PROGRAM is the example `rank`, MEANS are `directory` and `etcd`. A job of three ranks meets in a directory
with two steps, saves the next step and leaves. The script kills it at its first changing call, at its second,
and so on, until a run ends unharmed. After each kill, the survivors must have ended by their deadline; their
reports must agree with the steps that exist, all of which are compared byte by byte; and a job with another
number of ranks must go on and clean up. `--sample` runs N of the kills, spread over all.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import os
import random
import re
import shutil
import sys
import tempfile
import time

import jobs
from jobs import Failed, expect

jobs.kill_tools()
import supervised  # noqa: E402

WORLD = 3
TIMEOUT_MS = 6000
# Most of a case is waiting; by etcd nearly all of it, because a dead rank is noticed by the deadline.
AT_ONCE = {"directory": 6, "etcd": 12}


class Watch:
    """Counts the calls that change the root, and kills the job in place of the one with this number, from 1."""

    def __init__(self, root, kill_at, others):
        self.root, self.kill_at, self.others = root, kill_at, others
        self.seen, self.killed = 0, None

    def __call__(self, call):
        if not call.path.startswith(self.root):
            return False
        self.seen += 1
        if self.seen != self.kill_at:
            return False
        path = (call.to or call.path).removeprefix(self.root)
        self.killed = f"{call.name} {re.sub(r'[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}', 'ID', path)}"
        for other in self.others:
            other.kill()
        return True


def one(case):
    """Runs one case; returns what was killed, how the survivors ended, and why it is wrong, if it is."""
    program, base, means, victim, whom, number = case
    with tempfile.TemporaryDirectory(dir=base) as folder:
        root, token = f"{folder}/root", f"kill-{os.path.basename(folder)}"
        shutil.copytree(f"{base}/template", root)
        means = [means[0], means[1] + (f"#/{token}" if means[0] == "etcd" else root)]
        command = [program, "saves", *means, root, "1", str(TIMEOUT_MS)]
        before = jobs.look(program, root)
        others = {rank: jobs.start(command, rank, WORLD, token) for rank in range(WORLD) if rank != victim}
        watch = Watch(root, number, others.values() if whom == "all" else [])
        try:
            status, output = supervised.run(command, watch, jobs.environment(victim, WORLD, token))
            dead = {*range(WORLD)} if whom == "all" else {victim}
            ended = [*jobs.ends(others, 60), jobs.Ended(victim, status, output)]
        finally:
            for other in others.values():
                other.kill()
        told = []
        try:
            listed = jobs.look(program, root)
            if watch.killed is None:
                dead = set()
                expect(all(list(rank.durable) == [3] and rank.clean for rank in ended), "an unharmed job did not save")
            else:
                expect(status == -9, f"the killed rank ended with {status}: {output}")
            jobs.judge(before, listed, ended, dead, TIMEOUT_MS)
            told = [how(rank, dead) for rank in ended if rank.rank not in dead]
            jobs.go_on(program, means, root, listed, [2, 4][number % 2], token, 1)
            return watch.killed, told, None
        except Failed as failure:
            return watch.killed, told, f"{failure}\n" + "\n".join(f"rank {rank.rank}: {rank.output}" for rank in ended)


def how(rank, dead):
    """How a survivor ended. Its failure names a dead rank, unless a busy server did not answer in its last moments."""
    if rank.durable:
        return "Durable"
    [failure] = rank.failed.values()
    expect(set(failure.ranks) & dead or "etcd does not answer" in rank.output, f"rank {rank.rank} names no dead rank: {rank.output}")
    return failure.kind


def all_of(program, base, means, sample):
    """Runs the kills by one means; returns the number of failures."""
    began, kills, outcomes, failures = time.monotonic(), collections.Counter(), collections.Counter(), 0
    # An unharmed run says how many calls there are; a later one may make some more.
    counted = {victim: count(program, base, means, victim) for victim in (0, 1)}
    cases = [
        (program, base, means, victim, whom, number)
        for victim in (0, 1) for whom in ("one", "all") for number in range(1, counted[victim] + 4)
    ]  # fmt: skip
    if sample:
        apart = max(len(cases) / sample, 1)
        first = random.uniform(0, apart)
        cases = [cases[int(first + apart * at)] for at in range(int(len(cases) / apart)) if first + apart * at < len(cases)]
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(AT_ONCE[means[0]]))
        stack.callback(pool.shutdown, cancel_futures=True)
        for case, (killed, told, wrong) in zip(cases, pool.map(one, cases)):
            _, _, _, victim, whom, number = case
            kills["none" if killed is None else killed.split()[0]] += 1
            outcomes.update(told)
            if wrong:
                failures += 1
                print(f"{means[0]}: rank {victim}, {whom} killed at call {number}, {killed}: {wrong}", flush=True)
    if not sample:
        expect(kills["none"], "the last kill was not the last call")
    missed = {"renameat2", "fsync", "openat", "unlinkat"} - set(kills)
    expect(sample or not missed, f"no kill at {missed}")
    told = ", ".join(f"{count} {kind}" for kind, count in outcomes.most_common())
    kinds = ", ".join(f"{count} {kind}" for kind, count in kills.most_common())
    print(f"kills by {means[0]}: {kills.total()} ({kinds}); survivors: {told}; {failures} failed; {time.monotonic() - began:.0f} s", flush=True)
    return failures


def count(program, base, means, victim):
    """The number of calls of an unharmed run."""
    with tempfile.TemporaryDirectory(dir=base) as folder:
        root, token = f"{folder}/root", f"count-{os.path.basename(folder)}"
        shutil.copytree(f"{base}/template", root)
        place = means[1] + (f"#/{token}" if means[0] == "etcd" else root)
        command = [program, "saves", means[0], place, root, "1", "60000"]
        others = {rank: jobs.start(command, rank, WORLD, token) for rank in range(WORLD) if rank != victim}
        watch = Watch(root, None, [])
        status, output = supervised.run(command, watch, jobs.environment(victim, WORLD, token))
        for rank in [*jobs.ends(others, 60), jobs.Ended(victim, status, output)]:
            expect(rank.status == 0 and list(rank.durable) == [3], f"an unharmed job did not save: {rank.output}")
        return watch.seen


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("program")
    arguments.add_argument("means", nargs="+", choices=["directory", "etcd"])
    arguments.add_argument("--sample", type=int)
    given = arguments.parse_args()
    program, failures = os.path.abspath(given.program), 0
    with tempfile.TemporaryDirectory(prefix="ashore-kills-", dir=jobs.memory()) as base, contextlib.ExitStack() as servers:
        template = f"{base}/template"
        for restart in range(2):
            listed = jobs.look(program, template) if restart else {}
            jobs.go_on(program, ["directory", template], template, listed, 2, "template", restart)
        for name in given.means:
            place = servers.enter_context(jobs.etcd()) if name == "etcd" else ""
            failures += all_of(program, base, (name, place), given.sample)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
