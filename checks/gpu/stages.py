"""Runs the stages of the kit, and keeps what they printed and measured in one archive.

  run.sh brief OUT     the most valuable evidence, in 480 s
  run.sh more OUT      200 s more, for a machine that is still available after that
  run.sh long OUT      what takes longer: about 40 minutes
  run.sh STAGE OUT     one stage
  run.sh table OUT     the table of what is in OUT

The runner kills a stage that exceeds its time, with every process that the stage started, and begins the next one. After each
stage it replaces OUT/kit.tgz atomically and prints the table so far. It does not run a passed stage again: to resume after a loss,
repeat the command with that OUT, or on the same machine with another. Working files are in a temporary folder; the archive has
only results and logs.

KIT_SIMULATED=1 tries the kit on a simulated driver, which LD_LIBRARY_PATH must find: little state, no figures. KIT_PYTHON names
the Python that has torch. KIT_SECONDS sets another time for the whole list.
"""
import ctypes
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

KIT = Path(__file__).resolve().parent
sys.path += [str(KIT), str(KIT.parent.parent / "benches/peers")]  # in the kit all files are in one folder
import table
import tree

SIMULATED = bool(os.environ.get("KIT_SIMULATED"))
LOG_BYTES = 200_000
PR_SET_CHILD_SUBREAPER = 36


@dataclass
class Run:
    """One command of a stage. `json` says that its standard output is its result, in which the figures of `positive` must be above
    0. `lag_us` is how late the simulated driver makes copies."""

    name: str
    command: list
    json: bool = False
    positive: tuple = ()
    lag_us: int = 0


@dataclass
class Stage:
    """Commands that run one after the other, or `together`, and end after so many seconds at the latest."""

    name: str
    seconds: int
    runs: list
    together: bool = False


class Work:
    """The folders where a list of stages keeps its results."""

    def __init__(self, out):
        self.out, self.commit = Path(out).resolve(), (KIT / "commit").read_text().strip()
        self.out.mkdir(parents=True, exist_ok=True)
        self.root = Path(tempfile.gettempdir()) / f"ashore-kit-{self.commit[:12]}{'-simulated' * SIMULATED}"
        self.results, self.scratch = self.root / "results", self.root / "scratch"
        archive = self.out / "kit.tgz"
        if archive.exists() and not self.results.exists():
            with tarfile.open(archive) as tar:
                tar.extractall(self.root, filter="data")
        self.results.mkdir(parents=True, exist_ok=True)
        # A file system in memory takes a save at memory speed: what remains is the cost of the saving itself.
        room = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
        self.fast = Path(tempfile.mkdtemp(prefix="ashore-kit-", dir="/dev/shm")) if room > 24 << 30 else self.scratch

    def passed(self, stage):
        at = self.results / f"{stage.name}.json"
        return at.exists() and json.loads(at.read_text())["rc"] == 0

    def keep(self):
        """Replaces the archive by one of all results so far."""
        new = self.out / "kit.tgz.new"
        with tarfile.open(new, "w:gz") as tar:
            tar.add(self.results, "results")
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.replace(self.out / "kit.tgz")

    def clear(self):
        """Deletes what stages wrote."""
        for folder in {self.scratch, self.fast}:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)

    def end(self):
        for folder in {self.scratch, self.fast}:
            shutil.rmtree(folder, ignore_errors=True)


# What the stages are.


def bench(work, name, what, *arguments, **more):
    """`ashore bench`, on little state where the driver is simulated: of a flag that is given twice the last counts."""
    small = ["--rounds", "1", "--arena", "1MiB", "--chunk", "64KiB", "--scale", "0.00002"] * SIMULATED
    small += ["--step-ms", "1", "--scratch", "256KiB"] * (SIMULATED and what == "staging")
    command = [KIT / "ashore", "bench", what, *arguments, *small, "--device", "cuda:0", "--dir", work.scratch, "--json"]
    return Run(name, command, json=True, **more)


def drive(work, name, backend, seconds, *scenarios, saves=100):
    library = ["--library", "libcuda.so.1"]
    if SIMULATED and backend == "torch":
        library, scenarios = ["--device", "cpu"], ("adamw-fused", "reuse", "forgotten-host")
    common = ["--face", KIT / "libashore.so", "--dir", work.scratch, "--out", work.results / f"{name}.jsonl"]
    limits = ["--saves", "3" if SIMULATED else str(saves), "--seconds", "10" if SIMULATED else str(seconds)]
    return Run(name, [sys.executable, KIT / "drive.py", "--backend", backend, *library, *common, *limits, *scenarios])


