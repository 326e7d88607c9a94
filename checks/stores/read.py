#!/usr/bin/env python3
"""Reads the shards in a directory with safetensors, numpy and torch: `read.py DIRECTORY NAME FIRST LAST LENGTH`.

The tensor NAME must have LENGTH numbers. FIRST must be the first of them and LAST the last.
"""
import pathlib
import sys

from safetensors import safe_open
from safetensors.torch import load_file

directory, name, first, last, length = sys.argv[1:]
shards = sorted(pathlib.Path(directory).glob("*.safetensors"))
assert shards, f"no shards in {directory}"
for shard in shards:
    with safe_open(shard, "numpy") as opened:
        if name in opened.keys():
            array = opened.get_tensor(name)
    tensors = load_file(shard)
    if name in tensors:
        tensor = tensors[name]
assert (len(array), int(array[0]), int(array[-1])) == (int(length), int(first), int(last)), array
assert tensor.tolist() == array.tolist()
print(f"{name}: {len(array)} numbers in {len(shards)} files")
