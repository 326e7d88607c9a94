#!/usr/bin/env python3
"""Saves state in GPU memory and writes it again as soon as a fence allows it: restores must be bit for bit.

  drive.py --face LIBRARY --dir DIR [--backend driver|torch] [--device cuda:0|cpu] [--library DRIVER]
           [--saves N] [--seconds S] [--out FILE] [SCENARIO...]

One JSON line for each scenario: how many saves were checked, how many bytes were wrong, and the outcome: `ok`, `wrong` or
`failed: why`, or both. With --out, the lines go to that file too, and scenarios that are `ok` there are not run again. The exit status
is 1 when anything was wrong or failed.

The backend `torch` works on tensors of torch; `driver` on memory from the driver alone, which may be the simulated one.
"""
import argparse
import importlib.util
import itertools
import json
import operator
import os
import random
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

import face
import stock


class Run:
    """The parts of a scenario: the training program, its executors, and the count of checked saves."""

    def __init__(self, options, backend, library):
        self.options, self.backend, self.library = options, backend, library
        self.random = random.Random(options.seed)

    def begin(self, name, seconds):
        self.root = self.options.dir / f"drive-{os.getpid()}-{name}"
        self.saves, self.wrong, self.late, self.notes, self.steps, self.unchecked = 0, 0, 0, {}, itertools.count(1), []
        self.end = self.until = time.monotonic() + seconds

    def executors(self, **settings):
        """Three executors: one whose fences on streams wait until copies are queued, one whose fences copy chunks late on the
        GPU, and one that looks for forgotten fences at each save (there must be none) and queues a chunk's copies in one call."""
        chunk = self.backend.chunk
        kinds = [{"scratch": 0, "detect": "never"}, {"scratch": 32 * chunk, "detect": "never"}]
        kinds = kinds[: 1 if self.backend.device == "host" else 2]
        kinds += [{**kinds[-1], "detect": "all", "batch": True}] * ("detect" not in settings)
        for at, kind in enumerate(kinds):
            now = time.monotonic()
            self.until = now + (self.end - now) / (len(kinds) - at)
            chosen = {"chunk": chunk, "arena": 8 * chunk, "keep_last": 8, **kind, **settings}
            with face.Executor(self.library, self.root, self.backend.device, **chosen) as executor:
                about = executor.report.partition("scratch: ")[2].partition(", ")[0]
                executor.scratch = kind["scratch"]
                self.notes.setdefault("scratch", {})[kind["scratch"]] = about
                yield executor
            self.library.wait_released()

    def trials(self):
        """As many trials as requested, while there is time."""
        for trial in range(self.options.saves):
            if trial > 2 and time.monotonic() > self.until:
                self.notes["stopped"] = f"after {trial} of {self.options.saves}: out of time"
                return
            yield trial

    def fence(self, executor, save, streams):
        """Waits in one of the ways until tensors may be written."""
        kind = self.random.choice(["on streams"] * 2 * bool(streams) + ["on the host", "staged"])
        if kind == "on streams":
            executor.fence_on(streams)
        elif kind == "on the host":
            executor.fence()
        else:
            save.staged()

    def check_later(self, *saved):
        """Checks the save before the last two, so that several are in flight."""
        self.unchecked.append(saved)
        self.check_rest(2)

    def check_rest(self, leave=0):
        while len(self.unchecked) > leave:
            self.check(*self.unchecked.pop(0))

    def check(self, step, save, image):
        """Waits for the save, and compares the bytes on disk with those at its call."""
        committed = save.wait(120)
        self.late += committed.late_chunks if committed else 0
        ours, expected = face.Step(self.library, self.root, step), image()
        theirs = stock.read(self.root / f"step-{step:08}" / "model.safetensors")
        for name in expected.keys() | theirs.keys():
            right = expected.get(name, b"")
            wrong = max(differ(read, right) for read in (theirs.get(name, b""), ours.read(name, len(right))))
            self.wrong += wrong
            if wrong:
                self.notes.setdefault("first wrong", f"step {step}: {name}")
        self.saves += 1


def differ(one, other):
    """How many bytes differ."""
    return 0 if one == other else sum(map(operator.ne, one, other)) + abs(len(one) - len(other))