def peers(work, name, seconds, systems, *arguments, fast=True):
    """`dcp.py`, on the CPU where the driver is simulated, because torch does not run on that driver."""
    into = work.fast if fast else work.scratch
    common = ["--face", KIT / "libashore.so", "--dir", into, "--out", work.results / f"{name}.jsonl"]
    small = ["--device", "cpu", "--scale", "W2=0.0005,W3=0.0005", "--step-ms", "1", "--saves", "1", "--steps", "3", "--rounds", "1"] * SIMULATED
    chosen = ["--systems", ",".join(systems)] * bool(systems)
    return Run(name, [sys.executable, KIT / "dcp.py", *chosen, "--seconds", str(seconds), *common, *arguments, *small])


def suite(*filters):
    """The tests of CUDA staging, one by one: while a test captures a graph, no other thread may make calls that break the capture."""
    few = ["cuda::staging", "cuda::late_copies"] * SIMULATED
    return Run("suite", [KIT / "suite", *(few or filters), "--test-threads", "1"])


def kernels():
    return Run("kernels", [KIT / "kernels", "kernels::", "--skip", "ptx::", "--test-threads", "4"])


def brief(work):
    """The stages by falling value, so that if the machine is lost, the least valuable are missing."""
    state = ["--workload", "w2", "--writers", "8"]
    adam = ["--workload", "w3", "--writers", "8", "--no-limit"]
    return [
        Stage("machine", 12, [Run("machine", [sys.executable, KIT / "stages.py", "facts"])]),
        Stage("limits", 12, [bench(work, "limits", "limits", "--arena", "1GiB", "--no-limit", "--rounds", "8")]),
        Stage("staging", 60, [
            bench(work, "staging.w2", "staging", *state, "--arena", "5GiB", "--step-ms", "120", "--every", "10", "--rounds", "6"),
        ]),
        Stage("suite", 90, [suite("cuda"), kernels()], together=True),
        Stage("peers", 130, [
            peers(work, "peers", 125, ["ashore", "ashore-scratch", "dcp-thread", "dcp-cached", "dcp-process"], "--workloads", "W2"),
        ]),
        Stage("drive", 70, [
            drive(work, "drive", "torch", 60, "graph", "reuse", "adamw-fused", "two-streams", "forgotten", saves=30),
        ]),
        Stage("late", 35, [
            bench(work, "late.w3", "staging", *adam, "--arena", "1GiB", "--scratch", "14GiB", "--graph", "--step-ms", "100",
                  "--every", "10", "--rounds", "3", positive=("late_chunks",), lag_us=3000),
        ]),
        Stage("seldom", 40, [
            bench(work, "seldom.w3", "staging", *adam, "--arena", "13GiB", "--step-ms", "100", "--every", "50", "--rounds", "2"),
        ]),
        Stage("ways", 20, [bench(work, "ways.w1", "staging", "--ways", "--workload", "w1", "--arena", "512MiB", "--rounds", "5")]),
    ]  # fmt: skip


def more(work):
    """The next stages, on the same machine."""
    state = ["--workload", "w2", "--writers", "8", "--step-ms", "120", "--every", "10"]
    return [
        Stage("scratch", 40, [
            bench(work, "scratch.w2", "staging", *state, "--arena", "1GiB", "--scratch", "5GiB", "--no-limit", "--rounds", "4"),
        ]),
        Stage("speeds", 50, [Run("speeds", [sys.executable, KIT / "kernels.py", KIT], json=True)]),
        Stage("ring", 35, [peers(work, "ring", 32, ["ashore-ring"], "--workloads", "W2")]),
        Stage("disk", 70, [peers(work, "disk", 66, ["ashore", "dcp-thread"], "--workloads", "W2", fast=False)]),
    ]  # fmt: skip


