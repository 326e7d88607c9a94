#!/usr/bin/env python3
"""A reader of steps, written only from docs/format.md: versions 1 and 2, of one rank and of several ranks.

    reader.py STEP...       reads every tensor and value of these directories, and checks every digest that it passes

It uses numpy and json, and no code of ashore. It finds tensors by bisection and reads only the table pages
that it needs.
"""
import collections
import json
import os
import struct
import sys

import numpy

POLYNOMIAL, ONES, BLOCK, PAGE = 0x9A6C9329AC4BC9B5, 2**64 - 1, 8 << 20, 16 << 10
BITS = dict(BOOL=8, F4=4, F6_E2M3=6, F6_E3M2=6, U8=8, I8=8, F8_E5M2=8, F8_E4M3=8, F8_E8M0=8, F8_E4M3FNUZ=8, F8_E5M2FNUZ=8,
            I16=16, U16=16, F16=16, BF16=16, I32=32, U32=32, F32=32, C64=64, F64=64, I64=64, U64=64)  # fmt: skip
SIZES = {"U8": 1, "U32": 4, "U64": 8}


def times(a, b):
    """a * b in the ring of section 2, bits reflected; b may be an array."""
    product = b ^ b
    for bit in range(63, -1, -1):
        product = product ^ b if a >> bit & 1 else product
        b = (b >> 1) ^ (b & 1) * POLYNOMIAL
    return product


def power(n):
    """x^(8n)."""
    result, square = 1 << 63, 1 << 55
    while n:
        result, square, n = times(square, result) if n & 1 else result, times(square, square), n >> 1
    return result


TABLE = numpy.arange(256, dtype=numpy.uint64)
for _ in range(8):
    TABLE = (TABLE >> 1) ^ (TABLE & 1) * POLYNOMIAL


