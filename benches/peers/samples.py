"""Takes samples: one save by one system, in processes of their own, with the disk's limit right before and right after it."""
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import systems
import workload

HERE = pathlib.Path(__file__).resolve().parent
LIMIT_S = 300
OURS = "ashore"
NAMES = (OURS, *systems.STOCK, *systems.JAX)
# The seconds over which the loop is timed: before a save, and with nothing beside it.
LEAD_S, IDLE_S = 3.0, 1.0


class Failed(Exception):
    """A sample failed."""


class Bench:
    """The directory, programs and workload of the samples."""

    def __init__(self, args):
        self.envs, self.scratch, self.ashore = args.envs.resolve(), args.dir.resolve(), args.ashore
        self.workload, self.scale, self.warm = args.workload, args.scale, args.warm
        self.tensors = workload.tensors(self.workload, self.scale)
        self.bytes = workload.size(self.tensors)

    def python(self, environment):
        return str(self.envs / environment / "bin/python")

    def sample(self, system):
        """The cost of a save by this system, and the seconds that the bare disk needed for as many bytes."""
        around = []
        took = self.save(system, before=lambda: around.append(self.limit()), after=lambda: around.append(self.limit()))
        limit = sum(around) / len(around)
        return took | {"limit_seconds": around, "fraction_of_limit": limit / took["durable_seconds"]}

    def save(self, system, before, after=lambda: None):
        """One save; `before` runs when the state is made, `after` before its files are deleted."""
        with self.folder() as folder:
            save = self.save_ours if system == OURS else self.save_peer
            took = save(system, folder, before)
            after()
        wrong = abs(took["bytes"] - self.bytes) > self.bytes / 100 or took["tensors"] != len(self.tensors)
        if wrong:
            raise Failed(f"saved {took['tensors']} tensors of {took['bytes']} bytes")
        if took.get("bytes_on_disk", self.bytes) < self.bytes:
            raise Failed(f"only {took['bytes_on_disk']} bytes on disk")
        return took

    def save_peer(self, system, folder, before):
        python = self.python("jax" if system in systems.JAX else "stock")
        command = [python, str(HERE / "peer.py"), system, self.workload, str(self.scale), self.warm, str(folder)]
        with Process(command) as process:
            while (line := process.stdout.readline()).strip() != "ready":
                if not line:
                    raise Failed(process.why())
            before()
            process.wind()
            process.stdin.write("go\n")
            process.stdin.flush()
            return process.answer()

    def save_ours(self, _, folder, before):
        """The same for `ashore`, which measures itself. It allocates its arena at start, so the arena counts in its peak."""
        command = [self.ashore, "bench", "save", "--workload", self.workload, "--scale", str(self.scale)]
        before()
        with Process([*command, "--rounds", "1", "--no-limit", "--json", "--dir", str(folder)]) as process:
            said = process.answer()
        gigabytes = said["bytes"] / 1e9
        return {
            "blocked_seconds": said["blocked_ms"] / 1e3,
            "free_seconds": said["staged_seconds"],
            "done_seconds": said["durable_seconds"],
            "durable_seconds": said["durable_seconds"],
            "cpu_seconds": (said["write_cpu_seconds_per_gb"] + said["stage_cpu_seconds_per_gb"]) * gigabytes,
            "peak_bytes": max(said["peak_host_bytes"], said["arena_bytes"]),
            "tensors": said["tensors"],
            "bytes": said["bytes"],
            "began": since_boot(said["began_unix"]),
        }

    def limit(self):
        with self.folder() as folder:
            with Process([sys.executable, str(HERE / "limit.py"), str(folder), str(self.bytes)]) as process:
                return process.answer()

    def interference(self, system):
        """How much slower a loop on one thread runs while this system saves; None saves nothing, to show the noise."""
        with Process([self.python("stock"), str(HERE / "loop.py")]) as loop:
            if system is None:
                time.sleep(LEAD_S)
                took = {"began": time.monotonic(), "durable_seconds": IDLE_S}
                time.sleep(IDLE_S)
            else:
                took = self.save(system, before=lambda: time.sleep(LEAD_S))
            loop.stdin.close()
            times = loop.answer()
        began, seconds = took["began"], took["durable_seconds"]
        # The loop never pauses between our call and the save, so this is the time right before it.
        before = rate(times, began - 0.8 * LEAD_S, began)
        during = rate(times, began, began + seconds)
        loss = 1 - during / before
        return {"before": before, "during": during, "loss": loss, "save_seconds": seconds, "lost_seconds": loss * seconds}

    def folder(self):
        return Folder(self.scratch)


class Folder:
    """A fresh directory, deleted at the end; the deletion is synced, so that it does not affect another sample."""

    def __init__(self, parent):
        self.parent = parent

    def __enter__(self):
        self.path = pathlib.Path(tempfile.mkdtemp(prefix="peers-", dir=self.parent))
        return self.path

    def __exit__(self, *_):
        shutil.rmtree(self.path, ignore_errors=True)
        descriptor = os.open(self.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class Process:
    """A program that prints JSON; leaving it, or its time limit, ends it and every process that it started."""

    def __init__(self, command):
        self.command = command

    def __enter__(self):
        self.errors = tempfile.TemporaryFile("w+")
        # A killed program's temporary files are deleted with this folder.
        self.temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        own = {"start_new_session": True, "env": os.environ | {"TMPDIR": self.temporary.name}}
        self.process = subprocess.Popen(self.command, **pipes, **own, text=True)
        self.stdin, self.stdout, self.late = self.process.stdin, self.process.stdout, False
        self.timer = None
        self.wind()
        return self

    def wind(self):
        """Restarts the time limit."""
        if self.timer:
            self.timer.cancel()
        self.timer = threading.Timer(LIMIT_S, self.give_up)
        self.timer.start()

    def __exit__(self, *_):
        self.timer.cancel()
        self.kill()
        self.process.wait()
        self.stdout.close()
        self.errors.close()
        self.temporary.cleanup()

    def answer(self):
        """The program's last line, once it has ended without an error."""
        said = self.stdout.read().strip()
        if self.process.wait() != 0 or not said:
            raise Failed(self.why())
        return json.loads(said)

    def give_up(self):
        self.late = True
        self.kill()

    def kill(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def why(self):
        if self.late:
            return f"not done after {LIMIT_S} s"
        self.process.wait()
        self.errors.seek(0)
        last = [line.strip() for line in self.errors if line.strip()][-1:]
        return f"ended with {self.process.returncode}: {''.join(last)}"


def since_boot(unix_seconds):
    """This moment on the clock that the other processes use."""
    return time.monotonic() - (time.time() - unix_seconds)


def rate(times, begin, end):
    """Rounds per second between two moments; a round that is partly within counts as that part."""
    counted = 0.0
    for earlier, later in zip(times, times[1:]):
        counted += max(0.0, min(later, end) - max(earlier, begin)) / (later - earlier)
    return counted / (end - begin)
