#!/usr/bin/env python3
"""Kills a sharded training at every stage of a save, under torchrun and mpirun, and goes on with other numbers of ranks.

    checks/ranks/stages.py PROGRAM [--mpirun] [--torchrun TORCHRUN] [--sample N]

PROGRAM is the example 07_ranks. The script kills a job of four ranks in its second save, at a stage of rank 0
or of rank 1: that rank alone, or all four. Both launchers end a job when one of its ranks dies. Then a job of
2, 3 or 8 ranks goes on. Its weights must be, bit for bit, the weights of a run without interruption, which
the script computes itself. In the end the program itself makes such a run. `--sample` runs N of the kills of
each launcher.
"""
import argparse
import itertools
import os
import pathlib
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time

import jobs
from jobs import Failed, expect

jobs.kill_tools()
import supervised  # noqa: E402

ROWS, COLUMNS = 1000, 100
LIMIT_S = 120

# What a rank is about to do, as the call that it is killed in place of; `+` is the call after that one.
TMP = r"/\.STEP\.[-0-9a-f]+\.tmp"
STAGES = {
    1: {
        "create its shard": rf"openat .*{TMP}/shard-00001.*\.safetensors",
        "write its shard": rf"pwrite64 .*{TMP}/shard-00001.*\.safetensors",
        "fsync its shard": rf"fsync .*{TMP}/shard-00001.*\.safetensors",
        "write its rows": rf"pwrite64 .*{TMP}/shard-00001.*\.table",
        "leave the note of its files": rf"\+fsync .*{TMP}/shard-00001.*\.table",
        "fsync the names": rf"fsync .*{TMP}",
        "send its receipt": r"rename .*/1-receipt-1",
        "wait for the outcome": r"\+rename .*/1-receipt-1",
    },
    0: {
        "create the attempt": rf"mkdirat .*{TMP}",
        "tell that all may write": r"rename .*/1-agree-told",
        "write its shard": rf"pwrite64 .*{TMP}/shard-00000.*\.safetensors",
        "fsync its names": rf"fsync .*{TMP}",
        "write the structure": rf"openat .*{TMP}/tensors\.table",
        "fsync the files' table": rf"fsync .*{TMP}/files\.table",
        "write the manifest": rf"pwrite64 .*{TMP}/manifest\.json",
        "fsync the manifest": rf"fsync .*{TMP}/manifest\.json",
        "claim": r"renameat2? .*/\.STEP\..*\.claimed",
        "publish": r"renameat2? .*/STEP",
        "fsync the root": r"\+renameat2? .*/STEP",
        "tell the outcome": r"rename .*/1-outcome-told",
        "write the hint": r"\+rename .*/1-outcome-told",
        "delete its owner record": r"unlinkat .*/\.STEP\..*\.owner",
        "begin the next save": r"\+unlinkat .*/\.STEP\..*\.owner",
    },
}


class Kill:
    """Kills at a stage of the save of a step."""

    def __init__(self, stage, step, folder, whom):
        self.after = stage.startswith(r"\+")
        self.pattern = re.compile(stage.removeprefix(r"\+").replace("STEP", f"step-{step:08}"))
        self.seen, self.folder, self.whom = False, folder, whom

    def __call__(self, call):
        if self.after and self.seen:
            return self.kill()
        if self.pattern.fullmatch(f"{call.name} {call.to or call.path}"):
            self.seen = True
            return not self.after and self.kill()
        return False

    def kill(self):
        (self.folder / "reached").touch()
        for other in self.folder.glob("pid-*") if self.whom == "all" else []:
            os.kill(int(other.read_text()), signal.SIGKILL)
        return True


def rank(folder, victim, whom, stage, step, *command):
    """What a launcher starts as one rank: the program itself, or, as the victim, its supervisor."""
    number = os.environ.get("RANK") or os.environ["OMPI_COMM_WORLD_RANK"]
    folder = pathlib.Path(folder)
    if number != victim:
        (folder / f"pid-{number}").write_text(str(os.getpid()))
        os.execv(command[0], command)

    # The launcher ends its ranks when the first one dies: this one has still to kill its program.
    signal.signal(signal.SIGTERM, lambda *_: None)
    _, output = supervised.run(list(command), Kill(STAGES[int(victim)][stage], int(step), folder, whom))
    print(output, flush=True)
    # The launcher must see what it would see of the program.
    os.kill(os.getpid(), signal.SIGKILL)