def long(work):
    """Every way and every size; the last need 100 GB of GPU memory."""
    staging = ["--arena", "1GiB", "--writers", "8"]
    loop = [*staging, "--workload", "w3", "--every", "10", "--rounds", "4", "--no-limit"]

    def each(name, runs):
        return Stage(name, 480, [bench(work, f"{name}.{what}", *arguments) for what, arguments in runs.items()])

    demo = ["--steps", "20", "--model", "tiny"] * SIMULATED
    few = ["--device", "cpu", "--mib", "96", "--arena", "16", "--saves", "1", "--step-seconds", "0.05"] * SIMULATED
    systems = "none,ashore,dcp-thread,dcp-fenced,dcp-process,torch.save"
    wheel = [KIT / "torch_loop.py", "--dir", work.fast, "--device", "cuda", "--mib", "4096", "--arena", "1024", "--saves", "3"]
    return [
        Stage("loop", 300, [Run("loop", [sys.executable, *wheel, "--systems", systems, *few, "--json"], json=True)]),
        Stage("demo", 120, [
            Run("demo", [KIT / "ashore", "demo", *demo, "--device", "cuda:0", "--dir", work.scratch, "--json"], json=True),
        ]),
        Stage("torch", 480, [drive(work, "torch.driver", "driver", 90, saves=30), drive(work, "torch", "torch", 320)]),
        each("rates", {
            f"{way}{w}": ["staging", *staging, "--workload", w, "--rounds", "8", *["--ways"] * bool(way)]
            for way, w in [("", "w2"), ("", "w1"), ("ways.", "w3"), ("ways.", "w2")]
        }),
        each("loops", {
            "eager": ["staging", *loop],
            "graph.scratch": ["staging", *loop, "--graph", "--scratch", "4GiB"],
            "eager.scratch": ["staging", *loop, "--scratch", "4GiB"],
            "graph": ["staging", *loop, "--graph"],
            "short.scratch": ["staging", *loop, "--step-ms", "100", "--scratch", "9GiB"],
            "short": ["staging", *loop, "--step-ms", "100"],
        }),
        Stage("dcp", 480, [peers(work, "dcp", 440, [], "--workloads", "W2,W1,W3", "--scale", "W3=0.25")]),
        each("large", {
            "w4.scratch": ["staging", *staging, "--every", "10", "--rounds", "3", "--workload", "w4", "--scratch", "16GiB"],
            "w5": ["staging", *staging, "--every", "10", "--rounds", "3", "--workload", "w5"],
        }),
        # The disk, which takes longest and says least about a GPU.
        each("disk-limit", {"whole": ["limits", "--arena", "1GiB"]}),
    ]  # fmt: skip


def facts():
    """The facts of the machine."""

    def told(*command):
        try:
            ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=8)
            return ended.stdout.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{command[0]}: {error}"

    sums = (KIT / "SHA256SUMS").read_bytes()
    asked = "name,driver_version,pcie.link.gen.current,pcie.link.gen.max,pcie.link.width.current,memory.total,memory.free"
    versions = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    lines = {
        "commit": (KIT / "commit").read_text().strip(),
        "kernels": hashlib.sha256(sums).hexdigest()[:16],
        "gpu": told("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"),
        "topology": told("nvidia-smi", "topo", "-m"),
        "system": " ".join(os.uname()),
        "cores": os.cpu_count(),
        "libc": " ".join(os.confstr("CS_GNU_LIBC_VERSION").split()) if "CS_GNU_LIBC_VERSION" in os.confstr_names else "?",
        "memory": told("free", "-g"),
        "/dev/shm": told("df", "-h", "/dev/shm"),
        "disk": told("df", "-h", tempfile.gettempdir()),
        "ashore": told(KIT / "ashore", "--version"),
        "python": sys.version.split()[0],
        "torch": told(sys.executable, "-W", "ignore", "-c", versions),
    }
    for name in ("ashore", "libashore.so", "suite", "kernels"):
        lines[f"sha256 of {name}"] = hashlib.sha256((KIT / name).read_bytes()).hexdigest()[:16]
    for name, value in lines.items():
        value = str(value)
        print(f"{name}: {value}" if "\n" not in value else f"{name}:\n{value}")
    if not SIMULATED and "failed" in lines["gpu"].lower():
        sys.exit("no GPU answers")


# How they are run.


def kill_all():
    """Kills every process below this one, including those that have left the group of their parent."""
    me = os.getpid()
    while below := list(tree.descendants(me)):
        for pid in below:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        reap()
        time.sleep(0.02)