def train(run, make):
    """Saves every few steps, with the host ahead of the device; every tensor is written again right after each fence."""
    for executor in run.executors():
        program = make()
        for trial in run.trials():
            for _ in range(run.random.randint(1, 4)):
                program.forward()
                program.update()
            step, image = next(run.steps), program.image()
            if crowded := trial % 2 == 0 and bool(program.streams) and executor.scratch > 0:
                run.check_rest()  # slots of earlier saves would make this fence wait
                run.backend.crowd(True)
            save = executor.save(step, program.tensors())
            if crowded:
                # The fence comes before much has left the GPU: its late copies must be right.
                executor.fence_on(program.streams)
            else:
                for _ in range(run.random.randint(0, 2)):
                    program.forward()
                run.fence(executor, save, program.streams)
            program.update()
            if crowded:
                # The kernels of the fence come after all work that the program has queued, and run before
                # anything leaves the GPU.
                run.backend.settle(program.handles)
                run.backend.crowd(False)
            run.check_later(step, save, image)
        run.check_rest()


def graph(run, make):
    """The whole step is a captured graph; save and fence come between its launches. ashore refuses both during the capture."""

    def refused(call, *arguments):
        try:
            call(*arguments)
        except face.Failed as error:
            assert error.kind == "Invalid" and "captur" in str(error), error
            return True

    for executor in run.executors():
        program = make()
        taken = []
        program.capture(lambda: taken.append(refused(executor.save, next(run.steps), program.tensors())))
        assert taken == [True], "a save of tensors of a stream that was being captured was accepted"
        program.slow(True)
        step, image = next(run.steps), program.image()
        save = executor.save(step, program.tensors())
        program.capture(lambda: taken.append(refused(executor.fence_on, program.streams)))
        program.slow(False)
        assert taken[1] or program.soon_staged, "a fence on a stream that was being captured was accepted"
        run.notes["in a capture"] = "save refused, fence " + ("refused" if taken[1] else "came when all was staged")
        executor.fence()
        program.update()
        run.check(step, save, image)

    def captured():
        program = make()
        program.capture(lambda: None)
        return program

    train(run, captured)


def reuse(run, make):
    """The program frees its tensors right after the fence; another stream allocates their memory and writes it."""
    again = 0
    for executor in run.executors():
        program = make()
        for trial in run.trials():
            program.allocate(run.random, trial)
            program.update()
            program.slow(True)
            step, image = next(run.steps), program.image()
            save = executor.save(step, program.tensors())
            run.fence(executor, save, program.streams)
            old = program.free()
            if trial % 2:  # at the latest
                run.library.wait_released()
                program.finish()
            again += len(old & program.reuse())
            program.slow(False)
            run.check_later(step, save, image)
        run.check_rest()
    run.notes["addresses given out again"] = again


def second_save(run, make):
    """ashore refuses a second save without a fence while it may still read the first; the first is saved right."""
    refused = 0
    for executor in run.executors():
        program = make()
        for _ in run.trials():
            program.forward()
            program.update()
            program.slow(True)
            step, image = next(run.steps), program.image()
            save = executor.save(step, program.tensors())
            try:
                executor.save(next(run.steps), program.tensors())
            except face.Failed as error:
                assert error.kind == "Invalid" and "unfenced" in str(error), error
                refused += 1
            program.slow(False)
            executor.fence()
            program.update()
            run.check(step, save, image)
    run.notes["refused"] = refused
    assert refused, "no second save was refused"


def forgotten(run, make):
    """Tensors are written without a fence: the save must fail, or have the bytes from before the write."""
    counts = {"failed": 0, "right": 0, "published wrong": 0}
    for executor in run.executors(detect="all"):
        program = make()
        for _ in run.trials():
            program.update()
            step, image = next(run.steps), program.image()
            save = executor.save(step, program.tensors())
            program.update()  # no fence
            try:
                save.wait(120)
            except face.Failed as error:
                counts["failed"] += 1
                assert error.kind == "Invalid", error
                run.saves += 1
            else:
                before = run.wrong
                run.check(step, save, image)
                counts["right" if run.wrong == before else "published wrong"] += 1
            executor.fence()
    run.notes["came of it"] = counts


def small_buffers(run, make):
    """Small tensors that change between save and fence, as statistics of a batch norm do, are captured at the save."""
    for executor in run.executors():
        program = make()
        for _ in run.trials():
            program.update()
            step, image = next(run.steps), program.image()
            save = executor.save(step, program.tensors(capture_small=True))
            program.update_small()
            run.fence(executor, save, program.streams)
            program.update()
            run.check(step, save, image)


