"""Starts the ranks of a job, reads their output, and judges the state that they have left on the storage."""
import contextlib
import dataclasses
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time

# Steps that the jobs of `saves.rs` keep.
KEPT = 2
# How long after the deadline of its save a rank may end: it looks for the outcome, and rank 0 tells it.
GRACE_MS = 8000
UNKNOWN = "Indeterminate"


class Failed(Exception):
    """A promise was not kept."""


def expect(held, otherwise):
    if not held:
        raise Failed(otherwise)


def environment(rank, world, token, restart=0):
    """What torchrun tells a rank, and nothing of an outer launcher."""
    told = {
        "RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank,
        "TORCHELASTIC_RUN_ID": token, "TORCHELASTIC_RESTART_COUNT": restart,
    }  # fmt: skip
    return os.environ | {name: str(value) for name, value in told.items()}


def start(command, rank, world, token, restart=0, **variables):
    return subprocess.Popen(
        command, env=environment(rank, world, token, restart) | variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@dataclasses.dataclass
class Failure:
    """What a rank printed of a failed save, or of a meeting that failed (step 0)."""

    kind: str
    ranks: list
    after_ms: int


class Ended:
    """A rank that has ended, as it told."""

    def __init__(self, rank, status, output):
        self.rank, self.status, self.output = rank, status, output
        self.met = re.search(r"^met newest=(\d+)", output, re.M)
        self.clean = "left clean=true" in output
        self.durable = {int(m[1]): m[2] for m in re.finditer(r"^durable step=(\d+) attempt=(\S+)", output, re.M)}
        told = re.finditer(r"^(?:failed|refused) step=(\d+) kind=(\w+) ranks=\[([\d, ]*)\] after_ms=(\d+)", output, re.M)
        self.failed = {int(m[1]): Failure(m[2], [int(r) for r in m[3].split(", ") if r], int(m[4])) for m in told}


def ends(processes, patience):
    """Waits for processes by rank."""
    until = time.monotonic() + patience
    ended = []
    for rank, process in processes.items():
        try:
            output, _ = process.communicate(timeout=max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            for other in processes.values():
                other.kill()
            output, _ = process.communicate()
            raise Failed(f"rank {rank} did not end in {patience} s:\n{output}") from None
        ended.append(Ended(rank, process.returncode, output))
    return ended


def look(program, root):
    """The listed steps with their attempts; every byte of them was compared with what it must be."""
    done = subprocess.run([program, "look", root], capture_output=True, text=True, timeout=60)
    expect(done.returncode == 0, f"what is listed is not what was saved: {done.stdout}{done.stderr}")
    return {int(m[1]): m[2] for m in re.finditer(r"step=(\d+) attempt=(\S+)", done.stdout)}


def judge(before, listed, ended, dead, timeout_ms):
    """Judges what ranks say of their saves against the steps that are listed, and the time and names that they give."""
    acknowledged = {step: attempt for rank in ended for step, attempt in rank.durable.items()}
    for rank in ended:
        for step, attempt in rank.durable.items():
            expect(acknowledged[step] == attempt, f"two attempts of step {step} are durable: {rank.output}")
    for step, attempt in (before | acknowledged).items():
        newer = sum(other > step for other in listed)
        expect(listed.get(step) == attempt or newer >= KEPT, f"step {step} was durable and is gone: {listed}")
    for rank in ended:
        if rank.rank in dead:
            continue
        expect(rank.status == 0 and (rank.met or rank.failed), f"rank {rank.rank} did not end in order: {rank.output}")
        for step, failure in rank.failed.items():
            late = failure.after_ms > timeout_ms + GRACE_MS
            expect(not late, f"rank {rank.rank} ended after its deadline: {rank.output}")
            if failure.kind != UNKNOWN:
                expect(step not in listed and step not in acknowledged, f"step {step} failed, and is there: {rank.output}")


def go_on(program, means, root, listed, world, token, restart, inside=None):
    """The next job goes on from the newest step, saves one more, and leaves nothing of the dead behind."""
    command = [program, "saves", *means, root, "1", "60000"]
    inside = inside or [[]] * world
    ended = ends({rank: start([*inside[rank], *command], rank, world, token, restart) for rank in range(world)}, 100)
    newest = max(listed, default=0)
    for rank in ended:
        expect(rank.status == 0 and rank.clean, f"rank {rank.rank} of the next job did not end in order: {rank.output}")
        expect(int(rank.met[1]) == newest, f"the newest step was {newest}: {rank.output}")
        expect(list(rank.durable) == [newest + 1], f"rank {rank.rank} of the next job did not save: {rank.output}")
    after = look(program, root)
    kept = sorted([*listed, newest + 1])[-KEPT:]
    expect(sorted(after) == kept and after[newest + 1] == ended[0].durable[newest + 1], f"listed are {after}, not {kept}")
    expect(not (left := hidden(root)), f"left behind by the next job: {left}")
    sessions = [name for name in os.listdir(f"{root}/.ranks") if name.startswith("session-")]
    expect(len(sessions) == 1, f"records of older sessions are left behind: {sessions}")


def hidden(root):
    """What is no step. An owner record that is still empty may be another host's: it stays."""
    entries = [entry for entry in pathlib.Path(root).iterdir() if entry.name.startswith(".") and entry.name not in (".ranks", ".runs")]
    return [entry.name for entry in entries if not (entry.suffix == ".owner" and entry.stat().st_size == 0)]


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@contextlib.contextmanager
def etcd(inside=(), host="127.0.0.1"):
    """Runs a server of one node, by a command `inside`, and gives its address."""
    with tempfile.TemporaryDirectory() as directory:
        client, peer = f"http://{host}:{free_port()}", f"http://127.0.0.1:{free_port()}"
        server = subprocess.Popen(
            [*inside, "etcd", "--data-dir", directory, "--listen-client-urls", client, "--advertise-client-urls", client]
            + ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
            + ["--initial-cluster", f"default={peer}", "--log-level", "error"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            until = time.monotonic() + 30
            while not healthy(client, inside):
                expect(server.poll() is None and time.monotonic() < until, "etcd did not start")
                time.sleep(0.1)
            yield client
        finally:
            server.kill()
            server.wait()


def healthy(client, inside):
    try:
        return b"true" in ask(f"{client}/health", inside=inside)
    except (OSError, subprocess.SubprocessError):
        return False


def ask(url, body=None, inside=()):
    """What the server at `url` answers; the request comes from the namespace that `inside` enters."""
    program = "import sys, urllib.request as r; b = sys.argv[2].encode() or None; print(r.urlopen(sys.argv[1], b, 5).read().decode())"
    command = [*inside, sys.executable, "-c", program, url, body or ""]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10).stdout


def memory():
    """A place for small roots: a kill loses nothing that the kernel has, so memory serves as well as a disk."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def kill_tools():
    """Makes the supervisor of `checks/kill` importable."""
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "kill"))
