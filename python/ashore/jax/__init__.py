"""Checkpoints of JAX pytrees: sharded arrays are saved from their shards and restored to any other sharding.

>>> import ashore, ashore.jax, jax.numpy as jnp, tempfile
>>> executor = ashore.CheckpointExecutor(tempfile.mkdtemp(), arena=8 << 20, chunk=1 << 20)
>>> state = {"weights": jnp.arange(6.0).reshape(2, 3), "epoch": 4}
>>> save = ashore.jax.save(executor, 1, state)
>>> executor.fence()  # before a step that donates the state: then the step need not copy it
>>> save.wait().step
1
>>> restored = ashore.jax.restore(executor.latest(), state)
>>> float(restored["weights"].sum()), restored["epoch"]
(15.0, 4)
>>> executor.shutdown()

``ashore.jax.orbax`` contains a handler that makes ``orbax.checkpoint.CheckpointManager`` save with ashore.
"""

from ._restore import restore, shapes
from ._save import save

__all__ = ["restore", "save", "shapes"]

for _function in (restore, save, shapes):
    _function.__module__ = __name__
del _function