# How each scenario runs, and with what: the driver alone, torch on a GPU, torch on the CPU.
SCENARIOS = {
    "legacy": (train, "driver", "torch"),
    "side": (train, "driver", "torch"),
    "two-streams": (train, "driver", "torch"),
    "host": (train, "driver", "torch", "cpu"),
    "counters": (train, "driver"),
    "adamw-foreach": (train, "torch", "cpu"),
    "adamw-fused": (train, "torch", "cpu"),
    "graph": (graph, "driver", "torch"),
    "reuse": (reuse, "driver", "torch", "cpu"),
    "second-save": (second_save, "driver", "torch", "cpu"),
    "forgotten-host": (forgotten, "driver", "torch", "cpu"),
    "forgotten": (forgotten, "driver", "torch"),
    "small-buffers": (small_buffers, "driver", "torch", "cpu"),
}


# In these scenarios the fence comes before everything has left the GPU: some chunks must be copied late.
LATE = {"legacy", "side", "adamw-fused", "graph"}


def outcome(run, backend, name, make):
    try:
        SCENARIOS[name][0](run, make)
    except Exception as error:
        traceback.print_exc()
        try:
            run.check_rest()
        except Exception:
            traceback.print_exc()
        return f"{'wrong, ' * bool(run.wrong)}failed: {type(error).__name__}: {error}"
    if not run.wrong and name in LATE and backend.device != "host" and not run.late:
        return "failed: no chunk was copied late, so fences that copy late have not been tried"
    return "wrong" if run.wrong else "ok"


def one(options, name):
    """Runs a scenario, and prints its line."""
    if options.backend == "driver":
        import by_driver as by
    else:
        import by_torch as by
    backend, start = by.Backend(options), time.monotonic()
    run = Run(options, backend, face.Face(options.face))
    run.begin(name, options.seconds)
    line = {"scenario": name, "device": backend.name}
    line["outcome"] = outcome(run, backend, name, backend.programs()[name])
    line |= {"saves": run.saves, "wrong_bytes": run.wrong, "late chunks": run.late, "seconds": round(time.monotonic() - start, 2), **run.notes}
    shutil.rmtree(run.root, ignore_errors=True)
    print(json.dumps(line), flush=True)
    # Programs leave memory and streams to the end of the process, where no order is needed any more.
    os._exit(0)


def one_apart(name, seconds):
    """Runs a scenario in a process of its own, because a device error makes its process useless; returns its line."""
    command = [sys.executable, *sys.argv, "--only", name, "--seconds", str(seconds)]
    try:
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=2 * seconds + 60)
        return json.loads(ended.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        why = "hangs"
    except (IndexError, ValueError):
        why = f"the process ended with {ended.returncode}"
    return {"scenario": name, "outcome": f"failed: {why}", "saves": 0, "wrong_bytes": 0}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--face", type=Path, required=True)
    p.add_argument("--dir", type=Path, required=True)
    p.add_argument("--backend", choices=("driver", "torch"), default="torch")
    p.add_argument("--device", default="cuda:0")
    p.add_argument("--library", default="libcuda.so.1")
    p.add_argument("--saves", type=int, default=100, help="of each scenario and executor")
    p.add_argument("--seconds", type=float, default=440)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--out", type=Path)
    p.add_argument("--only", help=argparse.SUPPRESS)
    p.add_argument("scenario", nargs="*")
    a = p.parse_args()
    if a.backend == "torch" and importlib.util.find_spec("torch") is None:
        p.error(f"{sys.executable} has no torch")
    if a.only:
        one(a, a.only)
    if unknown := set(a.scenario) - set(SCENARIOS):
        p.error(f"no such scenario: {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")

    with_what = a.device if a.device == "cpu" else a.backend
    chosen = [name for name in a.scenario or SCENARIOS if with_what in SCENARIOS[name]]
    before = [json.loads(line) for line in a.out.read_text().splitlines()] if a.out and a.out.exists() else []
    ok = {line["scenario"] for line in before if line["outcome"] == "ok" and line["with"] == with_what}
    begun, outcomes = time.monotonic(), {}
    for at, name in enumerate(chosen):
        if name in ok:
            continue
        share = (begun + a.seconds - time.monotonic()) / (len(chosen) - at)
        line = json.dumps({"with": with_what, **(ended := one_apart(name, max(1.0, share)))})
        print(line, flush=True)
        outcomes.setdefault(ended["outcome"].partition(":")[0], []).append(name)
        if a.out:
            with a.out.open("a") as file:
                print(line, file=file, flush=True)
                os.fsync(file.fileno())
    summary = "; ".join(f"{outcome}: {', '.join(names)}" for outcome, names in outcomes.items())
    print(f"drive: {summary or 'nothing to do'}", file=sys.stderr, flush=True)
    sys.exit(outcomes.keys() - {"ok"} != set())


if __name__ == "__main__":
    main()
