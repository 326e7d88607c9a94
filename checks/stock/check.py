#!/usr/bin/env python3
"""Reads the step directories under ROOT with stock Python readers, and compares every byte with the expected one.

    check.py ROOT

The expected bytes are in expected.json beside this file; no code or data here comes from ashore. Each reader
reads the unchanged directory completely: safetensors' own parser, its numpy and torch front ends, torch's
distributed checkpoint, and reader.py.
"""
import collections
import json
import pathlib
import sys

import numpy
import reader
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64, "BOOL": 8}
BITS |= {f"{kind}{bits}": bits for kind in "UIF" for bits in (8, 16, 32, 64)} | {"BF16": 16}
# Our table, not the reader's, so that a reader that confuses two dtypes is noticed.
TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
# numpy has no bfloat16.
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "|u1"}


def expectation(tensors):
    """Name to dtype, shape and bytes."""
    expected = {}
    for index, (name, dtype, shape) in enumerate(tensors):
        elements = int(numpy.prod(shape, dtype=numpy.int64))
        bits = BITS.get(dtype) or BITS[dtype.partition("_")[0]]
        count = numpy.arange(elements * bits // 8, dtype=numpy.int64)
        content = (count * 31 + index * 17 + 7) % 251 % (2 if dtype == "BOOL" else 256)
        expected[name] = dtype, shape, content.astype(numpy.uint8).tobytes()
    return expected


def raw(tensor):
    """The bytes of a torch tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def one_file(files, name):
    """The file that must hold a tensor by the index."""
    folder = files[0].parent
    index = folder / "model.safetensors.index.json"
    if len(files) == 1:
        return files[0]
    return folder / json.loads(index.read_text())["weight_map"][name]


def read_safetensors(files):
    """The reference parser. It refuses holes, overlaps, and bytes that belong to no tensor."""
    for path in files:
        for name, entry in safetensors.deserialize(path.read_bytes()):
            yield name, entry["dtype"], entry["shape"], bytes(entry["data"])


def read_numpy(files):
    names = {dtype: name for name, dtype in NUMPY.items()}
    for path in files:
        with safetensors.safe_open(path, framework="np") as opened:
            for name in opened.keys():
                if opened.get_slice(name).get_dtype() in NUMPY:
                    array = opened.get_tensor(name)
                    yield name, names[array.dtype.str], list(array.shape), array.tobytes()


def read_torch(files):
    """Whole files, and tensor by tensor from the file that the index names; both must agree."""
    names = {str(dtype): name for name, dtype in TORCH.items()}
    for path in files:
        for name, tensor in safetensors.torch.load_file(path).items():
            with safetensors.safe_open(one_file(files, name), framework="pt") as opened:
                assert raw(opened.get_tensor(name)) == raw(tensor), name
            yield name, names[str(tensor.dtype)], list(tensor.shape), raw(tensor)


def read_dcp(files):
    """torch's distributed checkpoint, into tensors that hold something else."""
    storage = dcp.HuggingFaceStorageReader(str(files[0].parent), thread_count=2)
    found = storage.read_metadata().state_dict_metadata
    state = {}
    for name, entry in found.items():
        state[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        state[name].reshape(-1).view(torch.uint8).fill_(1 if entry.properties.dtype == torch.bool else 0xAA)
    dcp.load(state, storage_reader=storage, no_dist=True)
    names = {str(dtype): name for name, dtype in TORCH.items()}
    for name, tensor in state.items():
        yield name, names[str(tensor.dtype)], list(tensor.shape), raw(tensor)


def read_tables(files):
    """The reader that was written from docs/format.md: it checks every digest that it passes."""
    step = reader.Step(str(files[0].parent))
    for name in step.names():
        yield name, *step.read(name)


READERS = {"reader": read_tables, "safetensors": read_safetensors, "numpy": read_numpy, "torch": read_torch, "dcp": read_dcp}


def compare(read, files, expected):
    """The tensors that a reader got wrong."""
    left = dict(expected)
    for name, dtype, shape, content in read(files):
        if name not in left:
            yield f"{name!r} was read twice, or was never saved"
            continue
        want_dtype, want_shape, want = left.pop(name)
        if (dtype, list(shape)) != (want_dtype, want_shape):
            yield f"{name!r} is {dtype} {list(shape)}, not {want_dtype} {want_shape}"
        if content != want:
            place = next((i for i, (a, b) in enumerate(zip(content, want)) if a != b), min(len(content), len(want)))
            yield f"{name!r} differs from byte {place}, {len(content)} bytes of {len(want)}"
    yield from (f"{name!r} is missing" for name in left)


# What write.rs saves as "kinds".
KINDS = [
    -0x1FFFFFFFFFFFFFFFF, b"\x00\xff", complex(0.5, float("inf")), ({1, 2}, frozenset([None])),
    collections.OrderedDict([("b", 1), ("a", 2)]), collections.Counter({9: 2}), {(1, "x"): True},
    {"$set": 1, 5: 2, False: 3}, numpy.float32(0.5), numpy.datetime64(7, "ns"),
]  # fmt: skip


def wrong_values(folder):
    """The values that reader.py got wrong."""
    values = reader.Step(str(folder)).values()
    wrong = [] if values["nested"] == {"lr": 0.1, "milestones": [1, 2]} else [f"nested is {values['nested']!r}"]
    for got, want in zip(values["kinds"], KINDS, strict=True):
        if (type(got), got) != (type(want), want):
            wrong.append(f"{want!r} was read as {got!r}")
    return wrong


def main(root):
    table = json.loads(pathlib.Path(__file__).with_name("expected.json").read_text())
    passed = failed = 0
    for entry in table["steps"]:
        folder = root / f"step-{entry['step']:08}"
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            sys.exit(f"no shards path={folder}")
        expected = expectation(entry["tensors"])
        for which in filter(READERS.__contains__, ["reader", *entry["readers"]]):
            known = {name: of for name, of in expected.items() if which != "numpy" or of[0] in NUMPY}
            wrong = list(compare(READERS[which], files, known))
            print(f"step {entry['step']}: {which}: {len(known)} tensors in {len(files)} files:", *wrong or ["equal"])
            failed, passed = failed + bool(wrong), passed + (not wrong)
        wrong = wrong_values(folder)
        print(f"step {entry['step']}: reader: values:", *wrong or ["equal"])
        failed, passed = failed + bool(wrong), passed + (not wrong)
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