def digest(data):
    """CRC-64/NVME: many lanes at once, joined in pairs. Zeros in front do not change a CRC that starts at zero."""
    lanes = 1 << len(data).bit_length() // 2
    length = -(-len(data) // lanes)
    lined = numpy.zeros(lanes * length, numpy.uint8)
    lined[len(lined) - len(data):] = numpy.frombuffer(data, numpy.uint8)
    crc = numpy.zeros(lanes, numpy.uint64)
    for column in lined.reshape(lanes, length).T:
        crc = TABLE[(crc & 255).astype(numpy.uint8) ^ column] ^ (crc >> 8)
    while len(crc) > 1:
        crc, length = times(power(length), crc[::2]) ^ crc[1::2], 2 * length
    return int(crc[0]) ^ times(power(len(data)), ONES) ^ ONES


def check(true, *what):
    if not true:
        raise ValueError("damaged", *what)


def bisect(count, before):
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if before(middle) else (low, middle)
    return low


def value(encoded):
    """A value of section 6 in Python's kinds."""
    if isinstance(encoded, list):
        return [value(item) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    key, content = next(iter(encoded.items()), ("", None))
    if key in KINDS:
        check(len(encoded) == 1, key)
        return KINDS[key](content)
    return {plain_key(key): value(content) for key, content in encoded.items()}


def plain_key(key):
    kind, _, text = key.partition(":")
    check(key[:1] != "$" or key[:2] == "$$" or kind == "$int" or key in ("$bool:true", "$bool:false"), key)
    return int(text) if kind == "$int" else text == "true" if kind == "$bool" else key[1:] if key[:1] == "$" else key


def pairs(content):
    return [(value(key), value(item)) for key, item in content]


def scalar(content):
    dtype, item = numpy.dtype(content[0]), value(content[1])
    return numpy.array(item, numpy.int64).astype(dtype)[()] if dtype.kind in "mM" else dtype.type(item)


KINDS = {
    "$f64": lambda bits: struct.unpack(">d", bytes.fromhex(bits))[0],
    "$f32": lambda bits: struct.unpack(">f", bytes.fromhex(bits))[0],
    "$big": lambda digits: int(digits, 16), "$bytes": bytes.fromhex, "$complex": lambda parts: complex(*map(value, parts)),
    "$tuple": lambda items: tuple(map(value, items)), "$set": lambda items: set(map(value, items)),
    "$frozenset": lambda items: frozenset(map(value, items)), "$map": lambda content: dict(pairs(content)),
    "$ordered": lambda content: collections.OrderedDict(pairs(content)), "$numpy": scalar,
    "$counter": lambda content: collections.Counter(dict(pairs(content))),
}  # fmt: skip


class File:
    def __init__(self, folder, name, length):
        self.name, self.fd = name, os.open(os.path.join(folder, name), os.O_RDONLY)
        check(os.fstat(self.fd).st_size == length, name, "length")

    def read(self, offset, length):
        return os.pread(self.fd, length, offset)


class Table:
    """Columns. Only pages with rows that are asked for are read, and each is checked."""

    def __init__(self, folder, name, length, expected):
        self.file, self.pages = File(folder, name, length), {}
        self.data = 8 + int.from_bytes(self.file.read(0, 8), "little")
        header = self.file.read(0, self.data)
        self.columns = json.loads(header[8:])
        self.end, end = self.columns["pages"]["data_offsets"]
        digests = self.file.read(self.data + self.end, end - self.end)
        check(digest(header + digests) == expected, name, "header and pages")
        self.digests = numpy.frombuffer(digests, "<u8")

    def page(self, number):
        if number not in self.pages:
            self.pages[number] = self.file.read(self.data + number * PAGE, min(PAGE, self.end - number * PAGE))
            check(digest(self.pages[number]) == self.digests[number], self.file.name, "page", number)
        return self.pages[number]

    def rows(self, name, begin, end):
        """Rows of a column: bytes, or a list of numbers, or of lists of numbers."""
        column = self.columns[name]
        count, *width = column["shape"]
        check(0 <= begin <= end <= count, self.file.name, name, begin, end)
        size = SIZES[column["dtype"]]
        first, last = (column["data_offsets"][0] + row * size * (width or [1])[0] for row in (begin, end))
        pages = b"".join(self.page(number) for number in range(first // PAGE, -(-last // PAGE)))
        data = pages[first % PAGE:][:last - first]
        return data if size == 1 else numpy.frombuffer(data, f"<u{size}").reshape(-1, *width).tolist()

    def last(self, name):
        return self.columns[name]["shape"][0] - 1


class Step:
    def __init__(self, folder):
        text = open(os.path.join(folder, "manifest.json"), "rb").read()
        check(text.endswith(b'"}\n') and digest(text[:-19]) == int(text[-19:-3], 16), "manifest.json")
        self.folder, self.manifest, self.files = folder, json.loads(text), {}
        check(self.manifest["version"] in (1, 2), "version")
        entries = self.manifest.get("tables", [])
        self.tables = [Table(folder, t["name"], t["length"], int(t["digest"], 16)) for t in entries]

    def names(self):
        if not self.tables:
            return [tensor["name"] for tensor in self.manifest["tensors"]]
        return [self.name(number).decode() for number in range(self.tables[0].last("tensors"))]

    def name(self, number):
        return self.tables[0].rows("names", *(row[0] for row in self.tables[0].rows("tensors", number, number + 2)))

    def file(self, number):
        """A file with the right length and stamp, and the table of its rows."""
        if number not in self.files:
            if not self.tables:
                entry, table = self.manifest["files"][number], None
                name, length, step, attempt = entry["name"], entry["length"], self.manifest["step"], self.manifest["attempt"]
            else:
                listed = self.tables[-1]
                (begin, length, _, _, _, rows, expected, step, *halves), (end, *_) = listed.rows("files", number, number + 2)
                name, hexed = listed.rows("file_names", begin, end).decode(), "%016x%016x" % tuple(halves)
                attempt = "-".join(hexed[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))
                beside = name.removesuffix(".safetensors") + ".table"
                table = Table(self.folder, beside, rows, expected) if rows else self.tables[0]
            self.files[number] = File(self.folder, name, length), table
            stamp = self.files[number][0].read(0, 130)
            check((stamp[54:].split(b'"')[0], stamp[94:]) == (b"%d" % step, attempt.encode()), name, "stamp")
        return self.files[number]

    def find(self, name):
        """Dtype, shape and boxes of a tensor; a box is its file, at, extent, offset, length, digest and blocks."""
        if not self.tables:
            entry = next(tensor for tensor in self.manifest["tensors"] if tensor["name"] == name)
            return entry["dtype"], entry["shape"], [
                (s["file"], s["at"], s["shape"], s["offset"], s["length"], int(s["digest"], 16), [int(b, 16) for b in s["blocks"]])
                for s in entry["slices"]]
        table = self.tables[0]
        number = bisect(table.last("tensors"), lambda number: self.name(number) < name.encode())
        check(self.name(number) == name.encode(), name, "no such tensor")
        number = table.rows("tensors", number, number + 1)[0][6]
        (_, dim, span, box, dtype, placement, _), (_, dims, spans, boxes, *_) = table.rows("tensors", number, number + 2)
        shape, files = table.rows("dims", dim, dims), table.rows("box_files", box, boxes)
        cuts = numpy.reshape(table.rows("spans", span, spans), (-1, 2, len(shape))).tolist() if placement else [[[0] * len(shape), shape]]
        check(placement in (0, 1) and len(cuts) == len(files), name, "placement")
        found = []
        for index, (file, cut) in enumerate(zip(files, cuts)):
            place, table = box + index, self.file(file)[1]
            if "row_tensors" in table.columns:
                tensors = lambda row: table.rows("row_tensors", row, row + 1)[0]  # noqa: B023, E731
                place = bisect(table.last("rows"), lambda row: tensors(row) < number) + files[:index].count(file)
                check(tensors(place) == number, name, "row")
            (*row, block), (*_, blocks) = table.rows("rows", place, place + 2)
            found.append((file, *cut, *row, table.rows("blocks", block, blocks)))
        return list(BITS)[dtype], shape, found

    def values(self):
        return {name: value(encoded) for name, encoded in self.manifest["values"].items()}

    def read(self, name):
        """Dtype, shape and bytes of a tensor."""
        dtype, shape, boxes = self.find(name)
        whole = numpy.empty([*shape, BITS[dtype] // 8] if len(boxes) > 1 else 0, numpy.uint8)
        for file, at, extent, offset, length, expected, blocks in boxes:
            data = self.file(file)[0].read(offset, length)
            check(len(data) * 8 == int(numpy.prod(extent, dtype=object)) * BITS[dtype], name, "length")
            pieces = [data[start:start + BLOCK] for start in range(0, length, BLOCK)] if blocks else [data]
            check([digest(piece) for piece in pieces] == (blocks or [expected]), name, "bytes")
            if len(boxes) > 1:
                box = numpy.frombuffer(data, numpy.uint8).reshape(*extent, -1)
                whole[tuple(slice(a, a + n) for a, n in zip(at, extent))] = box
        return dtype, shape, whole.tobytes() if len(boxes) > 1 else data


if __name__ == "__main__":
    for step in map(Step, sys.argv[1:]):
        lengths = [len(step.read(name)[2]) for name in step.names()]
        version, values = step.manifest["version"], sorted(step.values())
        print(f"{step.folder}: version {version}, {len(lengths)} tensors, {sum(lengths)} bytes, values {values}")
