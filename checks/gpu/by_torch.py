"""Test programs that train with torch: plain tensors, optimizers, a captured graph, memory of the caching
allocator."""
import contextlib
import itertools
import time

import torch

import face

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8",
}  # fmt: skip


def told(name, tensor, stream=None, capture=face.USUAL):
    """Describes a tensor that `stream` wrote to ashore. The tensor stays until it is released."""
    assert tensor.is_contiguous(), name
    on = {"ordinal": tensor.device.index, "stream": stream.cuda_stream} if tensor.is_cuda else {}
    size, dtype, shape = tensor.nbytes, DTYPES[tensor.dtype], tuple(tensor.shape)
    return face.Tensor(name, tensor.data_ptr(), size, dtype, shape, capture=capture, keep=tensor.detach(), **on)


def raw(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def within(stream):
    return torch.cuda.stream(stream) if stream else contextlib.nullcontext()


class Backend:
    """A GPU through torch; or the CPU, to check these programs on any machine."""

    def __init__(self, options):
        self.cuda, self.on = options.device != "cpu", torch.device(options.device)
        self.device, self.name = (options.device, torch.cuda.get_device_name(self.on)) if self.cuda else ("host", "cpu")
        self.chunk = 4 * MIB if self.cuda else 64 * KIB
        if self.cuda:
            torch.cuda.set_device(self.on)
        torch.manual_seed(options.seed)
        self.bulk = None

    def crowd(self, on):
        """Fills the bus to the host for some 40 ms, so that copies queued next have not ended at a fence."""
        if not self.cuda or not on:
            return
        if not self.bulk:
            from_, to = torch.empty(GIB, dtype=torch.uint8, device=self.on), torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
            self.bulk = from_, to, torch.cuda.Stream()
        from_, to, stream = self.bulk
        with torch.cuda.stream(stream):
            for _ in range(2):
                to.copy_(from_, non_blocking=True)

    def settle(self, handles, seconds=2):
        """Waits until these streams are idle, for `seconds` at most."""
        end = time.monotonic() + seconds
        while not all(stream.query() for stream in handles) and time.monotonic() < end:
            time.sleep(0.001)

    def stream(self):
        return torch.cuda.Stream() if self.cuda else None

    def programs(self):
        def side(kind, count=1, **more):
            return lambda: kind(self, [self.stream() for _ in range(count)], **more)

        both = {
            "host": side(Program, 0, host=[7 * KIB, 1 * MIB, 1, 64 * KIB]),
            "adamw-fused": side(AdamW, fused=True),
            "reuse": side(Loose, 2),
            "second-save": side(Program),
            "forgotten-host": side(Program, 0, host=[1 * MIB, 64 * KIB]),
            "small-buffers": side(Program),
        }
        if not self.cuda:
            return both | {"adamw-foreach": side(AdamW, foreach=True)}
        return both | {
            "legacy": lambda: Program(self, [torch.cuda.default_stream()]),
            "side": side(Program),
            "two-streams": side(Program, 2),
            "adamw-foreach": lambda: AdamW(self, [torch.cuda.default_stream()], foreach=True),
            "graph": side(Graph, foreach=True, capturable=True),
            "forgotten": side(Program),
        }


class Base:
    """A program with tensors in `held`, by name: the tensor and the stream that writes it."""

    def __init__(self, backend, streams):
        self.backend, self.handles = backend, streams
        self.streams = [(backend.on.index, s.cuda_stream) for s in streams if s]

    def tensors(self, capture_small=False):
        def capture(tensor):
            return face.AT_SAVE if capture_small and tensor.nbytes <= 4 * KIB else face.USUAL

        return [told(name, t, stream, capture(t)) for name, (t, stream) in self.held().items()]

    def image(self):
        """Copies all tensors at this position of the streams; the result fetches their bytes later."""
        copies = {}
        for name, (tensor, stream) in self.held().items():
            with within(stream):
                copies[name] = tensor.detach().clone()

        def fetch():
            if self.streams:
                torch.cuda.synchronize()
            return {name: raw(copy.cpu()).numpy().tobytes() for name, copy in copies.items()}

        return fetch

    def slow(self, on):
        """While on, queued work is slow, so that a save cannot be staged yet."""
        if on:
            self.sleep(50_000_000)

    def sleep(self, cycles):
        """Delays the streams by `cycles`, so that the host runs ahead."""
        for stream in filter(None, self.handles):
            with within(stream):
                torch.cuda._sleep(cycles)


class Program(Base):
    """Tensors of all kinds, one in each stream in turn, and tensors in pageable memory; `update` writes them in place."""

    SHAPES = [
        (torch.float32, (1000, 3000)), (torch.bfloat16, (4097, 1025)), (torch.float32, (64,)), (torch.int64, (1,)),
        (torch.uint8, (12 * MIB + 3,)), (torch.float16, (3, 5, 7)), (torch.float32, (64,)), (torch.float32, (256, 256)),
        (torch.float64, (513, 1023)),
    ]  # fmt: skip

    def __init__(self, backend, streams, host=()):
        super().__init__(backend, streams)
        self.made = {}
        shapes = zip(self.SHAPES, itertools.cycle(streams)) if streams else ()
        for i, ((dtype, shape), stream) in enumerate(shapes):
            with within(stream):
                self.made[f"tensor.{i}"] = torch.zeros(shape, dtype=dtype, device=backend.on), stream
        for i, size in enumerate(host):
            self.made[f"host.{i}"] = torch.zeros(size, dtype=torch.uint8), None
        self.update()

    def held(self):
        return self.made

    def update(self, only=lambda tensor: True):
        for tensor, stream in self.made.values():
            if only(tensor):
                with within(stream):
                    raw(tensor).random_(0, 256)

    def update_small(self):
        self.update(lambda tensor: tensor.nbytes <= 4 * KIB)

    def forward(self):
        self.sleep(1_000_000)
        for tensor, stream in self.made.values():
            with within(stream):
                raw(tensor).max()


class AdamW(Base):
    """A model in training: forward and backward only read the parameters, `update` is the optimizer's step.

    Without `capturable`, foreach counts its steps in tensors of the host, which it writes in place."""

    def __init__(self, backend, streams, **options):
        super().__init__(backend, streams)
        (self.stream,), self.width = streams, 2048 if backend.cuda else 128
        with within(self.stream):
            linear, gelu = torch.nn.Linear, torch.nn.GELU
            layers = linear(256, self.width), gelu(), linear(self.width, self.width), gelu(), linear(self.width, 64)
            self.model = torch.nn.Sequential(*layers).to(backend.on)
            self.input = torch.zeros(64, 256, device=backend.on)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, **options)
        self.forward()
        self.update()  # creates the optimizer's moments

    def held(self):
        held = {}
        for name, parameter in self.model.named_parameters():
            held[name] = parameter, self.stream
            for kind, tensor in self.optimizer.state[parameter].items():
                held[f"{name}.{kind}"] = tensor, self.stream if tensor.is_cuda else None
        return held

    def forward(self):
        self.sleep(1_000_000)
        with within(self.stream):
            self.optimizer.zero_grad()
            self.compute()

    def compute(self):
        self.model(self.input.normal_()).square().mean().backward()

    def update(self):
        with within(self.stream):
            self.optimizer.step()


