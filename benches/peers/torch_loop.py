#!/usr/bin/env python3
"""Trains one AdamW loop with ashore, with its peers in torch, and without checkpoints, and prints what saves cost the loop.

    torch_loop.py --dir SCRATCH [--mib 1024] [--saves 5] [--rounds 1] [--device cpu|cuda] [--step-seconds 1.0]
                  [--systems A,B,...] [--seed N] [--json]

Needs `import ashore` (the wheel of this repository, or the GPU kit) and torch; `torch-checkpointing` where that system is named. Each system runs
in a process of its own, in random order. Parameters and both moments of AdamW have MIB MiB together. A step computes for
STEP-SECONDS on one thread (a fixed number of products of matrices, on the GPU with `--device cuda`) and then writes all of the
state. The loop saves when nothing of the save before it is left, and takes two steps more; the first two saves are not counted.

    blocked   the call of the save and the wait before the optimizer's step, together
    stall     what the steps took from the call until the save was durable, less as many steps without a save
    overhead  the stall when a save is made every 60 s of training
    durable   from the call until everything is fsynced; files of peers are fsynced by this program when they are done
    peak      how much the memory of the process tree grew over that of the loop; ashore's arena is in it
    CPU       seconds of the process tree without those of the loop's own thread outside of the call and the fence, by GB
    right     whether the newest checkpoint has the bytes of the parameters at its save, written right after the fence

The exit status is 1 when a system failed or kept wrong bytes.
"""
import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
import zlib

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "python")]  # in the GPU kit the package is in this folder
import report  # noqa: E402
import tree  # noqa: E402

MIB, WARM, INTERVAL = 1 << 20, 2, 60.0
SYSTEMS = {
    "none": "no saves",
    "ashore": "ashore.torch: save, and the fence in the optimizer's pre-hook",
    "dcp-thread": "torch.distributed.checkpoint.async_save with a thread",
    "dcp-process": "the same with a process",
    "dcp-fenced": "the same with a thread and a stager that copies beside the loop, awaited before the step; pinned on a GPU",
    "torch-checkpointing": "torch_checkpointing's CheckpointManager; on a CPU with the settings that its documentation gives",
    "torch.save": "torch.save in the loop",
}
COLUMNS = [
    ("blocked s", "blocked", "{:.4f}"),
    ("stall s", "stall", "{:.3f}"),
    ("overhead", "overhead", "{:.2%}"),
    ("durable s", "durable", "{:.2f}"),
    ("peak MiB", "peak", "{:.0f}"),
    ("CPU s/GB", "cpu", "{:.2f}"),
]


