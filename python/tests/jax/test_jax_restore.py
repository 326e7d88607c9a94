"""Restoring onto other shardings and devices, and targets that do not fit."""

import collections
import dataclasses
import functools
from pathlib import Path

from devices import mesh, numbers, over, same  # isort: skip

import jax
import jax.numpy as jnp
import numpy
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import ashore
import ashore.jax

MESHES = {
    "8": over((8,), "x"),
    "4x2": over((4, 2), "x", "y"),
    "2x4 turned": over((2, 4), "y", "x"),
    "4 replicated": over((4, 2), "x"),
    "4": over((4,), "x"),
    "3": over((3,), "x"),
    "3 of others": over((3,), None, "x", first=5),
    "2x2x2": over((2, 2, 2), ("x", "z"), "y"),
    "1": over((1,), "x"),
    "everywhere": over((8,)),
    "device 6": SingleDeviceSharding(jax.devices()[6]),
}


@pytest.mark.parametrize("saved", MESHES)
def test_any_sharding_is_restored_from_any_other(executor, saved):
    whole = numbers(24, 24)
    ashore.jax.save(executor, 1, {"w": jax.device_put(whole, MESHES[saved])}).wait()
    for sharding in MESHES.values():
        target = {"w": jax.ShapeDtypeStruct(whole.shape, whole.dtype, sharding=sharding)}
        got = ashore.jax.restore(executor.latest(), target)["w"]
        assert same(got, whole) and got.sharding == sharding and got.committed
        for shard in got.addressable_shards:
            assert same(shard.data, whole[shard.index])


def test_eight_devices_to_four_to_one_and_back(tmp_path):
    state = {"w": jax.device_put(numbers(16, 8), over((8,), "x")), "n": 0}
    for number, sharding in enumerate([over((4,), None, "x"), over((1,)), over((2, 4), "y")], 1):
        with ashore.CheckpointExecutor(tmp_path / "root", arena=8 << 20, chunk=1 << 20) as executor:
            ashore.jax.save(executor, number, {**state, "n": number})
        target = {"w": jax.ShapeDtypeStruct((16, 8), "float32", sharding=sharding), "n": 0}
        state = ashore.jax.restore(ashore.latest(tmp_path / "root"), target)
        assert state["n"] == number and same(state["w"], numbers(16, 8)) and state["w"].sharding == sharding


def test_each_box_is_read_once_and_nothing_else(executor, monkeypatch):
    ashore.jax.save(executor, 1, {"w": jax.device_put(numbers(8, 8), over((8,), "x")), "other": jnp.zeros(9)}).wait()
    read = []
    original = ashore.Checkpoint._read_prepared

    def spy(self, names, targets, **options):
        read.extend(zip(names, options["regions"], strict=True))
        return original(self, names, targets, **options)

    monkeypatch.setattr(ashore.Checkpoint, "_read_prepared", spy)

    def boxes(sharding):
        read.clear()
        target = {"w": jax.ShapeDtypeStruct((8, 8), "float32", sharding=sharding)}
        ashore.jax.restore(executor.latest(), target, strict=False)
        assert {name for name, _ in read} == {"w"}
        return sorted(region for _, region in read) if read[0][1] else [region for _, region in read]

    assert boxes(over((2, 2), "x", "y")) == [((i, i + 4), (j, j + 4)) for i in (0, 4) for j in (0, 4)]
    assert boxes(over((4, 2), "y")) == [((0, 4), (0, 8)), ((4, 8), (0, 8))]
    assert boxes(over((8,))) == [None]


def test_a_restore_of_many_leaves_goes_in_batches(executor, monkeypatch):
    tree = {f"w{i}": jax.device_put(numbers(8, 8 + i), over((8,), "x")) for i in range(10)}
    ashore.jax.save(executor, 1, tree).wait()
    monkeypatch.setattr(ashore.jax._restore, "_BATCH", 600)
    got = ashore.jax.restore(executor.latest(), tree)
    assert all(same(got[name], array) and got[name].sharding == array.sharding for name, array in tree.items())


