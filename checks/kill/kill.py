#!/usr/bin/env python3
"""Kills the real program in place of each call by which it changes its directory, and starts it again.

    checks/kill/kill.py [PROGRAM]

The script kills two runs at their first changing call, at their second, and so on, until one ends unharmed: a
run that begins with nothing, and a run that finds what killed runs left behind. After each kill, every listed
step must be sound, and no step that was reported durable may be missing. The next run must resume from the
newest step, end with the losses of a run that was never killed, and leave no files of the killed run behind.
"""
import collections
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import supervised

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = ["--model", "tiny", "--chunk", "16KiB", "--arena", "64KiB", "--json"]
KEPT = 2
EVERY = 10


class Watch:
    """Follows the changing calls below a directory; kills the program in place of the one with this number, from 1."""

    def __init__(self, base, kill_at=None):
        self.base, self.kill_at = str(base), kill_at
        self.seen, self.reported, self.killed = [], [], None

    def __call__(self, call):
        if not call.path.startswith(self.base) or re.search(r"/#\d+$", call.path):
            return False  # elsewhere, or the unnamed file by which the demo measures the disk
        self.seen.append(call)
        # An attempt's owner record is deleted after the step was reported durable, not before.
        if call.name == "unlinkat" and (owner := re.search(r"/\.step-(\d+)\.[-0-9a-f]+\.owner$", call.path)):
            self.reported.append(int(owner[1]))
        if len(self.seen) == self.kill_at:
            self.killed = call
        return self.killed is not None

    def what(self):
        """The killed call, without the parts that differ from run to run."""
        path = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID", self.killed.path.removeprefix(self.base))
        return f"{self.killed.name} {path}"


class Program:
    """The program, and what is known of its unharmed runs."""

    def __init__(self, path, base):
        self.path, self.base, self.losses = path, base, {}

    def demo(self, root, steps):
        return [self.path, "demo", "--dir", str(root), "--steps", str(steps), "--every", str(EVERY), *SMALL]

    def run(self, command):
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        # Other printed lines, such as what an attempt has left, are not part of the result.
        return done.returncode, done.stdout if done.stdout.strip() else done.stderr

    def finished(self, status, output):
        """The report of a demo that succeeded."""
        expect(status == 0, f"the demo ended with {status}: {output}")
        report = json.loads(output)
        expect(report["verified"], f"not verified: {output}")
        loss = self.loss(report["steps"])
        expect(report["final_loss_bits"] == loss, f"other losses than those of a run without a kill: {output}")
        return report

    def loss(self, steps):
        """The bits of the last loss of a run of so many steps."""
        if steps not in self.losses:
            with tempfile.TemporaryDirectory(dir=self.base) as root:
                status, output = self.run(self.demo(root, steps))
                expect(status == 0, f"a run that was not killed ended with {status}: {output}")
                self.losses[steps] = json.loads(output)["final_loss_bits"]
        return self.losses[steps]

    def listed(self, root):
        """The steps that are listed; all of them are sound, byte by byte."""
        if not root.exists():
            return []
        status, output = self.run([self.path, "ls", "--json", "--dir", str(root)])
        expect(status == 0, f"ls ended with {status}: {output}")
        rows = json.loads(output)
        if rows:
            expect(all(row["complete"] for row in rows), f"an incomplete step is listed: {output}")
            status, output = self.run([self.path, "verify", "--json", "--dir", str(root)])
            expect(status == 0, f"verify ended with {status}: {output}")
        return [row["step"] for row in rows]


class Failed(Exception):
    """A promise was not kept."""


def expect(held, otherwise):
    if not held:
        raise Failed(otherwise)


def hidden(root):
    """The entries of a root that are not steps. An owner record that is still empty may be another host's: it stays."""
    return [e for e in root.iterdir() if e.name.startswith(".") and e.name != ".runs" and not (e.suffix == ".owner" and e.stat().st_size == 0)]


