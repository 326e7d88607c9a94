#!/usr/bin/env python3
"""Cuts the link of a rank in the middle of a commit. Needs root: every rank runs in a network namespace of its own.

    checks/ranks/links.py PROGRAM [SCENARIO...]

PROGRAM is the example `rank`. Four ranks save in one directory, and communicate through an etcd server that
each rank reaches over a link of its own. A supervisor stops one rank before a call, so that the cut happens
at a known point; then that rank goes on. All ranks must end by their deadline. Their reports must agree with
the steps that exist, which are compared byte by byte. When the link is back, a new session of all four must
commit.
"""
import base64
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import jobs
from jobs import Failed, expect

jobs.kill_tools()
import supervised  # noqa: E402

WORLD = 4
LIMIT_S = 90


@dataclasses.dataclass
class Scenario:
    """Rank `held` waits in front of its first call that matches, until `receipts` ranks have told theirs and the link is cut."""

    cut: int
    held: int
    call: str
    receipts: list
    timeout_ms: int
    # The kinds with which a rank may end, and the ranks that a failure may name.
    ends: set
    names: set
    durable: bool


SHARD, CLAIM, PUBLISH = r"fsync .*\.tmp/.*\.safetensors$", r"rename\w* .*\.claimed$", r"rename\w* .*/step-\d+$"
SCENARIOS = {
    # Rank 2 has told its receipt, and rank 3 is about to: rank 0 publishes, and rank 2 reads the outcome on the storage.
    "rank 2 after its receipt": Scenario(2, 3, SHARD, [1, 2], 8000, {"Durable"}, set(), True),
    # Rank 2 has written and cannot tell it. By the deadline nothing is known of it but that it is missing.
    "rank 2 before its receipt": Scenario(2, 2, SHARD, [1, 3], 8000, {"Deadline", "Unavailable"}, {2, 0}, False),
    # The same with more time: its lease expires.
    "rank 2 until its lease expires": Scenario(2, 2, SHARD, [1, 3], 40000, {"Deadline", "Unavailable"}, {2, 0}, False),
    # Rank 0 does not learn that rank 3 has written.
    "rank 0 before the last receipt": Scenario(0, 3, SHARD, [1, 2], 8000, {"Deadline", "Unavailable"}, {0, 1, 2, 3}, False),
    # Rank 0 has all receipts and publishes, but can tell it on the storage only.
    "rank 0 before its claim": Scenario(0, 0, CLAIM, [1, 2, 3], 8000, {"Durable"}, set(), True),
    "rank 0 before its publish": Scenario(0, 0, PUBLISH, [1, 2, 3], 8000, {"Durable"}, set(), True),
}


class Net:
    """A namespace with a bridge and the server, and one for each rank, joined by a link."""

    def __init__(self, number):
        self.name = f"ashore-{os.getpid()}-{number}"
        self.hub = f"{self.name}-hub"

    def rank(self, rank):
        return f"{self.name}-r{rank}"

    def __enter__(self):
        try:
            self.make()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_):
        self.remove()

    def make(self):
        ip("netns", "add", self.hub)
        ip("-n", self.hub, "link", "set", "lo", "up")
        ip("-n", self.hub, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.hub, "address", "add", "10.90.0.1/24", "dev", "bridge")
        ip("-n", self.hub, "link", "set", "bridge", "up")
        for rank in range(WORLD):
            ip("netns", "add", self.rank(rank))
            ip("-n", self.hub, "link", "add", f"rank{rank}", "type", "veth", "peer", "name", "net0", "netns", self.rank(rank))
            ip("-n", self.hub, "link", "set", f"rank{rank}", "master", "bridge", "up")
            ip("-n", self.rank(rank), "address", "add", f"10.90.0.{10 + rank}/24", "dev", "net0")
            ip("-n", self.rank(rank), "link", "set", "net0", "up")

    def remove(self):
        # The links go with their namespaces.
        for name in [self.hub, *map(self.rank, range(WORLD))]:
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL, check=False)

    def link(self, rank, state):
        ip("-n", self.hub, "link", "set", f"rank{rank}", state)

    def inside(self, name):
        return ["ip", "netns", "exec", name]