class Graph(AdamW):
    """The same as one captured graph, once it is captured; its replay is the update."""

    graph = None
    soon_staged = True  # torch waits for the device before it captures

    def capture(self, during):
        self.optimizer.zero_grad()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.compute()
            self.optimizer.step()
            during()

    def forward(self):
        if self.graph:
            self.sleep(1_000_000)
        else:
            super().forward()

    def update(self):
        if not self.graph:
            return super().update()
        with within(self.stream):
            self.graph.replay()


class Loose(Base):
    """Tensors of a few sizes, made anew for each save. Of three trials, one reuses the memory in the stream that had it, one
    in another, one in another that had used the tensors as well."""

    def __init__(self, backend, streams):
        super().__init__(backend, streams[:1])
        self.stream, self.other = streams
        self.made = {}

    def held(self):
        return self.made

    def allocate(self, random, trial):
        self.kind, scale = trial % 3, 1 if self.backend.cuda else 0.05
        sizes = [int(random.choice([3 * MIB, 24 * MIB, 1 * MIB + 1]) * scale) for _ in range(random.randint(2, 6))]
        self.made = {f"tensor.{i}": (self.memory(size, self.stream), self.stream) for i, size in enumerate(sizes)}

    def memory(self, size, stream):
        with within(stream):
            return torch.empty(size, dtype=torch.uint8, device=self.backend.on)

    def update(self):
        for tensor, stream in self.made.values():
            with within(stream):
                tensor.random_(0, 256)
            if self.kind == 2 and stream:
                self.other.wait_stream(stream)
                with within(self.other):
                    tensor.max()
                tensor.record_stream(self.other)

    def free(self):
        """Frees all tensors, and returns their addresses."""
        self.sizes, old = [t.nbytes for t, _ in self.made.values()], {t.data_ptr() for t, _ in self.made.values()}
        self.made = {}
        return old

    def finish(self):
        """Waits until any stream can reuse the freed memory."""
        if self.stream:
            self.stream.synchronize()
            torch.cuda.empty_cache()

    def reuse(self):
        """Allocates as much memory, writes it, and returns its addresses."""
        stream = self.other if self.kind else self.stream
        fresh = [self.memory(size, stream) for size in self.sizes]
        for tensor in fresh:
            with within(stream):
                tensor.fill_(0xEE)
        return {tensor.data_ptr() for tensor in fresh}
