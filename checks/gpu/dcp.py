#!/usr/bin/env python3
"""Measures what a save costs a training loop, by ashore and by torch, on the same tensors of the same GPU, in the same folder.

  dcp.py --face LIBRARY --dir DIR [--device cuda:0|cpu] [--workloads W2,W1,W3] [--systems a,b] [--scale W3=0.25,...]
         [--rounds N] [--seconds S] [--out FILE]

Systems run in the order in which they are named, each in a process of its own, which saves a few times while it trains. A folder
below /dev/shm is the nearest to a sink that all of them can write to. One JSON line for each save:

  stall_ms                      how long the GPU was idle for the save, by events, from the save until it was durable: the
                                gaps before compute and before the update, less those of steps without a save before and after
  slowdown                      what steps took beside the save by what they took before and after it, gaps left out, less one
  drift                         steps after the save by steps before it, less one: a slowdown below it is no finding
  overhead_10, overhead_50      what the loop loses when it saves at every 10 or 50 steps: the stall, and the slowdown of as many
                                steps as the save lasted
  call_ms, fence_ms, blocked_ms how long the save, the wait before the next update, and both held up the program
  staged_s, staged_by_bare      when the tensors had been copied, and that by the time of one bare copy to pinned memory
  done_s, durable_s             when the system said that it was done; when its files were synced as well, as ashore's are
  late_chunks                   of ashore: chunks that the fence copied late on the GPU
  peak_bytes, available_bytes   how much processes grew at most, and by how much less memory the machine had
  right                         whether three of the tensors were restored as they were at the save

The first save of a process (`save` 0) has a line too: it allocates memory and starts processes. A table of medians of the
later ones ends the output. The exit status is 1 when ashore failed or restored a wrong tensor; failures of other systems
are in their lines.
"""
import argparse
import ctypes
import dataclasses
import importlib.util
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent.parent / "benches/peers")]  # in the kit all files are beside this one
import face
import tree
import workload

SYSTEMS = {
    "ashore": "an arena as large as the state",
    "ashore-scratch": "the same, and memory of the GPU for late copies",
    "ashore-ring": "an arena of 1 GiB, through which the state goes at the speed of the folder",
    "torch.save": "in the loop",
    "dcp": "torch's distributed checkpoint, in the loop",
    "dcp-thread": "async_save with a thread",
    "dcp-cached": "async_save with copies in pinned memory that are kept, written by 4 threads",
    "dcp-process": "async_save with a process",
    "dcp-thread-staged": "async_save with a thread and a stager that copies beside the loop",
    "dcp-process-staged": "the same with a process",
}
WORKLOADS = {"W1": "20,000 x 16 KiB and 20,000 x 1 KiB", "W2": "64 x 64 MiB", "W3": "Llama-3.2-1B in bf16, moments in fp32"}
MIB = 1 << 20


def shapes(name, scale):
    if name == "W2":
        return [(f"layer.{i:02}.weight", "F32", (max(1, round(4096 * scale)), 4096)) for i in range(64)]
    return workload.tensors({"W1": "small", "W3": "adam-1b"}[name], scale)


