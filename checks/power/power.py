#!/usr/bin/env python3
"""Cuts the power of a real file system at recorded moments, and judges what the real program then finds.

    checks/power/power.py PROGRAM [--systems ext4,xfs,btrfs] [--runs one,ranks] [--states N] [--seed N] [--mutant] [--early]

PROGRAM is the example `rank`. It saves steps on a file system on a disk that records every write and every
flush (nbdkit, nbdfuse, a loop device). Afterwards the script builds disks that a power loss may have left:
all writes before a flush, and any subset of the writes between it and the next flush, whole or torn at 4096
or 512 bytes. It mounts each disk. Every listed step must hold the bytes that belong to its number. Every step
that was reported durable before the flush must exist, or two newer steps. Then the program goes on from the
newest step, saves one more, and the disk is judged again.

The run also records its system calls. First, the script compares the tree that it finds with what the
simulated file system (`src/testing/simfs`) predicts for these calls: names, lengths and every byte. So a real
kernel tests the model with which the program is tested. With --early, an fsync counts in the model before it
has returned, and the exit status is 0 if a state fails.

Needs root. With --mutant, the program was built with a broken promise (ASHORE_MUTANT), and the exit status is
0 if a state fails.
"""
import argparse
import collections
import contextlib
import os
import pathlib
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "ranks"))
import jobs  # noqa: E402

from jobs import Failed, expect  # noqa: E402

MIB = 1 << 20
# Size, and the commands that make a file system and mount it. Small, because every state is a disk of its own.
SYSTEMS = {
    "ext4": (48 * MIB, ["mkfs.ext4", "-q", "-F", "-J", "size=4"], "noatime"),
    "xfs": (300 * MIB, ["mkfs.xfs", "-q", "-f", "-K"], "noatime,nouuid"),
    "btrfs": (128 * MIB, ["mkfs.btrfs", "-q", "-f", "-K", "-M"], "noatime"),
}
RECORD = struct.Struct("<BQI")
WRITE = 1
# A save of a few kilobytes ends in milliseconds; the limit is for a program that hangs.
TIMEOUT_MS = 20_000


def command(*arguments, **more):
    return subprocess.run([str(a) for a in arguments], check=True, stdout=subprocess.PIPE, text=True, timeout=60, **more).stdout


@contextlib.contextmanager
def loop(file):
    """A loop device over a file."""
    device = command("losetup", "--find", "--show", file).strip()
    try:
        yield device
    finally:
        command("losetup", "--detach", device)


class NotMounted(Exception):
    """The file system itself did not survive: nothing can be said of the program."""


@contextlib.contextmanager
def mounted(device, kind, at):
    try:
        command("mount", "-t", kind, "-o", SYSTEMS[kind][2], device, at)
    except subprocess.CalledProcessError as refused:
        raise NotMounted(f"{kind} does not mount: {refused}") from None
    try:
        yield
    finally:
        command("umount", at)


