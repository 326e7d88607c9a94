#!/usr/bin/env python3
"""Measures how fast the kernels are beside the device's own copies, by events, through the driver alone.

  kernels.py FOLDER [--library PATH]     FOLDER holds the PTX; one JSON object on stdout

With the simulated driver as the library it does the same on little memory and prints no figures: it then only shows that the
calls succeed.
"""
import argparse, ctypes, json, statistics, struct, sys
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path

PIECE, MIB = 64 << 10, 1 << 20


class Cuda:
    def __init__(self, library):
        self.lib = ctypes.CDLL(library)
        self.simulated = hasattr(self.lib, "fakecuda_live")
        device, context = c_int(), c_void_p()
        self.context = context
        self("cuInit", 0)
        self("cuDeviceGet", byref(device), 0)
        self("cuDevicePrimaryCtxRetain", byref(context), device)
        self("cuCtxSetCurrent", context)
        name, version = ctypes.create_string_buffer(100), c_int()
        self("cuDeviceGetName", name, 100, device)
        self("cuDriverGetVersion", byref(version))
        self.device, self.version = name.value.decode(), version.value
        processors = c_int()
        self("cuDeviceGetAttribute", byref(processors), 16, device)
        self.grid = 8 * processors.value
        self.stream, self.events = self.made("cuStreamCreate", 1), [self.made("cuEventCreate", 0) for _ in range(2)]

    def __call__(self, name, *arguments):
        code = getattr(self.lib, name)(*arguments)
        if code:
            raise RuntimeError(f"{name}: error {code}")

    def made(self, name, *arguments):
        handle = c_void_p()
        self(name, byref(handle), *arguments)
        return handle

    def memory(self, size, data=None):
        at = self.made("cuMemAlloc_v2", c_size_t(max(size, 1)))
        if data is not None:
            self("cuMemcpyHtoD_v2", at, data, c_size_t(size))
            self("cuCtxSynchronize")  # the bytes may still be in flight, and our stream does not wait for them
        return at.value

    def functions(self, ptx, *names):
        module = self.made("cuModuleLoadData", c_char_p(ptx.read_bytes()))
        return [self.made("cuModuleGetFunction", module, c_char_p(n.encode())) for n in names]

    def launch(self, function, argument, grid=None, block=256, stream=None):
        held = ctypes.create_string_buffer(argument, len(argument))
        parameters = (c_void_p * 1)(ctypes.addressof(held))
        one = c_uint(1)
        self("cuLaunchKernel", function, c_uint(grid or self.grid), one, one, c_uint(block), one, one, c_uint(0),
             stream or self.stream, parameters, None)

    def seconds(self, work, rounds=7):
        """The median of several rounds, after one that warms up."""
        times = []
        for _ in range(rounds + 1):
            self("cuEventRecord", self.events[0], self.stream)
            work()
            self("cuEventRecord", self.events[1], self.stream)
            self("cuEventSynchronize", self.events[1])
            milliseconds = c_float()
            self("cuEventElapsedTime", byref(milliseconds), *self.events)
            times.append(milliseconds.value / 1e3)
        return statistics.median(times[1:])


def pieces(extents):
    """A table of flat pieces: (from, to, bytes, chunk), cut at 64 KiB."""
    rows = []
    for source, target, size, chunk in extents:
        for at in range(0, size, PIECE):
            rows.append(struct.pack("<QQQIIII", source + at, target + at, 0, min(PIECE, size - at), 0, chunk, 0))
    return len(rows), b"".join(rows)


def ways_of_chunks(cuda, source, to, size, watermark):
    """Chunks of 8 MiB to the host with a watermark behind each: none, in the stream of copies, and in a second stream."""
    chunk, second, event = min(8 * MIB, size), cuda.made("cuStreamCreate", 1), cuda.made("cuEventCreate", 2)

    def write(stream, number):
        cuda("cuStreamWriteValue64_v2", stream, c_void_p(watermark), ctypes.c_uint64(number), 0)

    def apart(number):
        cuda("cuEventRecord", event, cuda.stream)
        cuda("cuStreamWaitEvent", second, event, 0)
        write(second, number)

    def copies(mark):
        for number, at in enumerate(range(0, size, chunk)):
            length = min(chunk, size - at)
            cuda("cuMemcpyDtoHAsync_v2", c_void_p(to + at), c_void_p(source + at), c_size_t(length), cuda.stream)
            mark(number)

    marks = {
        "chunks without a watermark": lambda number: None,
        "chunks with a watermark in their stream": lambda number: write(cuda.stream, number),
        "chunks with a watermark in a second stream": apart,
    }
    figures = {}
    for name, mark in marks.items():
        seconds = cuda.seconds(lambda: copies(mark))
        figures[name] = {"bytes": size, "seconds": seconds, "gb_per_s": size / seconds / 1e9}
    cuda("cuStreamSynchronize", second)
    return figures