def fsync_tree(path):
    """Fsyncs what a peer has written, and the names that lead to it."""
    for at in [path.parent, *([path, *path.rglob("*")] if path.is_dir() else [path])]:
        descriptor = os.open(at, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class Loop:
    """Matrices of 16 MiB as parameters, AdamW, and gradients that are made once."""

    def __init__(self, options):
        import torch

        self.torch, self.cuda = torch, options.device == "cuda"
        torch.set_num_threads(1)
        torch.manual_seed(1)
        count = max(1, options.mib // 48)
        layers = [torch.nn.Linear(2048, 2048, bias=False) for _ in range(count)]
        self.model = torch.nn.Sequential(*layers).to(options.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, foreach=True)
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        self.before_step = lambda: None
        self.bytes = 3 * count * 16 * MIB
        side = 4096 if self.cuda else 512
        self.a, self.b = (torch.randn(side, side, device=options.device) for _ in "ab")
        self.c, self.products = torch.empty_like(self.a), 4
        for _ in range(3):
            self.optimizer.step()
        self.compute()
        began = time.monotonic()
        self.compute()
        self.products = max(1, round(self.products * options.step_seconds / (time.monotonic() - began)))

    def compute(self):
        for _ in range(self.products):
            self.torch.matmul(self.a, self.b, out=self.c)
        if self.cuda:
            self.torch.cuda.synchronize()

    def step(self):
        """A step's seconds, and those of the wait before the optimizer."""
        began = time.monotonic()
        self.compute()
        waited = time.monotonic()
        self.before_step()
        waited = time.monotonic() - waited
        self.optimizer.step()
        if self.cuda:
            self.torch.cuda.synchronize()
        return time.monotonic() - began, waited

    def sums(self):
        """Checksums of the parameters."""
        return {name: zlib.crc32(p.detach().cpu().numpy().data) for name, p in self.model.named_parameters()}


class Nothing:
    """No saves. `save` returns the wait before the optimizer's step, and the wait until the system says that it is done."""

    fsyncs = False

    def __init__(self, loop, options):
        self.loop, self.options, self.step = loop, options, 0

    def save(self, path):
        return (lambda: None), (lambda: None)

    def read(self, path):
        return None

    def close(self):
        pass


class Ashore(Nothing):
    def __init__(self, loop, options):
        super().__init__(loop, options)
        import ashore
        import ashore.torch

        self.ashore = ashore
        self.root = pathlib.Path(options.dir) / "root"
        self.executor = ashore.CheckpointExecutor(self.root, arena=options.arena * MIB, keep_last=2)
        self.state = ashore.torch.state(model=loop.model, optimizer=loop.optimizer)

    def save(self, path):
        self.step += 1
        save = self.ashore.torch.save(self.executor, self.step, self.state)
        return self.executor.fence, save.wait

    def read(self, path):
        checkpoint, loop = self.executor.latest(), self.loop
        into = {f"model.{name}": loop.torch.empty_like(p, device="cpu") for name, p in loop.model.named_parameters()}
        checkpoint.read_into(into, strict=False)
        return {name.removeprefix("model."): tensor for name, tensor in into.items()}

    def close(self):
        self.executor.shutdown()


class TorchSave(Nothing):
    fsyncs = True

    def state(self):
        return {"model": self.loop.model.state_dict(), "optimizer": self.loop.optimizer.state_dict()}

    def save(self, path):
        self.loop.torch.save(self.state(), path)
        return (lambda: None), (lambda: None)

    def read(self, path):
        return self.loop.torch.load(path, mmap=True, map_location="cpu", weights_only=True)["model"]


class Dcp(TorchSave):
    def __init__(self, loop, options, kind, fenced=False):
        super().__init__(loop, options)
        import torch.distributed as dist
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("cpu:gloo")
        self.dcp, self.kind, self.fenced = dcp, AsyncCheckpointerType[kind], fenced
        self.stager = lambda: DefaultStager(
            StagingOptions(loop.cuda, False, use_async_staging=True, use_non_blocking_copy=loop.cuda)
        )

    def save(self, path):
        if not self.fenced:
            future = self.dcp.async_save(self.state(), checkpoint_id=path, async_checkpointer_type=self.kind)
            return (lambda: None), future.result
        stager = self.stager()  # torch closes it at its first save
        if self.loop.cuda:  # torch does not wait by itself for the stream that wrote the tensors
            stager._staging_stream.wait_stream(self.loop.torch.cuda.current_stream())
        answer = self.dcp.async_save(
            self.state(), checkpoint_id=path, async_checkpointer_type=self.kind, async_stager=stager
        )

        def done():
            answer.upload_completion.result()
            stager.close()

        return answer.staging_completion.result, done

    def read(self, path):
        into = {name: self.loop.torch.empty_like(t, device="cpu") for name, t in self.loop.model.state_dict().items()}
        self.dcp.load({"model": into}, checkpoint_id=path)
        return into


class TorchCheckpointing(TorchSave):
    def __init__(self, loop, options):
        super().__init__(loop, options)
        import torch_checkpointing
        from torch_checkpointing.config import AsyncCheckpointSaverConfig
        from torch_checkpointing.staging import CheckpointStagerConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        staging = CheckpointStagerConfig(
            use_pinned_memory=loop.cuda, use_shared_memory=True, use_async_staging=loop.cuda, use_non_blocking_copy=loop.cuda
        )
        manager = torch_checkpointing.CheckpointManager
        # Version 0.1.1 fails with its direct I/O: the last write of a file is not aligned.
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self.manager = manager(manager.Config(save=AsyncCheckpointSaverConfig(staging_config=staging), storage_config=storage))

    def save(self, path):
        future = self.manager.save(str(path), self.state())

        def fence():
            with self.manager.lock():
                pass

        return fence, (future.result if future else lambda: None)

    def read(self, path):
        into = {name: self.loop.torch.empty_like(t, device="cpu") for name, t in self.loop.model.state_dict().items()}
        return self.manager.load(str(path), into={"model": into})["model"]

    def close(self):
        self.manager.close()


def make(name, loop, options):
    match name:
        case "none":
            return Nothing(loop, options)
        case "ashore":
            return Ashore(loop, options)
        case "torch.save":
            return TorchSave(loop, options)
        case "torch-checkpointing":
            return TorchCheckpointing(loop, options)
        case _:
            kind = name.removeprefix("dcp-").upper()
            return Dcp(loop, options, "THREAD" if kind == "FENCED" else kind, kind == "FENCED")


@dataclasses.dataclass
class Ended:
    """When a save ended, as a thread of its own saw it."""

    over: threading.Event = dataclasses.field(default_factory=threading.Event)
    at: float = 0.0
    error: BaseException | None = None

    def watch(self, done, path):
        try:
            done()
            if path is not None:
                fsync_tree(path)
        except BaseException as error:
            self.error = error
        self.at = time.monotonic()
        self.over.set()


def one_save(loop, system, path, base):
    """Saves once while the loop trains, until the save is durable."""
    use = tree.Use()
    use.begin()
    own, began = time.thread_time(), time.monotonic()
    fence, done = system.save(path)
    call, ended = time.monotonic() - began, Ended()
    in_call = time.thread_time() - own
    threading.Thread(target=ended.watch, args=(done, path if system.fsyncs else None), daemon=True).start()
    waits = [0.0, 0.0]

    def before_step():
        cpu = time.thread_time()
        fence()
        waits[0] += time.thread_time() - cpu

    loop.before_step, steps = before_step, []
    while not steps or not ended.over.is_set():
        seconds, waited = loop.step()
        steps.append(seconds)
        waits[1] += waited
        loop.before_step = lambda: None
    others = use.seconds() - (time.thread_time() - own)
    if ended.error:
        raise ended.error
    blocked = call + waits[1]
    stall = call + sum(steps) - base * len(steps)
    return {
        "call": call,
        "blocked": blocked,
        "stall": stall,
        "overhead": stall / (INTERVAL + stall),
        "durable": ended.at - began,
        "peak": (use.peak() or 0) / MIB,
        "cpu": (others + in_call + waits[0]) / loop.bytes * 1e9,
    }


def child(options):
    """Measures one system and prints its samples."""
    say = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    loop = Loop(options)
    folder = pathlib.Path(options.dir)
    quiet = [loop.step()[0] for _ in range(3)]
    resident = tree.memory(os.getpid(), "VmRSS")[0]
    system, samples, sums, path = make(options.one, loop, options), [], {}, None
    for number in range(WARM + options.saves):
        quiet = quiet[-3:] + [loop.step()[0] for _ in range(2)]
        sums, before = loop.sums(), path
        path = folder / f"save-{number}"
        grown = tree.memory(os.getpid(), "VmRSS")[0] - resident
        sample = one_save(loop, system, path, statistics.median(quiet))
        sample["peak"] += grown / MIB
        if number >= WARM:
            samples.append(sample)
        if before is not None:
            shutil.rmtree(before) if before.is_dir() else before.unlink(missing_ok=True)
    read = system.read(path)
    right = read is None or sums == {name: zlib.crc32(tensor.numpy().data) for name, tensor in read.items()}
    system.close()
    print(json.dumps({"samples": samples, "right": right, "bytes": loop.bytes, "step": statistics.median(quiet)}), file=say)
    # Some systems keep threads or processes that would outlive an ordinary exit.
    os._exit(0)


def run_one(options, name):
    folder = pathlib.Path(options.dir) / "torch_loop"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    passed = ["--mib", "--saves", "--device", "--step-seconds", "--arena"]
    values = [options.mib, options.saves, options.device, options.step_seconds, options.arena]
    command = [sys.executable, __file__, "--one", name, "--dir", str(folder)]
    command += [str(word) for pair in zip(passed, values) for word in pair]
    ran = None
    with contextlib.suppress(subprocess.TimeoutExpired):
        ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=options.timeout)
    shutil.rmtree(folder, ignore_errors=True)
    if ran is None:
        return {"failed": f"not done after {options.timeout} s"}
    try:
        return json.loads(ran.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"failed": (ran.stderr.strip().splitlines() or [f"status {ran.returncode}"])[-1]}


def main():
    parser = argparse.ArgumentParser(description="what saves cost a loop of torch")
    parser.add_argument("--dir", required=True, help="an existing directory on the disk to measure")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--arena", type=int, default=256, help="MiB of ashore's arena")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--step-seconds", type=float, default=1.0)
    parser.add_argument("--systems", type=lambda text: text.split(","), default=list(SYSTEMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=int, default=600, help="seconds for one system")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return child(options)
    if unknown := set(options.systems) - set(SYSTEMS):
        parser.error(f"unknown systems: {', '.join(sorted(unknown))}; known: {', '.join(SYSTEMS)}")
    load, order, found = os.getloadavg()[0], random.Random(options.seed), {name: [] for name in options.systems}
    for number in range(options.rounds):
        for name in order.sample(options.systems, len(options.systems)):
            taken = run_one(options, name)
            found[name].append(taken)
            print(f"round {number + 1} {name}: {taken.get('failed') or taken['samples'][-1]}", file=sys.stderr, flush=True)
    return show(options, load, found)


def show(options, load, found):
    if options.json:
        print(json.dumps(found, indent=1))
    summaries, wrong = {}, 0
    for name, runs in found.items():
        failures = [run["failed"] for run in runs if "failed" in run]
        failures += ["wrong bytes" for run in runs if run.get("right") is False]
        samples = [sample for run in runs for sample in run.get("samples", [])]
        fields = {field: report.spread([sample[field] for sample in samples]) for _, field, _ in COLUMNS} if samples else {}
        summaries[name] = fields | {"n": len(samples), "failures": failures}
        wrong += len(failures)
    good = [run for runs in found.values() for run in runs if "failed" not in run]
    if not options.json and good:
        step = statistics.median(run["step"] for run in good)
        print(f"{good[0]['bytes'] / 1e9:.2f} GB on {options.device}, a step of {step:.2f} s, arena {options.arena} MiB")
        print(f"medians (quartiles); {os.cpu_count()} processors, load {load:.1f} to {os.getloadavg()[0]:.1f}")
        print("\n" + report.table(summaries, COLUMNS))
    for name, summary in summaries.items():
        for failure in summary["failures"]:
            print(f"{name} failed: {failure}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