class Loop:
    """Forward and backward only read the state, the update writes all of it in place."""

    def __init__(self, device, tensors, step_ms):
        import torch

        self.torch, self.on, self.cuda = torch, torch.device(device), device != "cpu"
        kinds = {"F32": torch.float32, "BF16": torch.bfloat16}
        torch.manual_seed(1)
        self.state = {name: torch.empty(shape, dtype=kinds[t], device=self.on).normal_() for name, t, shape in tensors}
        self.all = list(self.state.values())
        side = 8192 if self.cuda else 256
        self.a, self.b = (torch.randn(side, side, device=self.on, dtype=torch.bfloat16 if self.cuda else None) for _ in "ab")
        self.c, self.products, self.steps_taken, self.events = torch.empty_like(self.a), 8, [], []
        self.update()
        for _ in range(4):
            self.step()
        busy = min(step.compute for step in self.taken())
        self.products = max(1, round(step_ms * self.products / busy))
        self.bare_s = self.bare()

    def compute(self):
        for _ in range(self.products):
            self.torch.matmul(self.a, self.b, out=self.c)

    def update(self):
        self.torch._foreach_neg_(self.all)  # every bit pattern changes, with the reads and writes of an optimizer

    def moment(self):
        """The current time on the GPU, in the order of the stream."""
        if not self.cuda:
            return time.perf_counter()
        event = self.torch.cuda.Event(enable_timing=True, blocking=True)
        event.record()
        return event

    def step(self, before_update=lambda: None):
        """A step; the host is two steps ahead of the GPU at most, as in a loop that reads its loss."""
        moments = [self.moment()]
        self.compute()
        moments.append(self.moment())
        before_update()
        moments.append(self.moment())
        self.update()
        moments.append(self.moment())
        self.steps_taken.append(moments)
        if self.cuda and len(self.steps_taken) > 2:
            self.steps_taken[-3][-1].synchronize()

    def taken(self):
        """The steps since the last call, in milliseconds. The gap before the first one is that to the step before it."""
        taken, self.steps_taken = self.steps_taken, []
        if self.cuda:
            self.torch.cuda.synchronize()
        steps, end = [], self.events[-1] if self.events else taken[0][0]
        for begin, computed, updating, updated in taken:
            between = self.between
            steps.append(Step(between(end, begin), between(begin, computed), between(computed, updating), between(updating, updated)))
            end = updated
        self.events = [end]
        return steps

    def between(self, a, b):
        return a.elapsed_time(b) if self.cuda else 1e3 * (b - a)

    def bare(self):
        """Seconds in which a bare loop copies all tensors to pinned memory: the limit of any staging."""
        if not self.cuda:
            into = self.torch.empty(max(t.nbytes for t in self.all), dtype=self.torch.uint8)
        else:
            into = self.torch.empty(max(t.nbytes for t in self.all), dtype=self.torch.uint8, pin_memory=True)
        times = []
        for _ in range(4):
            begin = self.moment()
            for tensor in self.all:
                flat = tensor.reshape(-1).view(self.torch.uint8)
                into[: flat.numel()].copy_(flat, non_blocking=True)
            end = self.moment()
            if self.cuda:
                self.torch.cuda.synchronize()
            times.append(self.between(begin, end) / 1e3)
        return min(times)


@dataclasses.dataclass
class Step:
    """Milliseconds by the GPU: the gaps before it computes and before the update."""

    before: float
    compute: float
    wait: float
    update: float

    @property
    def idle(self):
        return self.before + self.wait

    @property
    def busy(self):
        return self.compute + self.update


class Ashore:
    """ashore, through the C interface. The array of tensors is made once."""

    peer = False

    def __init__(self, options, loop, root, scratch=0, ring=False):
        library = face.Face(options.face)
        on = loop.on.index if loop.cuda else face.HOST
        kinds = {4: "F32", 2: "BF16"}
        told = [
            face.Tensor(name, t.data_ptr(), t.nbytes, kinds[t.element_size()], tuple(t.shape), on)
            for name, t in loop.state.items()
        ]
        device = options.device if loop.cuda else "host"
        self.streams, self.tensors, self.root, self.library = [(on, 0)] * loop.cuda, library.packed(told), root, library
        # By default the first two saves of an executor also look for forgotten fences; only the later ones
        # count here.
        chunk = 16 * MIB if loop.cuda else 64 << 10
        size = sum(t.nbytes for t in loop.all)
        arena = options.arena * MIB if ring else -(-size // chunk + 4) * chunk  # each file has a header, too
        settings = {"arena": arena, "chunk": chunk, "scratch": scratch * MIB, "detect": "never"}
        self.executor = face.Executor(library, root, device, **settings)
        self.step = 0
        self.about = self.executor.report

    def save(self, _path):
        self.step += 1
        save = self.executor.save(self.step, self.tensors)
        fence = (lambda: self.executor.fence_on(self.streams)) if self.streams else self.executor.fence

        def done():
            committed = save.wait(600)
            return {"staged_s": committed.staged, "late_chunks": committed.late_chunks}

        return fence, done

    def read(self, _path, like):
        step = face.Step(self.library, self.root, self.step)
        torch = sys.modules["torch"]
        return {n: torch.frombuffer(step.read(n, t.nbytes), dtype=t.dtype).reshape(t.shape) for n, t in like.items()}

    def forget(self, _path):
        shutil.rmtree(self.root / f"step-{self.step:08}")

    def close(self):
        self.executor.__exit__(None, None, None)


class Torch:
    peer = True

    def __init__(self, _options, loop, _root):
        self.loop, self.torch, self.about = loop, loop.torch, f"torch {loop.torch.__version__}"

    def save(self, path):
        self.torch.save(self.loop.state, path)
        return lambda: None, lambda: {}

    def read(self, path, like):
        loaded = self.torch.load(path, mmap=True, map_location="cpu", weights_only=True)
        return {name: loaded[name] for name in like}

    def forget(self, path):
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self):
        pass