def test_a_donation_on_one_device_leaves_what_others_restored(executor):
    ashore.jax.save(executor, 1, {"w": jnp.asarray(numbers(64, 64))}).wait()
    target = {"w": jax.ShapeDtypeStruct((64, 64), "float32", sharding=over((8,)))}
    got = ashore.jax.restore(executor.latest(), target)["w"]
    shards = [shard.data for shard in got.addressable_shards]
    for shard in shards[:3]:
        assert jax.block_until_ready(jax.jit(lambda x: x * 0, donate_argnums=0)(shard)).sum() == 0
    assert all(same(shard, numbers(64, 64)) for shard in shards[3:])


def test_missing_and_unexpected_leaves_are_named(executor):
    ashore.jax.save(executor, 1, {"a": jnp.zeros(2), "b": {"c": jnp.ones(2), "n": 1}}).wait()
    checkpoint = executor.latest()
    with pytest.raises(ashore.NotFoundError, match=r"missing=\['b\.d', 'b\.e'\]") as caught:
        ashore.jax.restore(checkpoint, {"a": jnp.zeros(2), "b": {"d": jnp.ones(2), "e": 5}})
    assert caught.value.tensor == "b.d" and "unexpected=['b.c', 'b.n']" in str(caught.value)
    with pytest.raises(ashore.InvalidError, match=r"unexpected=\['b\.c', 'b\.n'\]") as caught:
        ashore.jax.restore(checkpoint, {"a": jnp.zeros(2)})
    assert caught.value.tensor == "b.c"
    assert set(ashore.jax.restore(checkpoint, {"a": jnp.zeros(2)}, strict=False)) == {"a"}
    with pytest.raises(ashore.NotFoundError, match=r"missing=\['z'\]"):
        ashore.jax.restore(checkpoint, {"a": jnp.zeros(2), "z": jnp.zeros(2)}, strict=False)


def test_nothing_is_converted(executor):
    ashore.jax.save(executor, 1, {"w": jnp.zeros((2, 3)), "n": 1, "k": None}).wait()
    checkpoint = executor.latest()
    good = {"w": jnp.zeros((2, 3)), "n": 1, "k": None}
    assert ashore.jax.restore(checkpoint, good)["n"] == 1
    for name, leaf, what in [
        ("w", jnp.zeros((2, 3), "bfloat16"), r"BF16\[2, 3\], and stored is an array F32\[2, 3\]"),
        ("w", jnp.zeros((3, 2)), r"F32\[3, 2\], and stored is an array F32\[2, 3\]"),
        ("w", jnp.zeros(6), r"F32\[6\]"),
        ("w", numpy.zeros((2, 3)), r"F64"),
        ("w", jax.ShapeDtypeStruct((2, 3), "int32"), r"I32"),
        ("w", jnp.zeros((2, 3), "int4"), r"int4"),
        ("w", 1.0, "a value of type float, and stored is an array"),
        ("w", None, "stored is an array"),
        ("n", jnp.zeros((), "int32"), "stored is the value 1"),
        ("n", 1.0, "stored is the value 1"),
        ("n", True, "stored is the value 1"),
        ("n", None, "stored is the value 1"),
        ("k", 0, "stored is the value None"),
    ]:
        with pytest.raises(ashore.InvalidError, match=f'{what}.*"{name}"') as caught:
            ashore.jax.restore(checkpoint, {**good, name: leaf})
        assert caught.value.tensor == name


def test_a_sharding_that_does_not_fit_is_refused_by_name(executor):
    ashore.jax.save(executor, 1, {"w": jnp.zeros(7)}).wait()
    abstract = NamedSharding(mesh(2).abstract_mesh, PartitionSpec("x"))
    for sharding in [over((4,), "x"), abstract]:
        target = {"w": jax.ShapeDtypeStruct((7,), "float32", sharding=sharding)}
        with pytest.raises(ashore.InvalidError, match='cannot place.*"w"'):
            ashore.jax.restore(executor.latest(), target)


def test_a_checkpoint_is_needed(executor):
    with pytest.raises(ashore.InvalidError, match="None where nothing was saved"):
        ashore.jax.restore(executor.latest(), {"w": jnp.zeros(2)})