@contextlib.contextmanager
def recorded(disk, log, base):
    """A file that is the disk, and whose writes and flushes are recorded."""
    at = pathlib.Path(base) / "recorded"
    at.mkdir()
    serve = ["nbdkit", "-s", "--exit-with-parent", "python", HERE / "recorder.py", f"disk={disk}", f"log={log}"]
    fuse = subprocess.Popen([str(a) for a in ["nbdfuse", at, "--command", *serve]], stdin=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 20
        while not (at / "nbd").exists():
            expect(fuse.poll() is None and time.monotonic() < until, "nbdfuse did not start")
            time.sleep(0.05)
        yield at / "nbd"
    finally:
        subprocess.run(["fusermount3", "-u", str(at)], check=False)
        fuse.wait(20)


class Acknowledged:
    """What the running programs reported as durable, with the position in the log that was reached by then."""

    def __init__(self, log):
        self.log, self.steps, self.lock = log, [], threading.Lock()

    def follow(self, process):
        for line in process.stdout:
            position = os.path.getsize(self.log)
            if m := re.match(r"durable step=(\d+) attempt=(\S+)", line):
                with self.lock:
                    self.steps.append((position, int(m[1]), m[2]))

    def run(self, commands, world, token, **variables):
        """Runs a process for each rank to its end."""
        processes = [jobs.start(command, rank, world, token, **variables) for rank, command in enumerate(commands)]
        threads = [threading.Thread(target=self.follow, args=(p,)) for p in processes]
        for thread in threads:
            thread.start()
        for thread, process in zip(threads, processes):
            thread.join(60)
            expect(process.wait(10) == 0, f"the program ended with {process.returncode}")

    def before(self, position):
        return {step: attempt for at, step, attempt in self.steps if at <= position}


def saves(program, kind, root, steps):
    """The commands of a job that saves `steps` more steps, and its number of ranks."""
    if kind == "one":
        return [[program, "one", root, str(steps), str(TIMEOUT_MS)]]
    # The messages lie beside the root: the model knows nothing of them, because they do not go through the storage.
    messages = str(pathlib.Path(root).with_name("messages"))
    return [[program, "saves", "directory", messages, root, str(steps), str(TIMEOUT_MS)]] * 3


class Model:
    """The simulated file system, which knows the system calls of a run and is asked about the trees that are found."""

    def __init__(self, program, record, mount, early):
        command = [program, "admits", str(record), str(mount)] + ["early"] * early
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer()

    def answer(self):
        line = self.process.stdout.readline().strip()
        expect(line, f"the model ended with {self.process.poll()}")
        return line

    def admits(self, flush):
        """Raises unless a power loss between the flush that ends at this position and the one before may leave the tree."""
        print(flush, file=self.process.stdin, flush=True)
        answer = self.answer()
        expect(answer == "admitted", f"the model has {answer}")

    def close(self):
        self.process.stdin.close()
        self.process.wait(10)


class Recording:
    """One run of the program on a disk, and the writes, flushes and system calls that it made."""

    def __init__(self, program, system, kind, base, model):
        self.system, self.kind, self.program = system, kind, program
        self.base = pathlib.Path(base) / f"{system}-{kind}"
        self.base.mkdir()
        self.at = self.base / "mount"
        self.at.mkdir()
        self.blank, self.log, record = self.base / "blank", self.base / "log", self.base / "calls"
        size, make, _ = SYSTEMS[system]
        with open(self.blank, "wb") as file:
            file.truncate(size)
        command(*make, self.blank)
        disk = self.base / "disk"
        shutil.copyfile(self.blank, disk)
        self.log.touch()
        self.acknowledged = Acknowledged(self.log)
        with recorded(disk, self.log, self.base) as file, loop(file) as device, mounted(device, system, self.at):
            # Two jobs: the second goes on from what the first has left, and deletes its oldest steps.
            for job, steps in enumerate((4, 3)):
                commands = saves(program, kind, str(self.at / "run"), steps)
                variables = {"ASHORE_RECORD": str(record), "ASHORE_RECORD_DISK": str(self.log)}
                self.acknowledged.run(commands, len(commands), f"power-{job}", **variables)
            self.end = os.path.getsize(self.log)
        disk.unlink()
        expect(len(self.acknowledged.before(self.end)) == 7, f"not all steps were saved: {self.acknowledged.steps}")
        self.epochs = list(self.read())
        # It is asked nothing where the program breaks a promise: a state must then fail by what the program finds.
        self.model = Model(program, record, self.at, early=model == "early") if model else None

    def read(self):
        """The writes between two flushes, with the position of the flush that ends them."""
        log, at, writes = self.log.read_bytes()[: self.end], 0, []
        while at < len(log):
            what, offset, length = RECORD.unpack_from(log, at)
            at += RECORD.size
            if what == WRITE:
                writes.append((offset, log[at : at + length]))
                at += length
            else:
                yield writes, at
                writes = []
        yield writes, self.end + 1

    def disks(self, states, rng):
        """Disks that a power loss may have left: bytes to write over the blank disk, and the flushes before and after it."""
        for _ in range(states):
            epoch = rng.randrange(len(self.epochs))
            flushed = self.epochs[epoch - 1][1] if epoch else 0
            durable = [write for writes, _ in self.epochs[:epoch] for write in writes]
            pending, next_flush = self.epochs[epoch]
            odds = rng.choice([0.0, 0.1, 0.5, 0.9])
            tear = rng.choice([None, 4096, 512])
            kept = [write for write in self.torn(pending, tear) if rng.random() < odds]
            yield f"flush {epoch} of {len(self.epochs)}, {odds} of {tear or 'whole'}", durable + kept, flushed, next_flush

    @staticmethod
    def torn(writes, size):
        for offset, data in writes:
            for at in range(0, len(data), size or len(data)):
                yield offset + at, data[at : at + (size or len(data))]

    def judge(self, writes, flushed, next_flush):
        """Mounts a disk, judges it, goes on from it and judges it again. Returns the number of steps that it had."""
        disk = self.base / "state"
        command("cp", "--sparse=always", self.blank, disk)
        with open(disk, "r+b", buffering=0) as file:
            for offset, data in writes:
                os.pwrite(file.fileno(), data, offset)
        with loop(disk) as device, mounted(device, self.system, self.at):
            if self.model:
                self.model.admits(next_flush)
            root = str(self.at / "run")
            listed = jobs.look(self.program, root) if os.path.exists(root) else {}
            for step, attempt in self.acknowledged.before(flushed).items():
                newer = sum(other > step for other in listed)
                expect(listed.get(step) == attempt or newer >= jobs.KEPT, f"step {step} was durable and is gone: {listed}")
            next_step = max(listed, default=0) + 1
            after = Acknowledged(self.log)
            commands = saves(self.program, self.kind, root, 1)
            after.run(commands, len(commands), "power-after")
            expect({step for _, step, _ in after.steps} == {next_step}, f"the next run did not save step {next_step}")
            kept = sorted([*listed, next_step])[-jobs.KEPT :]
            found = jobs.look(self.program, root)
            expect(sorted(found) == kept, f"{sorted(found)} are listed after the next run, not {kept}")
        disk.unlink()
        return len(listed)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("program")
    parser.add_argument("--systems", default="ext4,xfs,btrfs")
    parser.add_argument("--runs", default="one,ranks")
    parser.add_argument("--states", type=int, default=300, help="over all file systems and runs together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mutant", action="store_true", help="a failing state is what is wanted")
    parser.add_argument("--early", action="store_true", help="the model is wrong, and a failing state is what is wanted")
    options = parser.parse_args()
    wanted = options.mutant or options.early
    model = None if options.mutant else "early" if options.early else "true"
    program = str(pathlib.Path(options.program).resolve())
    pairs = [(system, kind) for system in options.systems.split(",") for kind in options.runs.split(",")]
    failures = total = 0
    with tempfile.TemporaryDirectory(prefix="ashore-power-", dir=jobs.memory()) as base:
        for system, kind in pairs:
            began, had, unmounted = time.monotonic(), collections.Counter(), 0
            recording = Recording(program, system, kind, base, model)
            took = time.monotonic() - began
            rng = random.Random(f"{options.seed} {system} {kind}")
            for what, writes, *flushes in recording.disks(-(-options.states // len(pairs)), rng):
                total += 1
                try:
                    had[recording.judge(writes, *flushes)] += 1
                except NotMounted:
                    unmounted += 1
                except (Failed, subprocess.CalledProcessError) as failure:
                    failures += 1
                    print(f"{system} {kind}: {what}: {failure}", flush=True)
                    if wanted:
                        print("seen")
                        return 0
            flushes, writes = len(recording.epochs) - 1, sum(len(w) for w, _ in recording.epochs)
            steps = ", ".join(f"{count} with {number} steps" for number, count in sorted(had.items()))
            print(
                f"{system} {kind}: {writes} writes and {flushes} flushes recorded in {took:.1f} s; states: {steps}, "
                f"{unmounted} that did not mount; {time.monotonic() - began - took:.1f} s",
                flush=True,
            )
            expect(unmounted <= 2 + had.total() // 20, "too many states did not mount, so the check is blind")
            if recording.model:
                recording.model.close()
            expect(wanted or len(had) > 1, "all states had the same number of steps, so the check is blind")
    print(f"{total} states, {failures} failures")
    return int(wanted or failures > 0)


if __name__ == "__main__":
    sys.exit(main())