class Dcp(Torch):
    """torch's distributed checkpoint in a world of one. `staged` is its fastest way: copies to pinned memory by a stream of
    their own, and a wait for them before the update."""

    def __init__(self, options, loop, root, kind=None, staged=False, cached=False):
        super().__init__(options, loop, root)
        import torch.distributed as dist
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the name of a machine without a network may not resolve
        dist.init_process_group("cpu:gloo")
        self.dcp, self.kind, self.staged = dcp, kind and AsyncCheckpointerType[kind], staged

        def stager():
            shared, pinned = kind == "PROCESS", loop.cuda
            return DefaultStager(StagingOptions(pinned, shared, use_async_staging=True, use_non_blocking_copy=pinned))

        self.stager = stager
        if cached and not loop.cuda:  # torch pins these copies even without a GPU
            self.torch.Tensor.pin_memory = lambda tensor: tensor
        # torch keeps the copies in pinned memory from save to save, and syncs files.
        self.writer = dcp.FileSystemWriter(root, thread_count=4, cache_staged_state_dict=True) if cached else None
        # torch passes each tensor to the other process by descriptors. Where they do not suffice, its
        # documentation says this.
        if kind == "PROCESS" and 2 * len(loop.all) > resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
            self.torch.multiprocessing.set_sharing_strategy("file_system")

    def save(self, path):
        begun = time.perf_counter()

        def staged():
            return {"staged_s": time.perf_counter() - begun}

        if self.kind is None:
            self.dcp.save(self.loop.state, checkpoint_id=path)
            return lambda: None, lambda: {}
        if not self.staged:
            more = {"storage_writer": self.writer} if self.writer else {}
            answer = self.dcp.async_save(
                self.loop.state, checkpoint_id=path, async_checkpointer_type=self.kind, **more
            )
            told = staged()  # it returns when the state has been copied

            def saved():
                answer.result()
                return told

            return lambda: None, saved
        stager = self.stager()  # torch 2.11 closes it at its first save
        if self.loop.cuda:  # torch does not wait by itself for the stream that wrote the tensors
            stager._staging_stream.wait_stream(self.torch.cuda.current_stream())
        answer = self.dcp.async_save(
            self.loop.state, checkpoint_id=path, async_checkpointer_type=self.kind, async_stager=stager
        )
        told = {}

        def fence():
            answer.staging_completion.result()
            told.update(staged())

        def done():
            answer.upload_completion.result()
            stager.close()
            return told

        return fence, done

    def read(self, path, like):
        into = {name: self.torch.empty_like(t, device="cpu") for name, t in like.items()}
        self.dcp.load(into, checkpoint_id=path)
        return into


def make(name, options, loop, root):
    system, _, rest = name.partition("-")
    if system == "ashore":
        return Ashore(options, loop, root, options.scratch if rest == "scratch" else 0, rest == "ring")
    if system == "torch.save":
        return Torch(options, loop, root)
    if rest == "cached":
        return Dcp(options, loop, root, "THREAD", cached=True)
    kind, _, staged = rest.partition("-")
    return Dcp(options, loop, root, kind.upper() or None, bool(staged))