Point = collections.namedtuple("Point", "left right")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w", "step"], meta_fields=["label"])
@dataclasses.dataclass
class State:
    w: jax.Array
    step: int
    label: str = "old"


def test_nodes_come_from_the_target_with_their_static_fields(executor):
    tree = {"p": Point(jnp.ones(2), (jnp.zeros(1),)), "s": State(jnp.arange(3), 4)}
    ashore.jax.save(executor, 1, tree).wait()
    target = {"p": Point(jnp.zeros(2), (jnp.ones(1),)), "s": State(jnp.zeros(3, "int32"), 0, label="new")}
    got = ashore.jax.restore(executor.latest(), target)
    assert type(got["p"]) is Point and got["p"].left.tolist() == [1, 1]
    assert got["s"].w.tolist() == [0, 1, 2] and (type(got["s"]), got["s"].step, got["s"].label) == (State, 4, "new")
    # The same paths in other nodes are the same names.
    plain = {"p": {"left": jnp.zeros(2), "right": [jnp.ones(1)]}, "s": {"w": jnp.zeros(3, "int32"), "step": 1}}
    assert ashore.jax.restore(executor.latest(), plain)["s"]["step"] == 4
    assert ashore.jax.restore(executor.latest())["p"]["right"][0].tolist() == [0]


def test_a_target_of_eval_shape_gives_arrays_that_are_free_to_move(executor):
    def init():
        return {"count": jnp.zeros((), "int32") + 3, "weak": jnp.asarray(0.1), "row": jnp.full((4,), 2.0)}

    ashore.jax.save(executor, 1, init()).wait()
    got = ashore.jax.restore(executor.latest(), jax.eval_shape(init))
    sharded = jax.device_put(numbers(8), over((8,), "x"))
    assert (sharded + got["count"]).sharding.is_equivalent_to(sharded.sharding, 1)
    assert [array.weak_type for array in jax.tree.leaves(got)] == [a.weak_type for a in jax.tree.leaves(init())]
    # A weak float32 does not widen bfloat16: what the program computes next is the same.
    assert (jnp.ones(4, "bfloat16") * got["row"]).dtype == "bfloat16"
    again = ashore.jax.restore(executor.latest(), init())
    assert not again["count"].committed and again["weak"].weak_type and same(again["weak"], init()["weak"])


def test_shapes_are_a_target(executor):
    tree = {"w": [jnp.zeros((8, 2), "bfloat16"), 3], "key": jax.random.split(jax.random.key(0), 4)}
    ashore.jax.save(executor, 1, tree).wait()
    shapes = ashore.jax.shapes(executor.latest())
    assert shapes["w"][0] == jax.ShapeDtypeStruct((8, 2), "bfloat16") and shapes["w"][1] == 3
    assert shapes["key"].dtype == tree["key"].dtype and shapes["key"].shape == (4,)
    got = ashore.jax.restore(executor.latest(), shapes)
    assert same(got["w"][0], tree["w"][0]) and same(jax.random.key_data(got["key"]), jax.random.key_data(tree["key"]))


def test_a_step_that_was_saved_without_jax_is_restored(executor):
    executor.save(1, {"w": numbers(8, 4), "n": 5}).wait()
    target = {"w": jax.ShapeDtypeStruct((8, 4), "float32", sharding=over((4,), "x")), "n": 0}
    got = ashore.jax.restore(executor.latest(), target)
    assert same(got["w"], numbers(8, 4)) and got["n"] == 5


def test_damage_is_an_error(executor):
    ashore.jax.save(executor, 1, {"w": jax.device_put(numbers(8, 1024), over((8,), "x"))}).wait()
    checkpoint = executor.latest()
    for file in Path(checkpoint.path).glob("*.safetensors"):
        raw = bytearray(file.read_bytes())
        raw[-5] ^= 1
        file.write_bytes(raw)
    with pytest.raises(ashore.DamagedError):
        ashore.jax.restore(ashore.Checkpoint(checkpoint.path), {"w": jnp.zeros((8, 1024))})
