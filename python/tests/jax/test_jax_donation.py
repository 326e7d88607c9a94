"""Donations right after a save: the step has the bytes of the call, never those that XLA wrote afterwards."""

from devices import numbers, over, placed, same  # isort: skip

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

import ashore.jax

SHARDINGS = {
    "sharded": over((8,), "x"),
    "partly": over((4, 2), "x"),
    "replicated": over((8,)),
    "one": over((1,), "x"),
}
ROWS = 4096  # 16 MiB, twice the arena


def step_of(sharding):
    return jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0, out_shardings=sharding)


@pytest.mark.parametrize("kind", SHARDINGS)
def test_a_donation_right_after_a_save_leaves_the_saved_bytes(executor, kind):
    sharding = SHARDINGS[kind]
    step = step_of(sharding)
    state = step({"w": placed(jnp.zeros((ROWS, 1024)), sharding)})
    met = 0
    for number in range(1, 9):
        save = ashore.jax.save(executor, number, state)
        state = step(state)
        met += not save.staged.done()
        jax.block_until_ready(state)
        state = step(state)
        save.wait()
        read = executor.checkpoint(number).read("w")
        assert (read == 2 * number - 1).all(), f"step {number}: {read.min()} to {read.max()}"
    # The donation came while the save was reading, at least once.
    assert met > 0


@pytest.mark.parametrize("kind", SHARDINGS)
def test_after_the_fence_a_donation_reuses_the_memory(executor, kind):
    sharding = SHARDINGS[kind]
    step = step_of(sharding)
    state = step(placed(numbers(256, 256), sharding))
    jax.block_until_ready(state)
    before = sorted(shard.data.unsafe_buffer_pointer() for shard in state.addressable_shards)
    ashore.jax.save(executor, 1, {"w": state})
    executor.fence()
    new = jax.block_until_ready(step(state))
    assert state.is_deleted()
    assert sorted(shard.data.unsafe_buffer_pointer() for shard in new.addressable_shards) == before


def test_until_the_fence_a_donated_array_stays_as_it_is(executor, monkeypatch):
    state = placed(numbers(4096, 1024), over((8,), "x"))
    step = step_of(state.sharding)
    save = ashore.jax.save(executor, 1, {"w": state})
    new = step(state)
    # Only calls of ashore drop capsules, so this does not depend on how fast the save was.
    assert not state.is_deleted() and same(state, numbers(4096, 1024)) and same(new, numbers(4096, 1024) + 1)
    save.wait()


def test_saves_need_no_fence_between_them(executor):
    state = {"w": placed(numbers(2048, 1024), over((8,), "x"))}
    saves = [ashore.jax.save(executor, number, state) for number in range(1, 5)]
    for save in saves:
        save.wait()
    assert executor.catalog.steps() == [1, 2, 3, 4]


def test_an_array_of_numpy_is_copied_in_the_call(executor):
    big, small = numbers(1024, 1024), numbers(4)
    save = ashore.jax.save(executor, 1, {"big": big, "small": small})
    big[:] = small[:] = -1
    save.wait()
    got = executor.latest()
    assert same(got.read("big"), numbers(1024, 1024)) and same(got.read("small"), numbers(4))


def test_all_shards_are_held_not_only_the_saved_ones(executor):
    # Of 8 replicas one is saved. With a capsule of that alone XLA would reuse the other seven.
    state = placed(numbers(1024, 1024), SHARDINGS["replicated"])
    assert isinstance(state.sharding, NamedSharding)
    save = ashore.jax.save(executor, 1, {"w": state})
    jax.block_until_ready(step_of(state.sharding)(state))
    for shard in state.addressable_shards:
        assert same(shard.data, numbers(1024, 1024))
    save.wait()