def rooms(cuda, gather, extents, table, room, to):
    """Small tensors to the host by chunks of 8 MiB, gathered in one GPU buffer, or in two so that kernel and copy overlap."""
    chunk, second = 8 * MIB, cuda.made("cuStreamCreate", 1)
    # Where each chunk begins and ends in the table, of which each row is one tensor here: all are shorter than a piece.
    chunks, begin = [], 0
    for row in range(1, len(extents) + 1):
        if row == len(extents) or extents[row][1] - extents[begin][1] >= chunk:
            end = extents[row - 1][1] + extents[row - 1][2]
            chunks.append((begin, row - begin, extents[begin][1], end - extents[begin][1]))
            begin = row
    rows = cuda.memory(len(table), table)
    gathered, copied = ([cuda.made("cuEventCreate", 2) for _ in range(2)] for _ in range(2))
    total = sum(length for *_, length in chunks)

    def work(count):
        for number, (first, tensors, offset, length) in enumerate(chunks):
            which = number % count
            # Offsets in the table are those in the whole, so each buffer's base lies that far before its
            # chunk.
            base = (room + which * 2 * chunk - offset) % (1 << 64)
            kernel_in = cuda.stream if count == 1 else second
            if count == 2 and number >= 2:
                cuda("cuStreamWaitEvent", second, copied[which], 0)
            cuda.launch(gather, struct.pack("<QQQII", rows, 0, base, first, tensors), stream=kernel_in)
            if count == 2:
                cuda("cuEventRecord", gathered[which], second)
                cuda("cuStreamWaitEvent", cuda.stream, gathered[which], 0)
            at = to + offset
            cuda("cuMemcpyDtoHAsync_v2", c_void_p(at), c_void_p(room + which * 2 * chunk), c_size_t(length), cuda.stream)
            if count == 2:
                cuda("cuEventRecord", copied[which], cuda.stream)

    figures = {}
    for count, name in ((1, "small tensors by chunks through one room"), (2, "small tensors by chunks through two rooms")):
        seconds = cuda.seconds(lambda: work(count))
        figures[name] = {"bytes": total, "seconds": seconds, "gb_per_s": total / seconds / 1e9}
    cuda("cuStreamSynchronize", second)
    return figures


