"""One of two processes with four devices each: run by `test_jax_processes.py`.

process.py save|restore|alone ROOT RANK PORT
"""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy
from jax.sharding import NamedSharding, PartitionSpec

import ashore
import ashore.jax

verb, root, rank, port = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
assert jax.process_count() == 2 and len(jax.devices()) == 8 and len(jax.local_devices()) == 4
mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def made(whole, *spec):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


whole = numpy.arange(64, dtype="float32").reshape(8, 8)
state = {
    "tiles": made(whole, "x", "y"),
    "columns": made(whole, None, "y"),
    "same": made(whole),
    "own": jnp.arange(3) + 5,
    "host": numpy.arange(4.0),
    "keys": jax.random.wrap_key_data(made(numpy.arange(16, dtype="uint32").reshape(8, 2), "x")),
    "epoch": 7,
}
if verb == "alone":
    with ashore.CheckpointExecutor(root, arena=8 << 20, chunk=1 << 20, alone=True) as executor:
        try:
            ashore.jax.save(executor, 1, {"own": state["own"], "tiles": state["tiles"]})
        except ashore.InvalidError as error:
            print("result: refused", error.tensor, "give the executor ranks" in str(error))
elif verb == "save":
    settings = {"arena": 8 << 20, "chunk": 1 << 20, "ranks": (rank, 2, rank), "run": f"run {port}"}
    with ashore.CheckpointExecutor(root, **settings) as executor:
        save = ashore.jax.save(executor, 1, state)
        donated = jax.jit(lambda array: array * 0, donate_argnums=0)(state["tiles"])
        print("result: step", save.wait().step, float(jax.jit(jnp.sum)(donated)))
else:
    got = ashore.jax.restore(ashore.latest(root), state)
    for name in ("tiles", "columns", "same"):
        assert got[name].sharding == state[name].sharding
        for shard in got[name].addressable_shards:
            assert (numpy.asarray(shard.data) == whole[shard.index]).all(), name
    data = jax.random.key_data(got["keys"])
    for shard in data.addressable_shards:
        assert (numpy.asarray(shard.data) == numpy.arange(16).reshape(8, 2)[shard.index]).all()
    assert got["own"].tolist() == [5, 6, 7] and got["host"].tolist() == [0, 1, 2, 3] and got["epoch"] == 7
    print("result: restored")
