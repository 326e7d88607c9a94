"""Reads files of a step without ashore: with the safetensors package if it is installed, otherwise by its
format."""
import json

try:
    from safetensors import deserialize
except ImportError:

    def deserialize(data):
        head = 8 + int.from_bytes(data[:8], "little")
        tensors = {name: t for name, t in json.loads(data[8:head]).items() if name != "__metadata__"}
        return [(name, {"data": data[head:][slice(*t["data_offsets"])]}) for name, t in tensors.items()]


def read(path):
    """The bytes of every tensor."""
    return {name: tensor["data"] for name, tensor in deserialize(path.read_bytes())}