def reap():
    """Reaps processes that became children of this one when their parent ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def run(work, stage, seconds):
    """Runs a stage in at most so many seconds; its status: 0, or that of the first command that failed, or 124."""
    begun, environment = time.monotonic(), {**os.environ, "RUST_BACKTRACE": "1"}
    if not SIMULATED:
        environment["ASHORE_REQUIRE_GPU"] = "1"
    work.clear()
    rcs, running = {}, []
    waiting = list(stage.runs)
    while (waiting or running) and time.monotonic() - begun < seconds:
        while waiting and (stage.together or not running):
            each = waiting.pop(0)
            with (work.results / f"{each.name}.log").open("wb") as log, (work.results / f"{each.name}.out").open("wb") as out:
                try:
                    started = subprocess.Popen(
                        [str(part) for part in each.command], stdin=subprocess.DEVNULL, stdout=out if each.json else log,
                        stderr=log, env={**environment, "FAKECUDA_LAG_US": str(each.lag_us)}, start_new_session=True,
                    )  # fmt: skip
                except OSError as error:
                    log.write(f"cannot be started: {error}\n".encode())
                    rcs[each.name] = 127
                    continue
            running.append((each, started))
        for each, started in list(running):
            if started.poll() is not None:
                rcs[each.name] = started.returncode
                running.remove((each, started))
        time.sleep(0.02)
    late = [each.name for each, _ in running] + [each.name for each in waiting]
    kill_all()
    for each, started in running:
        started.wait()
    for each in stage.runs:
        rcs.setdefault(each.name, 124)
        tidy(work, each, rcs)
    rc = next((code for code in rcs.values() if code), 0)
    line = {
        "stage": stage.name, "rc": rc, "rcs": rcs, "seconds": round(time.monotonic() - begun, 1), "limit": round(seconds, 1),
        "killed": late, "commit": work.commit, "simulated": SIMULATED,
    }  # fmt: skip
    (work.results / f"{stage.name}.json").write_text(json.dumps(line))
    return rc


def tidy(work, each, rcs):
    """Keeps the result of a command, and the end of its log."""
    log, out = work.results / f"{each.name}.log", work.results / f"{each.name}.out"
    if log.exists():
        text = log.read_bytes()
        log.write_bytes(text[-LOG_BYTES:])
        # A test program in which no test ran has checked nothing.
        if b"\nrunning 0 tests" in b"\n" + text:
            rcs[each.name] = rcs[each.name] or 3
    if not (out.exists() and each.json and rcs[each.name] == 0):
        return out.unlink(missing_ok=True)
    out.replace(work.results / f"{each.name}.result.json")
    result = table.load(work.results / f"{each.name}.result.json") or {}
    if missing := [name for name in each.positive if not result.get(name)]:
        rcs[each.name] = 4
        with log.open("a") as file:
            print(f"stages.py: must be more than none: {', '.join(missing)}", file=file)


def main():
    lists = {"brief": (brief, 480), "more": (more, 200), "long": (long, 3600)}
    arguments = sys.argv[1:]
    if arguments == ["facts"]:
        return facts()
    if len(arguments) != 2:
        sys.exit(__doc__)
    work = Work(arguments[1])
    if arguments[0] == "table":
        return print(table.of(work.results))
    named = {stage.name: [stage] for make, _ in lists.values() for stage in make(work)}
    if arguments[0] in lists:
        make, seconds = lists[arguments[0]]
        stages = make(work)
    elif arguments[0] in named:
        stages, seconds = named[arguments[0]], named[arguments[0]][0].seconds
    else:
        sys.exit(f"stages.py: there is no stage {arguments[0]}; there are {', '.join([*lists, *named])}")
    until = time.monotonic() + float(os.environ.get("KIT_SECONDS", seconds))
    # Processes whose parent has ended become children of this one, so that none outlives its stage.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def stop(*_):
        sys.exit("stages.py: stopped")

    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(each, stop)
    failed = []
    try:
        for stage in stages:
            left = until - time.monotonic()
            if work.passed(stage):
                print(f"stages.py: {stage.name} has passed before", flush=True)
                continue
            if left < 5:
                failed.append(stage.name)
                print(f"stages.py: {stage.name} is left out: the time is over", flush=True)
                continue
            rc = run(work, stage, min(stage.seconds, left))
            failed += [stage.name] * (rc != 0)
            work.keep()
            print(table.of(work.results), flush=True)
            print(f"stages.py: {stage.name} ended with {rc}, {until - time.monotonic():.0f} s left\n", flush=True)
    finally:
        kill_all()
        work.keep()
        work.end()
    print("stages.py: " + (f"failed: {', '.join(failed)}" if failed else "all have passed"), flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
