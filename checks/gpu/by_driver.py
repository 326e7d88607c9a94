"""Test programs that train with only the driver: they copy random bytes into tensors, and know the bytes of
each."""
import ctypes
import itertools
import os
import time
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64, c_void_p

import face
from kernels import Cuda

KIB, MIB = 1 << 10, 1 << 20
GLOBAL = 0  # capture mode


class Backend:
    """Device 0 of the driver, simulated or not."""

    def __init__(self, options):
        assert options.device == "cuda:0", "the backend `driver` works on cuda:0"
        self.cuda, self.device = Cuda(options.library), options.device
        self.name = self.cuda.device
        assert not (self.cuda.simulated and os.environ.get("ASHORE_REQUIRE_GPU")), "this is the simulated driver"
        # A real driver copies fast: more bytes, so that some copies are in flight at the fence.
        self.scale = 1 if self.cuda.simulated else 64
        self.chunk = 32 * KIB * self.scale
        self.ink = os.urandom(512 * KIB * self.scale)
        self.palette = self.cuda.memory(len(self.ink), self.ink)
        self.bulk = None
        if self.cuda.simulated:
            for name, value in {"lag_us": 150, "jitter_us": 300, "reuse": 1}.items():
                self.set(name, value)

    def set(self, name, value):
        """Settings of the simulated device."""
        if self.cuda.simulated:
            self.cuda("fakecuda_set", c_uint64(0), name.encode(), c_uint64(value))

    def crowd(self, on):
        """Fills the bus to the host for some 40 ms; on the simulated driver, copies do not begin while this is on."""
        self.set("hold", 1 if on else 0)
        if self.cuda.simulated or not on:
            return
        size = 1 << 30
        if not self.bulk:
            self.bulk = self.cuda.memory(size), self.cuda.made("cuMemHostAlloc", c_size_t(size), 0).value, self.stream()
        source, to, stream = self.bulk
        for _ in range(2):
            self.cuda("cuMemcpyDtoHAsync_v2", c_void_p(to), c_void_p(source), c_size_t(size), c_void_p(stream))

    def settle(self, handles, seconds=2):
        """Waits until these streams are idle, for `seconds` at most: a fence may wait for copies that are held."""
        end = time.monotonic() + seconds
        while any(self.cuda.lib.cuStreamQuery(c_void_p(h)) for h in handles) and time.monotonic() < end:
            time.sleep(0.001)

    def stream(self):
        return self.cuda.made("cuStreamCreate", 1).value

    def programs(self):
        def side(kind, count=1, **host):
            return lambda: kind(self, [self.stream() for _ in range(count)], **host)

        return {
            "legacy": lambda: Program(self, [0]),
            "side": side(Program),
            "two-streams": side(Program, 2),
            "host": side(Program, 0, host=[7 * KIB, 100 * KIB, 1, 64 * KIB]),
            "counters": side(Program, host=[4] * 20),
            "graph": side(Graph),
            "reuse": side(Loose, 2),
            "second-save": side(Program),
            "forgotten": side(Program),
            "forgotten-host": side(Program, 0, host=[100 * KIB, 64 * KIB]),
            "small-buffers": side(Program),
        }


class Block:
    """Device memory in the order of a stream: freed there with the last reference, in the thread that drops it."""

    def __init__(self, cuda, size, stream):
        self.cuda, self.size, self.stream = cuda, size, stream
        self.at = cuda.made("cuMemAllocAsync", c_size_t(size), c_void_p(stream)).value

    def __del__(self):
        if not hasattr(self, "at"):
            return
        self.cuda("cuCtxSetCurrent", self.cuda.context)
        self.cuda("cuMemFreeAsync", c_void_p(self.at), c_void_p(self.stream))


