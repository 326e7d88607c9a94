"""The peers, each used as its documentation says.

A system turns arrays into its own state, and saves it: `save` returns when the caller may train on and change the tensors, with
a function that returns when the system says that the save is done. This file never asks a system to fsync.
"""
import importlib.metadata
import os
import resource

STOCK = ("torch-save", "safetensors", "dcp", "dcp-thread", "dcp-process")
JAX = ("orbax", "tensorstore", "tensorstore-ocdbt")


class Torch:
    """A state of torch tensors over the arrays' memory."""

    def __init__(self):
        import torch

        self.torch = torch
        self.versions = versions("torch")

    def state(self, arrays):
        return {name: self.tensor(array) for name, array in arrays}

    def tensor(self, array):
        if array.dtype == "uint16":
            return self.torch.from_numpy(array.view("int16")).view(self.torch.bfloat16)
        return self.torch.from_numpy(array.view("float32"))


class TorchSave(Torch):
    def save(self, path, state):
        self.torch.save(state, path)
        return lambda: None


class Safetensors(Torch):
    def __init__(self):
        super().__init__()
        from safetensors.torch import save_file

        self.save_file, self.versions = save_file, versions("torch", "safetensors")

    def save(self, path, state):
        self.save_file(state, path)
        return lambda: None


class Dcp(Torch):
    """torch's distributed checkpoint in a world of one; it fsyncs its files by itself."""

    def __init__(self, kind=None):
        super().__init__()
        import torch.distributed as dist
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        self.dcp, self.kind = dcp, kind and AsyncCheckpointerType[kind]
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
        dist.init_process_group("cpu:gloo")

    def state(self, arrays):
        state = super().state(arrays)
        # torch passes each tensor to the other process by a descriptor, two while it is sent. Where the
        # descriptors do not suffice, its documentation says to do this instead.
        if 2 * len(state) > resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
            self.torch.multiprocessing.set_sharing_strategy("file_system")
        return state

    def save(self, path, state):
        if self.kind is None:
            self.dcp.save(state, checkpoint_id=path)
            return lambda: None
        return self.dcp.async_save(state, checkpoint_id=path, async_checkpointer_type=self.kind).result


class Orbax:
    """Arrays of jax never change, so Orbax may return before it has read them all."""

    def __init__(self):
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax
        import orbax.checkpoint as ocp

        self.jax, self.ocp, self.versions = jax, ocp, versions("jax", "orbax-checkpoint", "tensorstore")
        self.checkpointer = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())

    def state(self, arrays):
        types = {"uint16": self.jax.numpy.bfloat16, "uint32": "float32"}
        state = {name: self.jax.device_put(array.view(types[str(array.dtype)])) for name, array in arrays}
        return self.jax.block_until_ready(state)

    def save(self, path, state):
        self.checkpointer.save(path, args=self.ocp.args.StandardSave(state))
        return self.checkpointer.wait_until_finished


class TensorStore:
    """Each tensor a zarr3 array of one chunk, without a compressor; in files of its own, or all in one OCDBT database."""

    def __init__(self, database=False):
        import ml_dtypes
        import tensorstore

        self.ts, self.types = tensorstore, {"uint16": ml_dtypes.bfloat16, "uint32": "float32"}
        self.database, self.versions = database, versions("tensorstore")

    def state(self, arrays):
        return {name: array.view(self.types[str(array.dtype)]) for name, array in arrays}

    def save(self, path, state):
        # A transaction of a database stays in memory until it is committed; files are written as they come.
        transaction = self.ts.Transaction() if self.database else None
        context = self.ts.Context()
        opening = [self.open(path, name, array, context, transaction) for name, array in state.items()]
        writes = [store.result().write(array) for store, array in zip(opening, state.values())]
        for write in writes:
            write.copy.result()  # from here on the array may be changed
        if transaction:
            committed = transaction.commit_async()
            return committed.result
        return lambda: [write.commit.result() for write in writes]

    def open(self, path, name, array, context, transaction):
        where = {"driver": "file", "path": f"{path}/{name}/"}
        if self.database:
            where = {"driver": "ocdbt", "base": f"file://{path}/", "path": f"{name}/"}
        grid = {"name": "regular", "configuration": {"chunk_shape": array.shape}}
        spec = {"driver": "zarr3", "kvstore": where, "metadata": {"chunk_grid": grid, "codecs": [{"name": "bytes"}]}}
        wanted = {"dtype": self.ts.dtype(array.dtype), "shape": array.shape, "create": True}
        return self.ts.open(spec, context=context, transaction=transaction, **wanted)


def versions(*packages):
    return {package: importlib.metadata.version(package) for package in packages}


def make(name):
    """The system of this name."""
    known = {
        "torch-save": TorchSave, "safetensors": Safetensors, "dcp": Dcp, "dcp-thread": lambda: Dcp("THREAD"),
        "dcp-process": lambda: Dcp("PROCESS"), "orbax": Orbax, "tensorstore": TensorStore,
        "tensorstore-ocdbt": lambda: TensorStore(database=True),
    }  # fmt: skip
    return known[name]()