def examine(program, root, steps, watch, before):
    """Checks what a killed run left, and runs the next one to its end. `before`: the steps at the killed run's start."""
    listed = program.listed(root)
    for step in {*before, *watch.reported}:
        newer = sum(other > step for other in listed)
        expect(step in listed or newer >= KEPT, f"step {step} was durable and is gone, listed are {listed}")
    report = program.finished(*program.run(program.demo(root, steps)))
    newest = max(listed, default=None)
    expect(report["resumed_from"] == newest, f"resumed from {report['resumed_from']}, the newest step was {newest}")
    goal = report["steps"]
    expected = [(goal - 1) // EVERY * EVERY, goal]
    listed = program.listed(root)
    expect(listed == expected, f"{listed} are listed after the next run, not {expected}")
    left = [entry.name for entry in hidden(root)]
    expect(not left, f"left behind by the next run: {left}")


class Killing:
    """Kills runs over copies of one directory, at each call in turn."""

    def __init__(self, program, name, steps, template=None):
        self.program, self.name, self.steps, self.template = program, name, steps, template
        self.kills, self.failures, self.attic = collections.Counter(), 0, {}

    def all(self):
        before = self.program.listed(self.template) if self.template else []
        began, number = time.monotonic(), 1
        while self.one(number, before):
            number += 1
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kills.items()))
        print(f"{self.name}: {self.kills.total()} kills ({kinds}) in {time.monotonic() - began:.0f} s", flush=True)

    def one(self, number, before):
        """False when the run ended before the call with this number."""
        with tempfile.TemporaryDirectory(dir=self.program.base) as base:
            root = pathlib.Path(base) / "root"
            if self.template:
                shutil.copytree(self.template, root)
            watch = Watch(base, number)
            status, output = supervised.run(self.program.demo(root, self.steps), watch)
            try:
                if watch.killed is None:
                    self.program.finished(status, output)
                    # The run log is written by a thread of its own, so the numbers of its calls vary from run to run.
                    counted = {call.name for call in watch.seen if "/.runs" not in call.path}
                    missed = counted - set(self.kills)
                    expect(not missed, f"no kill at {missed}")
                    return False
                expect(status == -9, f"the killed run ended with {status}: {output}")
                self.kills[watch.killed.name] += 1
                self.keep(root, watch)
                examine(self.program, root, self.steps, watch, before)
            except Failed as failure:
                self.failures += 1
                print(f"{self.name}: killed at call {number}, {watch.what() if watch.killed else 'none'}: {failure}")
            return watch.killed is not None

    def keep(self, root, watch):
        """Keeps a copy for each kind of thing that a killed run leaves behind."""
        what = watch.what()
        for kind, call in [
            ("trash", r"unlinkat .*\.trash-ID/model"),
            ("attempt", r"fsync .*0\.ID\.tmp/model"),
            ("owner", r"unlinkat .*0\.ID\.owner"),
        ]:
            if re.search(call, what):
                kept = pathlib.Path(self.program.base) / f"left-{kind}"
                shutil.rmtree(kept, ignore_errors=True)
                self.attic[kind] = shutil.copytree(root, kept)


def leftovers(attic):
    """One directory with a step that is half deleted, an attempt, and an owner record of a step that was published."""
    expect(set(attic) == {"trash", "attempt", "owner"}, f"no kill left what is needed: {set(attic)}")
    template = attic["trash"]
    for entry in hidden(attic["attempt"]) + hidden(attic["owner"]):
        if entry.is_dir():
            shutil.copytree(entry, template / entry.name)
        else:
            shutil.copy2(entry, template / entry.name)
    return template


def build():
    """The program, as `cargo test --workspace` builds it."""
    command = ["cargo", "build", "--package", "ashore-cli", "--message-format", "json"]
    built = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    executables = [json.loads(line).get("executable") for line in built.stdout.splitlines()]
    return next(filter(None, executables))


def main(path):
    # A kill loses nothing that the kernel has: memory serves as well as a disk, and is faster.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="ashore-kill-", dir=memory) as base:
        program = Program(path, base)
        fresh = Killing(program, "a run from nothing", 30)
        fresh.all()
        again = Killing(program, "a run over what others left", 31, leftovers(fresh.attic))
        again.all()
        failed = fresh.failures + again.failures
        print(f"{fresh.kills.total() + again.kills.total() - failed} passed, {failed} failed")
        sys.exit(failed > 0)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else build())
