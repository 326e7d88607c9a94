#!/usr/bin/env python3
"""Reads the shards of several ranks with stock Python readers, and compares every byte with the expected one.

    check_ranks.py --save PROGRAM ROOT
    check_ranks.py FOLDER...
    check_ranks.py --whole FOLDER...

The file ranks.json beside this one describes the tensors. With --save, several processes of PROGRAM, the
example stock_ranks, save them as step-7 in ROOT. torch's distributed checkpoint assembles the boxes in one
process, and after --save also under torchrun in 1, 2 and 3. safetensors' own parser and its numpy front end
read each file, and its boxes are compared with those of the whole tensors. The reader of docs/format.md reads
the tables. With --whole, a FOLDER has whole tensors: `ashore convert` wrote it from the shards. All readers
of check.py read it, and its index is compared with the files.
"""
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy
import safetensors

import check

LIMIT_S = 180


def boxes(path):
    """Where the box of each tensor in a file begins, by the keys of torch."""
    with safetensors.safe_open(path, framework="np") as opened:
        strings = opened.metadata()
        assert strings["format"] == "pt" and strings["DCP_VERSION"] == "1.0" and strings["ashore_step"] == "7", strings
        info = json.loads(strings["DCP_SHARDING_INFO"])
        assert sorted(info) == sorted(opened.keys()), path
    assert info, f"torch's consolidation refuses a file without tensors: {path}"
    return {name: entry["saved_offsets"] for name, entry in info.items()}


def cut(expected, name, at, extent):
    """The bytes of a box of an expected tensor."""
    dtype, shape, content = expected[name]
    item = check.BITS.get(dtype) or check.BITS[dtype.partition("_")[0]]
    whole = numpy.frombuffer(content, numpy.uint8).reshape(*shape, item // 8)
    return whole[tuple(slice(begin, begin + size) for begin, size in zip(at, extent))].tobytes()


def files_alone(files, expected):
    """What is wrong with single files, as the reference parser and numpy read them."""
    seen = {name: 0 for name in expected}
    for path in files:
        begins = boxes(path)
        for name, entry in safetensors.deserialize(path.read_bytes()):
            extent, content = entry["shape"], bytes(entry["data"])
            if entry["dtype"] != expected[name][0] or content != cut(expected, name, begins[name], extent):
                yield f"{name!r} differs in {path.name}"
            if not content and expected[name][2]:
                yield f"an empty box of {name!r} was written in {path.name}"
            seen[name] += len(content)
        with safetensors.safe_open(path, framework="np") as opened:
            for name in opened.keys():
                if expected[name][0] in check.NUMPY and opened.get_tensor(name).tobytes() != cut(
                    expected, name, begins[name], opened.get_slice(name).get_shape()
                ):
                    yield f"numpy reads {name!r} otherwise in {path.name}"
    for name, written in seen.items():
        if written != len(expected[name][2]):
            yield f"{name!r} was written with {written} bytes of {len(expected[name][2])}"


def index(folder, files):
    """What is wrong with the index, as transformers reads it."""
    found = json.loads((folder / "model.safetensors.index.json").read_text())
    there, total = {}, 0
    for path in files:
        with safetensors.safe_open(path, framework="pt") as opened:
            if "DCP_SHARDING_INFO" in opened.metadata():
                yield f"{path.name} says that it has boxes"
            if opened.metadata()["format"] != "pt":
                yield f"{path.name} has another format"
            for name in opened.keys():
                there[name] = path.name
                tensor = opened.get_tensor(name)
                total += tensor.numel() * tensor.element_size()
    if found["weight_map"] != there:
        yield "the index names other files"
    if found["metadata"]["total_size"] != total:
        yield f"total_size is {found['metadata']['total_size']}, not {total}"


def results(folder, whole, expected):
    files = sorted(folder.glob("*.safetensors"))
    assert files, f"no shards path={folder}"
    if not whole:
        yield "safetensors and numpy, file by file", files, list(files_alone(files, expected))
        yield "dcp, one process", files, list(check.compare(check.read_dcp, files, expected))
        yield "reader", files, list(check.compare(check.read_tables, files, expected))
        return
    if len(files) > 1:
        yield "index", files, list(index(folder, files))
    for name in ("reader", "safetensors", "torch", "dcp"):
        yield name, files, list(check.compare(check.READERS[name], files, expected))
    for_numpy = {name: entry for name, entry in expected.items() if entry[0] in check.NUMPY}
    yield "numpy", files, list(check.compare(check.read_numpy, files, for_numpy))


def save(program, root, world):
    """Saves by as many processes as there are ranks."""
    def start(rank):
        told = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "TORCHELASTIC_RUN_ID": "stock", "TORCHELASTIC_RESTART_COUNT": 0}
        return subprocess.Popen([program, root], env=os.environ | {name: str(value) for name, value in told.items()})
    ranks = [start(rank) for rank in range(world)]
    try:
        codes = [rank.wait(timeout=LIMIT_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * world, codes


def names(root, files):
    """What is wrong with the names below the root: stock readers take every `.safetensors` file of a directory for a shard."""
    for path in root.rglob("*"):
        if path.name.endswith(".safetensors") and path not in files:
            yield f"{path} looks like a shard"
    for path in files:
        if not re.fullmatch(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors", path.name):
            yield f"{path.name} is no shard of a rank"


def torchrun(folder):
    """What is wrong when torch's own `dcp.load` puts the boxes together, cut otherwise, in 1, 2 and 3 processes."""
    command = [pathlib.Path(sys.executable).with_name("torchrun"), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    for world in (1, 2, 3):
        load = [*command, "--nproc-per-node", str(world), pathlib.Path(__file__).with_name("load_ranks.py"), folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        run = subprocess.run(load, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S)
        equal = [f"rank {rank} of {world}:" in run.stdout for rank in range(world)]
        if run.returncode or not all(equal):
            yield f"torchrun with {world} ranks failed:\n{run.stdout}"


def main(arguments):
    table = json.loads(pathlib.Path(__file__).with_name("ranks.json").read_text())
    expected = check.expectation([(t["name"], t["dtype"], t["shape"]) for t in table["tensors"]])
    saved, whole = arguments[:1] == ["--save"], arguments[:1] == ["--whole"]
    folders = [pathlib.Path(folder) for folder in arguments[whole:]]
    if saved:
        program, root = arguments[1], pathlib.Path(arguments[2])
        save(program, root, table["ranks"])
        folders = [root / "step-7"]
    failed = False
    for folder in folders:
        of_folder = list(results(folder, whole, expected))
        if saved:
            files = sorted(folder.glob("*.safetensors"))
            of_folder += [("names", files, list(names(root, files))), ("dcp under torchrun", files, list(torchrun(folder)))]
        for reader, files, wrong in of_folder:
            print(f"{folder.name}, {reader}: {len(expected)} tensors in {len(files)} files:", *wrong or ["equal"])
            failed |= bool(wrong)
    sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1:])