class Program:
    """Tensors of a device, one in each of `streams` in turn, and tensors of the host, all of which `update` writes in place."""

    # Tensors of more than 128 KiB are left to the fence; smaller ones are captured at the save if the capture
    # pool has space.
    SIZES = [1, 100, 4 * KIB, 5000, 40 * KIB + 3, 96 * KIB, 300 * KIB + 1, 7, 150 * KIB]

    def __init__(self, backend, streams, host=()):
        self.backend, self.cuda = backend, backend.cuda
        self.handles, self.streams = streams, [(0, handle) for handle in streams]
        self.offsets = {}
        turn = itertools.cycle(streams)
        sizes = [size * backend.scale for size in self.SIZES] if streams else []
        self.blocks = {f"device.{i}": Block(self.cuda, size, next(turn)) for i, size in enumerate(sizes)}
        self.buffers = {f"host.{i}": ctypes.create_string_buffer(size) for i, size in enumerate(host)}
        if streams:
            self.spare = Block(self.cuda, max(sizes), streams[0])
        self.update()

    def tensors(self, capture_small=False):
        """The tensors as ashore gets them. Memory stays until it is released."""
        told = []
        for name, b in self.blocks.items():
            capture = face.AT_SAVE if capture_small and b.size <= 4 * KIB else face.USUAL
            told.append(face.Tensor(name, b.at, b.size, ordinal=0, stream=b.stream, capture=capture, keep=b))
        for name, buffer in self.buffers.items():
            told.append(face.Tensor(name, ctypes.addressof(buffer), len(buffer), keep=buffer))
        return told

    def forward(self):
        """Reads."""
        for block in self.blocks.values():
            self.copy(self.spare.at, block.at, block.size, self.handles[0])

    def copy(self, to, source, size, stream):
        self.cuda("cuMemcpyDtoDAsync_v2", c_void_p(to), c_void_p(source), c_size_t(size), c_void_p(stream))

    def update(self, only=lambda size: True):
        """Writes every tensor: its bytes come from a new offset of the ink."""
        for name, block in self.blocks.items():
            if only(block.size):
                offset = self.offsets[name] = int.from_bytes(os.urandom(4), "little") % (len(self.backend.ink) - block.size)
                self.copy(block.at, self.backend.palette + offset, block.size, block.stream)
        for name, buffer in self.buffers.items():
            offset = self.offsets[name] = int.from_bytes(os.urandom(4), "little") % (len(self.backend.ink) - len(buffer))
            ctypes.memmove(buffer, self.backend.ink[offset : offset + len(buffer)], len(buffer))

    def update_small(self):
        self.update(lambda size: size <= 4 * KIB)

    def image(self):
        """The bytes of all tensors at this position of the streams."""
        sizes = {name: block.size for name, block in self.blocks.items()} | {n: len(b) for n, b in self.buffers.items()}
        offsets = dict(self.offsets)
        return lambda: {name: self.backend.ink[at : at + sizes[name]] for name, at in offsets.items()}

    def slow(self, on):
        """While on, copies are slow, so that a save cannot be staged yet."""
        self.backend.set("lag_us", 3_000 if on else 150)


class Graph(Program):
    """A step that a graph replays: every tensor takes what the next one holds."""

    SIZES = [150 * KIB + 5] * 6

    @property
    def soon_staged(self):
        return not self.backend.cuda.simulated

    def capture(self, during):
        (stream,), cuda, blocks = self.handles, self.cuda, list(self.blocks.values())
        cuda("cuStreamBeginCapture_v2", c_void_p(stream), c_int(GLOBAL))
        for to, source in itertools.pairwise([self.spare, *blocks, self.spare]):
            self.copy(to.at, source.at, source.size, stream)
        during()
        graph = c_void_p()
        cuda("cuStreamEndCapture", c_void_p(stream), byref(graph))
        self.replayed = cuda.made("cuGraphInstantiateWithFlags", graph, c_uint64(0))
        self.names = list(self.blocks)

    def update(self, only=None):
        if not hasattr(self, "replayed"):
            return super().update()
        self.cuda("cuGraphLaunch", self.replayed, c_void_p(self.handles[0]))
        rotated = self.names[1:] + self.names[:1]
        self.offsets = {to: self.offsets[source] for to, source in zip(self.names, rotated)}


class Loose(Program):
    """Tensors of a few sizes, made anew for each save."""

    def __init__(self, backend, streams):
        super().__init__(backend, streams[:1])
        self.other, self.fresh = streams[1], []

    def allocate(self, random, _trial):
        (stream,), scale = self.handles, self.backend.scale
        sizes = [random.choice(self.SIZES) * scale for _ in range(random.randint(2, 10))]
        self.offsets, self.fresh = {}, []
        self.cuda("cuStreamSynchronize", c_void_p(self.other))  # so that the driver reuses only what this trial frees
        self.blocks = {f"device.{i}": Block(self.cuda, size, stream) for i, size in enumerate(sizes)}

    def free(self):
        """Frees all tensors, and returns their addresses."""
        self.sizes, old = [b.size for b in self.blocks.values()], {b.at for b in self.blocks.values()}
        self.blocks = {}
        return old

    def finish(self):
        """Waits until the freed memory is free."""
        self.cuda("cuStreamSynchronize", c_void_p(self.handles[0]))

    def reuse(self):
        """Allocates as much memory in the other stream, writes it there, and returns its addresses."""
        self.fresh = [Block(self.cuda, size, self.other) for size in self.sizes]
        for block in self.fresh:
            self.copy(block.at, self.backend.palette, block.size, self.other)
        return {block.at for block in self.fresh}
