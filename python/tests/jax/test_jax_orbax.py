"""Orbax's own manager and checkpointers, with the handler of ashore."""

from devices import numbers, over, placed, same  # isort: skip

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

import ashore
from ashore.jax.orbax import CheckpointHandler, RestoreArgs, SaveArgs


@pytest.fixture
def handler(executor):
    return CheckpointHandler(executor)


def state_of(step):
    return {"w": placed(numbers(512, 1024) + step, over((8,), "x")), "step": step, "key": jax.random.key(step)}


def test_a_manager_saves_restores_and_keeps_so_many(executor, handler, tmp_path):
    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=2)
    target = {"w": jax.ShapeDtypeStruct((512, 1024), "float32", sharding=over((4,), None, "x")), "step": 0,
              "key": jax.random.key(0)}  # fmt: skip
    with ocp.CheckpointManager(tmp_path / "run", item_handlers=handler, options=options) as manager:
        for step in range(7):
            assert manager.save(step, args=SaveArgs(state_of(step))) == (step % 2 == 0)
        manager.wait_until_finished()
        assert manager.all_steps() == [4, 6] and manager.latest_step() == 6
        for step in (4, 6):
            got = manager.restore(step, args=RestoreArgs(target))
            assert same(got["w"], numbers(512, 1024) + step) and got["step"] == step
            assert got["w"].sharding == target["w"].sharding
    with ocp.CheckpointManager(tmp_path / "run", item_handlers=handler) as manager:
        assert manager.latest_step() == 6
        assert manager.item_metadata(6)["w"] == jax.ShapeDtypeStruct((512, 1024), "float32")
        assert manager.restore(6)["step"] == 6
        assert manager.restore(6, args=RestoreArgs({"step": 0}, strict=False)) == {"step": 6}
    # Nothing hidden is left, the executor's own root has no step, and ashore opens what Orbax named.
    assert [path.name for path in tmp_path.glob("run/**/.*")] == [] and executor.latest() is None
    assert ashore.Checkpoint(tmp_path / "run/6/default/ashore").step == 6


def test_the_state_may_be_donated_right_after_the_managers_save(handler, tmp_path):
    step = jax.jit(lambda w: w + 1, donate_argnums=0)
    w = placed(jnp.zeros((4096, 1024)), over((8,), "x"))
    with ocp.CheckpointManager(tmp_path / "run", item_handlers=handler) as manager:
        for number in range(1, 5):
            manager.save(number, args=SaveArgs({"w": w}))
            w = step(step(w))
        manager.wait_until_finished()
        for number in range(1, 5):
            assert (manager.restore(number)["w"] == 2 * (number - 1)).all()


def test_several_items_are_saved_together(executor, tmp_path):
    handlers = {"params": CheckpointHandler(executor), "data": CheckpointHandler(executor)}
    with ocp.CheckpointManager(tmp_path / "run", item_handlers=handlers) as manager:
        args = ocp.args.Composite(params=SaveArgs({"w": jnp.ones(4)}), data=SaveArgs({"at": 17}))
        manager.save(3, args=args)
        manager.wait_until_finished()
        got = manager.restore(3, args=ocp.args.Composite(params=RestoreArgs({"w": jnp.zeros(4)}), data=RestoreArgs()))
        assert got["params"]["w"].sum() == 4 and got["data"] == {"at": 17}


def test_what_cannot_be_saved_is_an_error_of_the_call(handler, tmp_path):
    with ocp.CheckpointManager(tmp_path / "run", item_handlers=handler) as manager:
        with pytest.raises(ashore.InvalidError, match='"layer.w"'):
            manager.save(1, args=SaveArgs({"layer": {"w": jnp.zeros(4, "int4")}}))


def test_a_save_that_fails_later_fails_the_wait_and_names_no_step(executor, handler, tmp_path):
    manager = ocp.CheckpointManager(tmp_path / "run", item_handlers=handler)
    manager.save(1, args=SaveArgs({"w": jnp.zeros(4)}))
    manager.wait_until_finished()
    original = ashore.jax.orbax.save

    def failing(executor, step, item, *, directory):
        # Something else has the name by the time of the publish.
        directory.mkdir()
        (directory / "foreign").write_text("x")
        return original(executor, step, item, directory=directory)

    ashore.jax.orbax.save = failing
    try:
        manager.save(2, args=SaveArgs({"w": jnp.zeros(4)}))
        with pytest.raises(ashore.Error):
            manager.wait_until_finished()
    finally:
        ashore.jax.orbax.save = original
    assert ocp.CheckpointManager(tmp_path / "run", item_handlers=handler).all_steps() == [1]


@pytest.mark.parametrize("kind", [ocp.Checkpointer, ocp.AsyncCheckpointer])
def test_checkpointers_without_a_manager(handler, tmp_path, kind):
    checkpointer = kind(handler)
    checkpointer.save(tmp_path / "one", args=SaveArgs({"w": jnp.arange(3)}, step=9))
    if kind is ocp.AsyncCheckpointer:
        checkpointer.wait_until_finished()
    got = checkpointer.restore(tmp_path / "one", args=RestoreArgs({"w": jnp.zeros(3, "int32")}))
    assert got["w"].tolist() == [0, 1, 2]
    assert ashore.Checkpoint(tmp_path / "one/ashore").step == 9
    checkpointer.close()