def expected(step):
    """The last words of an uninterrupted run to this step: the weights of a row are equal, and a rank changes only its own."""
    total, mask = 0, (1 << 64) - 1
    for row in range(ROWS):
        weight = 1.0
        for now in range(1, step + 1):
            weight = weight * 0.99 + float(now * 31 + row)
        [bits] = struct.unpack("<Q", struct.pack("<d", weight))
        for _ in range(COLUMNS):
            total = ((total << 5 | total >> 59) & mask) ^ bits
    return f"step={step} sum={total:016x}"


def told(output, world):
    """The last words of a run, when it ended well."""
    last = re.search(rf"step=(\d+) ranks={world} sum=(\w+)", output)
    return f"step={last[1]} sum={last[2]}" if last else f"nothing: {output}"


def steps(root):
    return max([int(path.name.removeprefix("step-")) for path in pathlib.Path(root).glob("step-*")], default=0)


class Launcher:
    """Starts jobs; `command` makes the beginning of a command line from the number of ranks and of the job."""

    def __init__(self, name, command, program, root, folder):
        self.name, self.command, self.program, self.root, self.folder = name, command, program, root, folder
        self.numbers = itertools.count()

    def job(self, world, goal, *inside):
        command = [*self.command(world, next(self.numbers)), *inside, self.program, self.root, str(goal)]
        # A launcher that hangs is ended with all that it started.
        job = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            output, _ = job.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            raise Failed(f"the job did not end in {LIMIT_S} s: {job.communicate()[0]}") from None
        return job.returncode, output

    def kill(self, victim, whom, stage):
        """One kill, and the job that goes on."""
        before = steps(self.root)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            inside = [sys.executable, os.path.abspath(__file__), "--rank", folder, str(victim), whom, stage, str(before + 2)]
            status, output = self.job(4, before + 4, *inside)
            expect((pathlib.Path(folder) / "reached").exists(), f"rank {victim} never came there: {output}")
        expect(status != 0, f"{self.name} took a killed rank for a success: {output}")
        newest = steps(self.root)
        # Once it is published, the step is there.
        least = before + 1 + (victim == 0 and list(STAGES[0]).index(stage) > list(STAGES[0]).index("publish"))
        expect(least <= newest <= before + 2, f"the newest step is {newest}, and was {before}: {output}")
        world = [2, 3, 8][next(self.worlds)]
        status, output = self.job(world, newest + 1)
        want = expected(newest + 1)
        expect(status == 0 and told(output, world) == want, f"{world} ranks went on to {told(output, world)}, not to {want}")

    def all(self, kills):
        began, failures = time.monotonic(), 0
        self.worlds = itertools.cycle(range(3))
        for victim, whom, stage in kills:
            try:
                self.kill(victim, whom, stage)
            except Failed as failure:
                failures += 1
                print(f"{self.name}: killed {whom} where rank {victim} is about to {stage}: {failure}", flush=True)
        last = steps(self.root)
        with tempfile.TemporaryDirectory(dir=self.folder) as alone:
            done = subprocess.run([self.program, f"{alone}/root", str(last)], check=True, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S)
        expect(told(done.stdout, 1) == expected(last), f"an uninterrupted run ended otherwise: {done.stdout}")
        took = time.monotonic() - began
        print(f"stages under {self.name}: {len(kills)} kills, and on with 2, 3 and 8 ranks to step {last}; {failures} failed; {took:.0f} s")
        return failures


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("program")
    arguments.add_argument("--torchrun")
    arguments.add_argument("--mpirun", action="store_true")
    arguments.add_argument("--sample", type=int)
    given = arguments.parse_args()
    program = os.path.abspath(given.program)
    kills = [(victim, whom, stage) for victim in STAGES for stage in STAGES[victim] for whom in ("one", "all")]
    launchers = {}
    if given.mpirun:
        launchers["mpirun"] = lambda world, _: ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(world)]
    if given.torchrun:
        torchrun = [given.torchrun, "--no-python", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        launchers["torchrun"] = lambda world, turn: [*torchrun, "--rdzv-id", f"run{turn}", "--nproc-per-node", str(world)]
    failures = 0
    for at, (name, command) in enumerate(launchers.items()):
        apart = len(kills) / min(given.sample or len(kills), len(kills))
        # Each launcher has its own part of the sample.
        chosen = [kills[int(apart * (turn + at / len(launchers)))] for turn in range(round(len(kills) / apart))]
        with tempfile.TemporaryDirectory(prefix="ashore-stages-", dir=jobs.memory()) as folder:
            failures += Launcher(name, command, program, f"{folder}/root", folder).all(chosen)
    sys.exit(failures > 0)


if __name__ == "__main__":
    rank(*sys.argv[2:]) if sys.argv[1:2] == ["--rank"] else main()