def main():
    p = argparse.ArgumentParser()
    p.add_argument("folder", type=Path)
    p.add_argument("--library", default="libcuda.so.1")
    a = p.parse_args()
    cuda, figures = Cuda(a.library), {}
    scale = 256 if cuda.simulated else 1
    (gather,) = cuda.functions(a.folder / "gather.ptx", "gather")
    latch, late, late_four, publish = cuda.functions(
        a.folder / "late_copy.ptx", "fence_latch", "late_copy", "late_copy_four", "fence_publish"
    )
    tables_fill, digest = cuda.functions(a.folder / "digest.ptx", "digest_tables", "digest")

    def rate(name, size, work):
        seconds = cuda.seconds(work)
        figures[name] = {"bytes": size, "seconds": seconds, "gb_per_s": size / seconds / 1e9}

    # The limits.
    size = 4096 * MIB // scale
    live, scratch = cuda.memory(size + 4096), cuda.memory(size + 4096)
    cuda("cuMemsetD8Async", c_void_p(live), 7, c_size_t(size), cuda.stream)
    on_host = size // 4
    pinned = cuda.made("cuMemHostAlloc", c_size_t(on_host), 0).value

    def copy(name, to, source, size, part):
        for at in range(0, size, part):
            cuda(name, c_void_p(to + at), c_void_p(source + at), c_size_t(min(part, size - at)), cuda.stream)

    rate("copy to the host, whole", on_host, lambda: copy("cuMemcpyDtoHAsync_v2", pinned, live, on_host, on_host))
    rate("copy to the host, by 16 MiB", on_host, lambda: copy("cuMemcpyDtoHAsync_v2", pinned, live, on_host, 16 * MIB))
    rate("copy within the device", size, lambda: copy("cuMemcpyDtoDAsync_v2", scratch, live, size, size))

    # Small tensors: 20,000 of 16 KiB and 20,000 of 1 KiB, spaced wider than they are long.
    extents, at, to = [], live, 0
    for length in (16 << 10, 1 << 10):
        for _ in range(20_000 // scale):
            extents.append((at, to, length, 0))
            at, to = at + length + 512, to + length
    count, table = pieces(extents)
    gathered = struct.pack("<QQQII", cuda.memory(len(table), table), 0, scratch, 0, count)
    rate("gather small tensors", to, lambda: cuda.launch(gather, gathered))

    def gather_and_copy():
        cuda.launch(gather, gathered)
        copy("cuMemcpyDtoHAsync_v2", pinned, scratch, to, 16 * MIB)

    rate("gather small tensors, and copy to the host", to, gather_and_copy)
    targets = (ctypes.c_uint64 * count)(*[pinned + e[1] for e in extents])
    sources, sizes = (ctypes.c_uint64 * count)(*[e[0] for e in extents]), (c_size_t * count)(*[e[2] for e in extents])
    kinds, first = (c_uint * 6)(1, 0, 0, 0, 0, 0), (c_size_t * 1)(0)
    if cuda.version >= 12_080:
        failed = (byref(c_size_t()),) if cuda.version < 13_000 else ()
        name = "cuMemcpyBatchAsync" if failed else "cuMemcpyBatchAsync_v2"
        batch = lambda: cuda(name, targets, sources, sizes, c_size_t(count), kinds, first, c_size_t(1), *failed, cuda.stream)
        rate("batch of small copies to the host", to, batch)

    watermark = cuda.memory(8, bytes(8))
    figures |= ways_of_chunks(cuda, live, pinned, on_host, watermark)
    figures |= rooms(cuda, gather, extents, table, scratch, pinned)

    # A transposed matrix of floats.
    side = 4096 // (16 if cuda.simulated else 1)
    view = struct.pack("<8Q8qII", side, side, *[0] * 6, 4, 4 * side, *[0] * 6, 2, 4)
    rows = [struct.pack("<QQQIIII", live, at, at, PIECE, 1, 0, 0) for at in range(0, 4 * side * side, PIECE)]
    rows_at, view_at = cuda.memory(40 * len(rows), b"".join(rows)), cuda.memory(len(view), view)
    strided = struct.pack("<QQQII", rows_at, view_at, scratch, 0, len(rows))
    rate("gather a transposed matrix", 4 * side * side, lambda: cuda.launch(gather, strided))

    # The fence: everything late, at four alignments; and nothing late.
    fence = cuda.memory(24, bytes(24))
    flag = cuda.made("cuMemHostAlloc", c_size_t(8), 0).value
    saves = iter(range(1, 1 << 30))

    def fences(shift, left, late=late):
        chunk = 16 * MIB // scale
        chunks = size // chunk
        count, table = pieces([(live + shift + i * chunk, 0, chunk, i) for i in range(chunks)])
        starts = struct.pack(f"<{chunks + 1}I", *[i * count // chunks for i in range(chunks + 1)])
        slots = struct.pack(f"<{chunks}Q", *[scratch + i * chunk for i in range(chunks)])
        tables = [cuda.memory(len(t), t) for t in (table, starts, slots)]
        base = 0 if left else 1 << 40
        cuda("cuStreamWriteValue64_v2", cuda.stream, c_void_p(watermark), ctypes.c_uint64(chunks), 0)
        copying = struct.pack("<QQQQQII", fence, tables[0], 0, tables[1], tables[2], chunks, 0)
        publishing = struct.pack("<QQ", fence, flag)

        def work():
            cuda.launch(latch, struct.pack("<QQQQII", fence, watermark, base, next(saves), chunks, 0), 1, 1)
            cuda.launch(late, copying)
            cuda.launch(publish, publishing, 1, 1)

        return work

    for shift in (0, 8, 4, 1):
        rate(f"fence with all chunks late, source at {shift}", size, fences(shift, False))
    rate("fence with all chunks late, four loads in flight", size, fences(0, False, late_four))
    figures["fence with no chunk late"] = {"seconds": cuda.seconds(fences(0, True))}

    # Digests.
    tables = cuda.memory(8 * (2048 + 256 + 40))
    cuda.launch(tables_fill, struct.pack("<Q", tables), 16)
    for shift in (0, 2):
        count, table = pieces([(live + shift, 0, size, 0)])
        out = cuda.memory(8 * count, bytes(8 * count))
        argument = struct.pack("<QQQQII", cuda.memory(len(table), table), 0, tables, out, 0, count)
        rate(f"digest, at {shift}", size, lambda: cuda.launch(digest, argument))

    cuda("cuStreamSynchronize", cuda.stream)
    if cuda.simulated:
        return print(f"simulated driver: {len(figures)} measurements ran, and mean nothing")
    json.dump({"device": cuda.device, "driver": cuda.version, "figures": figures}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
