"""Several processes of JAX save one step together, and other numbers of processes restore it."""

import pathlib
import socket
import subprocess
import sys

import numpy
from devices import over, same  # isort: skip

import jax

import ashore
import ashore.jax

PROCESS = pathlib.Path(__file__).with_name("process.py")


def run(verb, root):
    """Runs both processes; returns the result of each: XLA and Gloo print other lines, before and after it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(PROCESS), verb, str(root)]
    both = [
        subprocess.Popen([*command, str(rank), port], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=180) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    said = [line.removeprefix("result: ") for out, _ in outputs for line in out.splitlines() if line.startswith("result: ")]
    assert len(said) == 2, outputs
    return said


def test_two_processes_save_one_step_and_one_or_two_restore_it(root):
    assert run("save", root) == ["step 1 0.0", "step 1 0.0"]
    checkpoint = ashore.latest(root)
    assert checkpoint.ranks == 2 and len(checkpoint.boxes("tiles")) == 8 and len(checkpoint.boxes("columns")) == 2
    assert run("restore", root) == ["restored", "restored"]
    # Here are eight devices of one process.
    whole = numpy.arange(64, dtype="float32").reshape(8, 8)
    target = ashore.jax.shapes(checkpoint)
    for name, sharding in {"tiles": over((8,), "x"), "columns": over((2, 2), "y", "x"), "same": over((3,))}.items():
        target[name] = jax.ShapeDtypeStruct((8, 8), "float32", sharding=sharding)
    target["host"] = numpy.zeros(4)
    got = ashore.jax.restore(checkpoint, target)
    assert all(same(got[name], whole) for name in ("tiles", "columns", "same"))
    assert same(jax.random.key_data(got["keys"]), numpy.arange(16, dtype="uint32").reshape(8, 2)) and got["epoch"] == 7


def test_one_process_saves_and_two_restore(root):
    whole = numpy.arange(64, dtype="float32").reshape(8, 8)
    keys = jax.random.wrap_key_data(numpy.arange(16, dtype="uint32").reshape(8, 2))
    arrays = {name: jax.device_put(whole, over((8,), None, "x")) for name in ("tiles", "columns", "same")}
    rest = {"own": jax.numpy.arange(3) + 5, "host": numpy.arange(4.0), "keys": keys, "epoch": 7}
    with ashore.CheckpointExecutor(root, arena=8 << 20, chunk=1 << 20) as executor:
        ashore.jax.save(executor, 3, {**arrays, **rest})
    assert run("restore", root) == ["restored", "restored"]


def test_an_executor_without_ranks_refuses_shards_of_other_processes(root):
    assert run("alone", root) == ["refused tiles True", "refused tiles True"]
    assert ashore.latest(root) is None
