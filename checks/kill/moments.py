#!/usr/bin/env python3
"""Kills runs at random moments, again and again over one directory: one process, and jobs of three ranks.

    checks/kill/moments.py PROGRAM [--kills N] [--seed N]

PROGRAM is the example `rank`. A run resumes from the newest step and saves as fast as it can. SIGKILL ends
one of its processes, or all of them, after a random time; in a third of the runs one process is stopped for a
while before. Then every listed step must hold the bytes that belong to its number, no step that was reported
durable may be missing unless two newer steps exist, and the reports of a survivor must agree with the steps.
Leftovers of killed runs must not accumulate: every 20 kills, an unharmed run must leave none of them.
"""
import argparse
import collections
import os
import pathlib
import random
import signal
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "ranks"))
import jobs  # noqa: E402

from jobs import Failed, expect  # noqa: E402

TIMEOUT_MS = 3000
CLEAN_EVERY = 20


class Run:
    """One kind of run over a directory that lives as long as this."""

    def __init__(self, program, name, world, base):
        self.program, self.name, self.world, self.root = program, name, world, f"{base}/{name}"
        self.known, self.number, self.ended = {}, 0, collections.Counter()

    def command(self, steps, timeout):
        if self.world == 1:
            return [self.program, "one", self.root, str(steps), str(timeout)]
        return [self.program, "saves", "directory", self.root, self.root, str(steps), str(timeout)]

    def kill_once(self, rng):
        """Kills one run, and judges what it left."""
        self.number += 1
        token = f"moments-{self.number}"
        command = self.command(1000, TIMEOUT_MS)
        processes = {rank: jobs.start(command, rank, self.world, token) for rank in range(self.world)}
        victim, everyone = rng.randrange(self.world), rng.random() < 0.4
        try:
            if rng.random() < 0.3:
                time.sleep(rng.uniform(0, 0.1))
                processes[victim].send_signal(signal.SIGSTOP)
                time.sleep(rng.uniform(0, 0.1))
                processes[victim].send_signal(signal.SIGCONT)
            time.sleep(rng.uniform(0, 0.25))
            dead = {*processes} if everyone else {victim}
            for rank in dead:
                processes[rank].kill()
            ended = jobs.ends(processes, 60)
        finally:
            for process in processes.values():
                process.kill()
        listed = jobs.look(self.program, self.root) if os.path.exists(self.root) else {}
        jobs.judge(self.known, listed, ended, dead, TIMEOUT_MS)
        for rank in ended:
            said = "killed" if rank.rank in dead else "durable" if not rank.failed else [*rank.failed.values()][0].kind
            self.ended[said] += 1
        self.known = listed

    def clean_once(self):
        """An unharmed run goes on from the newest step and leaves nothing of the dead."""
        self.number += 1
        command = self.command(2, 60_000)
        ended = jobs.ends({r: jobs.start(command, r, self.world, f"clean-{self.number}") for r in range(self.world)}, 100)
        newest = max(self.known, default=0)
        for rank in ended:
            expect(rank.status == 0 and rank.clean, f"an unharmed run did not end in order: {rank.output}")
            expect(sorted(rank.durable) == [newest + 1, newest + 2], f"an unharmed run did not save: {rank.output}")
        self.known = jobs.look(self.program, self.root)
        expect(sorted(self.known) == [newest + 1, newest + 2], f"after an unharmed run {sorted(self.known)} are listed")
        expect(not (left := jobs.hidden(self.root)), f"left behind after an unharmed run: {left}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("program")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None)
    given = parser.parse_args()
    seed = random.randrange(1 << 32) if given.seed is None else given.seed
    program, failures = os.path.abspath(given.program), 0
    with tempfile.TemporaryDirectory(prefix="ashore-moments-", dir=jobs.memory()) as base:
        for name, world in ("one", 1), ("ranks", 3):
            run, rng, began = Run(program, name, world, base), random.Random(f"{seed} {name}"), time.monotonic()
            for kill in range(1, given.kills // 2 + 1):
                try:
                    run.kill_once(rng)
                    if kill % CLEAN_EVERY == 0:
                        run.clean_once()
                except Failed as failure:
                    failures += 1
                    print(f"{name}: kill {kill} of seed {seed}: {failure}", flush=True)
            said = ", ".join(f"{count} {what}" for what, count in run.ended.most_common())
            took = time.monotonic() - began
            print(f"{name}: {given.kills // 2} kills, newest step {max(run.known, default=0)}; processes: {said}; {took:.0f} s", flush=True)
            expect(max(run.known, default=0) > given.kills // 20, "hardly any save became durable, so the check is blind")
    print(f"seed {seed}: {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