def ip(*arguments):
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    expect(done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class Hold:
    """Holds the supervised rank in front of its first call that matches, until `go`."""

    def __init__(self, pattern):
        self.pattern, self.reached, self.go = re.compile(pattern), threading.Event(), threading.Event()

    def __call__(self, call):
        if not self.reached.is_set() and self.pattern.match(f"{call.name} {call.to or call.path}"):
            self.reached.set()
            expect(self.go.wait(LIMIT_S), "a rank was held for too long")
        return False


def receipts(net, address, prefix):
    """The ranks whose receipts of the first save are with the server."""
    whole = {"key": encoded(f"{prefix}/messages-"), "range_end": encoded(f"{prefix}/messages."), "keys_only": True}
    answer = json.loads(jobs.ask(f"{address}/v3/kv/range", json.dumps(whole), net.inside(net.hub)))
    keys = [base64.b64decode(found["key"]).decode() for found in answer.get("kvs", [])]
    return {int(told[1]) for key in keys if (told := re.search(r"/0-receipt-(\d+)$", key))}


def encoded(text):
    return base64.b64encode(text.encode()).decode()


def run(program, number, name):
    """Runs a scenario; returns what is to be said of it."""
    scenario, began = SCENARIOS[name], time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ashore-links-", dir=jobs.memory()))
        net = stack.enter_context(Net(number))
        address = stack.enter_context(jobs.etcd(net.inside(net.hub), "10.90.0.1"))
        root, token, prefix = f"{folder}/root", f"links-{number}", "/links"
        means = ["etcd", f"{address}#{prefix}"]

        def command(timeout_ms):
            return [program, "saves", *means, root, "1", str(timeout_ms)]

        inside = [net.inside(net.rank(rank)) for rank in range(WORLD)]
        jobs.go_on(program, means, root, {}, WORLD, token, 0, inside=inside)
        before = jobs.look(program, root)

        hold, held = Hold(scenario.call), {}
        others = {
            rank: jobs.start([*inside[rank], *command(scenario.timeout_ms)], rank, WORLD, token, 1)
            for rank in range(WORLD) if rank != scenario.held
        }  # fmt: skip
        stack.callback(lambda: [other.kill() for other in others.values()])

        def supervise():
            environment = jobs.environment(scenario.held, WORLD, token, 1)
            # The filter is inherited by what `ip` starts.
            whole = [shutil.which("ip"), *inside[scenario.held][1:], *command(scenario.timeout_ms)]
            held["ended"] = jobs.Ended(scenario.held, *supervised.run(whole, hold, environment))

        thread = threading.Thread(target=supervise)
        thread.start()
        try:
            expect(hold.reached.wait(30), f"rank {scenario.held} never came to {scenario.call}")
            until = time.monotonic() + 5
            while not receipts(net, address, prefix) >= {*scenario.receipts}:
                expect(time.monotonic() < until, f"receipts are missing: {receipts(net, address, prefix)}")
                time.sleep(0.02)
            net.link(scenario.cut, "down")
        finally:
            hold.go.set()
        ended = jobs.ends(others, LIMIT_S)
        thread.join(LIMIT_S)
        expect("ended" in held, f"rank {scenario.held} did not end")
        ended = sorted([*ended, held["ended"]], key=lambda rank: rank.rank)
        told = "\n".join(f"rank {rank.rank}: {rank.output}" for rank in ended)
        try:
            listed = jobs.look(program, root)
            jobs.judge(before, listed, ended, set(), scenario.timeout_ms)
            expect((2 in listed) == scenario.durable, f"listed are {listed}")
            how = []
            for rank in ended:
                failure = rank.failed.get(2)
                how.append("Durable" if rank.durable else f"{failure.kind} {failure.ranks}")
                expect(how[-1].split()[0] in scenario.ends, f"rank {rank.rank} may not end so")
                # A rank that reaches nothing may know of no other.
                named = failure and (failure.ranks or rank.rank == scenario.cut) and {*failure.ranks} <= scenario.names
                expect(rank.durable or named, f"rank {rank.rank} names others than {scenario.names}")
            net.link(scenario.cut, "up")
            jobs.go_on(program, means, root, listed, WORLD, token, 2, inside=inside)
        except Failed as failure:
            raise Failed(f"{failure}\n{told}") from None
    return f"cut {name}: {', '.join(how)}; then a new session committed; {time.monotonic() - began:.0f} s"


def main():
    program, *names = sys.argv[1:]
    # An end by a signal cleans up, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    names, failed = names or list(SCENARIOS), 0
    # Most of a scenario is waiting.
    with concurrent.futures.ProcessPoolExecutor(len(names)) as pool:
        runs = {name: pool.submit(run, os.path.abspath(program), number, name) for number, name in enumerate(names)}
        for name, ran in runs.items():
            try:
                print(ran.result(), flush=True)
            except Failed as failure:
                failed += 1
                print(f"cut {name}: {failure}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