def sync(path):
    """Everything below the path, its folder, and the file system."""
    for at in [path.parent, path, *path.rglob("*")]:
        fd = os.open(at, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    fd = os.open(path.parent, os.O_RDONLY)
    ctypes.CDLL(None).syncfs(fd)
    os.close(fd)


class Watch(threading.Thread):
    """Waits for a save beside the loop, records when it was done and durable, and watches memory meanwhile."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before = self.least = self.available()
        self.begun, self.over, self.failed = time.perf_counter(), threading.Event(), None
        threading.Thread(target=self.memory, daemon=True).start()

    def available(self):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024

    def memory(self):
        while not self.over.wait(0.05):
            self.least = min(self.least, self.available())

    def follow(self, done, path):
        self.wait_done, self.path = done, path
        self.start()

    def run(self):
        try:
            self.told = self.wait_done()
            self.done = time.perf_counter() - self.begun
            if self.path:
                sync(self.path)
            self.durable = time.perf_counter() - self.begun
        except Exception as error:
            self.failed = error
        self.over.set()


def sample(loop, system, path, use, steps):
    """One save in a training loop, which continues until the save is durable."""

    def baseline():
        for _ in range(steps + 1):
            loop.step()
        return loop.taken()[1:]

    before = baseline()
    chosen = [n for n, t in loop.state.items() if t.nbytes <= 256 * MIB]
    chosen = {chosen[0], chosen[len(chosen) // 2], chosen[-1]}
    use.begin()
    image = {name: loop.torch.empty_like(loop.state[name]) for name in chosen}
    loop.step()
    loop.taken()
    for name, tensor in image.items():
        tensor.copy_(loop.state[name])
    loop.events = [loop.moment()]  # so that no gap includes these copies
    watch = Watch()
    fence, done = system.save(path)
    call = time.perf_counter() - watch.begun
    watch.follow(done, path if system.peer else None)
    fenced = 0.0

    def fence_timed():
        nonlocal fenced
        begun = time.perf_counter()
        fence()
        fenced = time.perf_counter() - begun

    loop.step(fence_timed)
    while not watch.over.is_set() or len(loop.steps_taken) < 5:
        loop.step()
    during = loop.taken()
    if watch.failed:
        raise watch.failed
    after = baseline()
    read = system.read(path, image)
    right = all(loop.torch.equal(read[name], tensor.cpu()) for name, tensor in image.items())
    system.forget(path)
    step_ms = statistics.median(s.idle + s.busy for s in before + after)
    told = {"staged_s": None, "late_chunks": None, **watch.told}
    bare = told["staged_s"] and told["staged_s"] / loop.bare_s
    return {
        **cost(before, during, after), "step_ms": step_ms, "steps": len(during), "call_ms": 1e3 * call, "fence_ms": 1e3 * fenced,
        "blocked_ms": 1e3 * (call + fenced), **told, "bare_s": loop.bare_s, "staged_by_bare": bare, "done_s": watch.done,
        "durable_s": watch.durable, "peak_bytes": use.peak(), "available_bytes": watch.before - watch.least, "right": right,
    }  # fmt: skip


def cost(before, during, after):
    """The cost of a save to the steps beside it, by those before and after it."""
    around = before + after
    idle, busy = (statistics.median(getattr(step, what) for step in around) for what in ("idle", "busy"))
    stall = sum(step.idle - idle for step in during)
    slowdown = statistics.median(step.busy for step in during) / busy - 1
    drift = statistics.median(s.busy for s in after) / statistics.median(s.busy for s in before) - 1
    lost = {k: stall / (k * (idle + busy)) + slowdown * min(len(during), k) / k for k in (10, 50)}
    return {"stall_ms": stall, "slowdown": slowdown, "drift": drift, "overhead_10": lost[10], "overhead_50": lost[50]}


def child(a):
    """One system, one workload, a few saves; one line each."""
    warnings.filterwarnings("ignore")
    begun = time.monotonic()
    root = a.dir / f"dcp-{os.getpid()}"
    root.mkdir(parents=True)
    tensors = shapes(a.workloads, a.scale)
    loop = Loop(a.device, tensors, a.step_ms)
    use = tree.Use()
    system = make(a.only, a, loop, root)
    size = workload.size(tensors)
    line = {"workload": a.workloads, "scale": a.scale, "bytes": size, "tensors": len(tensors), "system": a.only}
    for save in range(a.saves + 1):
        if save > 1 and time.monotonic() - begun > a.seconds:
            break
        measured = sample(loop, system, root / f"save-{save}", use, a.steps)
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in measured.items()}
        print(json.dumps({**line, "save": save, **rounded, "about": system.about}), flush=True)
    system.close()
    shutil.rmtree(root, ignore_errors=True)
    sys.stdout.flush()
    os._exit(0)  # torch's other processes do not always end


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--face", type=Path, required=True)
    p.add_argument("--dir", type=Path, required=True)
    p.add_argument("--device", default="cuda:0")
    p.add_argument("--workloads", default="W2,W3,W1", help="; ".join(f"{k}: {v}" for k, v in WORKLOADS.items()))
    p.add_argument("--systems", default=",".join(SYSTEMS), help="; ".join(f"{k}: {v}" for k, v in SYSTEMS.items()))
    p.add_argument("--scale", default="", help="less of a workload: W3=0.25")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--saves", type=int, default=2, help="of each process, after the first")
    p.add_argument("--step-ms", type=float, default=100, help="forward and backward")
    p.add_argument("--steps", type=int, default=8, help="without a save, before each save and after it")
    p.add_argument("--arena", type=int, default=1024, help="of ashore-ring, in MiB")
    p.add_argument("--scratch", type=int, default=2048, help="of ashore-scratch, in MiB")
    p.add_argument("--seconds", type=float, default=440)
    p.add_argument("--out", type=Path)
    p.add_argument("--only", help=argparse.SUPPRESS)
    a = p.parse_args()
    if importlib.util.find_spec("torch") is None:
        p.error(f"{sys.executable} has no torch")
    if a.only:
        a.scale = float(a.scale)
        return child(a)

    scales = dict(pair.split("=") for pair in a.scale.split(",") if pair)
    systems = [s for s in a.systems.split(",") if a.device != "cpu" or s != "ashore-scratch"]
    if unknown := set(systems) - SYSTEMS.keys():
        p.error(f"no such system: {', '.join(unknown)}; there are {', '.join(SYSTEMS)}")
    until, lines, failed = time.monotonic() + a.seconds, [], False
    turns = [(number, chosen, system) for number in range(a.rounds) for chosen in a.workloads.split(",") for system in systems]
    for at, (number, chosen, system) in enumerate(turns):
        # A process that hangs leaves time for those after it.
        left = until - time.monotonic()
        share = min(left, max(30, 1.5 * left / (len(turns) - at)))
        if left < 10:
            break
        about = ["--only", system, "--workloads", chosen, "--scale", scales.get(chosen, "1")]
        command = [sys.executable, *sys.argv, *about, "--seconds", str(share / 2)]
        for line in samples(command, share):
            line = {"round": number, **line}
            if "failed" in line:
                line |= {"system": system, "workload": chosen}
            lines.append(line)
            ours = system.startswith("ashore")
            failed |= ours and (line.get("right") is False or line.get("failed", "out of time") != "out of time")
            print(json.dumps(line), flush=True)
            if a.out:
                with a.out.open("a") as file:
                    print(json.dumps(line), file=file, flush=True)
                    os.fsync(file.fileno())
        for left_behind in a.dir.glob("dcp-*"):
            shutil.rmtree(left_behind, ignore_errors=True)
    table(lines)
    sys.exit(failed)


def samples(command, seconds):
    """The lines of a process as they arrive, and an error line if it failed. The processes that it started end with it."""
    complaints = tempfile.TemporaryFile("w+")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True, start_new_session=True)
    timer = threading.Timer(seconds, lambda: os.killpg(process.pid, 9))
    timer.start()
    for line in process.stdout:
        if line.startswith("{"):
            yield json.loads(line)
    code = process.wait()
    timed_out = not timer.is_alive()
    timer.cancel()
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        pass
    if code:
        complaints.seek(0)
        sys.stderr.write(complaints.read()[-2000:] * (not timed_out))
        yield {"failed": "out of time" if timed_out else f"ended with {code}"}


def table(lines):
    """Medians of all saves but the first of each process."""
    columns = {
        "stall_ms": 1, "overhead_10": 0.01, "overhead_50": 0.01, "blocked_ms": 1, "step_ms": 1, "staged_s": 1,
        "staged_by_bare": 1, "done_s": 1, "durable_s": 1, "peak_bytes": MIB,
    }  # fmt: skip
    named = {"overhead_10": "every 10 %", "overhead_50": "every 50 %", "peak_bytes": "peak MiB"}
    print(f"{'':22}" + "".join(f"{named.get(c, c):>15}" for c in columns) + f"{'n':>4} right", file=sys.stderr)
    groups = {}
    for line in lines:
        if line.get("save"):
            groups.setdefault((line["workload"], line["system"]), []).append(line)
    for (chosen, system), group in groups.items():
        told = {c: [line[c] / unit for line in group if line[c] is not None] for c, unit in columns.items()}
        row = "".join(f"{statistics.median(t):>15.2f}" if t else f"{'-':>15}" for t in told.values())
        print(f"{chosen} {system:19}{row}{len(group):>4} {all(line['right'] for line in group)}", file=sys.stderr)


if __name__ == "__main__":
    main()
