"""A training that goes on where the newest durable step left it: run by `test_jax_training.py`.

    training.py ROOT STEPS

It prints the number of each step that begins, and at the end a digest of every bit of the state.
"""

import hashlib
import sys

from devices import over  # isort: skip

import jax
import jax.numpy as jnp
import numpy

import ashore
import ashore.jax

ROWS, BATCH = over((8,), "x"), over((8,), "x", None)


def init():
    def build():
        rows = jax.random.normal(jax.random.key(0), (256, 128))
        zeros = jnp.zeros_like(rows)
        return {"w": rows, "opt": (zeros, zeros, jnp.zeros((), "int32")), "key": jax.random.key(1)}

    state = jax.eval_shape(build)
    shardings = jax.tree.map(lambda leaf: ROWS if leaf.ndim == 2 else over((8,)), state)
    return jax.jit(build, out_shardings=shardings)()


@jax.jit
def loss(w, x):
    return jnp.mean(jnp.tanh(x @ w) ** 2)


def update(state):
    """One step of Adam on a random batch."""
    key, now = jax.random.split(state["key"])
    x = jax.random.normal(now, (16, 256))
    gradient = jax.grad(loss)(state["w"], x)
    first, second, count = state["opt"]
    first, second, count = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2, count + 1
    w = state["w"] - 0.01 * (first / (1 - 0.9**count)) / (jnp.sqrt(second / (1 - 0.99**count)) + 1e-8)
    return {"w": w, "opt": (first, second, count), "key": key}


def digest(state):
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        found.update(numpy.asarray(leaf).tobytes())
    return found.hexdigest()


def main(root, steps):
    state, done = init(), 0
    jitted = jax.jit(update, donate_argnums=0, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, state))
    with ashore.CheckpointExecutor(root, arena=8 << 20, chunk=1 << 20, keep_last=3) as executor:
        if checkpoint := executor.latest():
            state, done = ashore.jax.restore(checkpoint, (state, 0))
        for number in range(done, steps):
            print(f"step {number}", flush=True)
            executor.fence()
            state = jitted(state)
            if number % 2:
                # The next step donates what is being saved.
                ashore.jax.save(executor, number + 1, (state, number + 1))
    print("digest", digest(state))


main(sys.argv[1], int(sys.argv[2]))
