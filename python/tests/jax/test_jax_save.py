"""Saving pytrees: boxes, names, values, dtypes, and what is refused."""

import collections
from pathlib import Path

from devices import mesh, numbers, over, placed, same  # isort: skip

import jax
import jax.experimental
import jax.numpy as jnp
import ml_dtypes
import numpy
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import ashore
import ashore.jax

# Older versions have it elsewhere.
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

DTYPES = [
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "bfloat16", "float32", "complex64",
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
]  # fmt: skip

Point = collections.namedtuple("Point", "left right")


def test_a_tree_of_every_kind_of_leaf_comes_back(executor):
    tree = {
        "params": {"w": jax.device_put(numbers(8, 4), over((8,), "x")), "b": jnp.arange(3)},
        "opt": [(jnp.float32(2.5), 7), Point(jnp.zeros((0, 3)), None)],
        "host": numbers(5, dtype="float64"),
        "key": jax.random.key(3),
        "rate": 0.1,
        "name": "run",
        "flag": True,
        "scalar": numpy.float32(1.5),
        "z": 1 - 2j,
    }
    ashore.jax.save(executor, 1, tree).wait()
    got = ashore.jax.restore(executor.latest(), tree)
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(tree), strict=True):
        assert type(one) is type(other)
        if isinstance(one, jax.Array) and jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            assert one.dtype == other.dtype and same(jax.random.key_data(one), jax.random.key_data(other))
        elif isinstance(one, (jax.Array, numpy.ndarray)):
            assert same(one, other)
        else:
            assert one == other
    assert got["params"]["w"].sharding == tree["params"]["w"].sharding


def test_the_step_is_a_tree_without_jax_too(executor):
    tree = {"a": [jax.device_put(numbers(8), over((4, 2), "y")), {}], "n": Point(1, (2, None)), "o": (), 5: "five"}
    with pytest.raises(ValueError):
        jax.tree.flatten(tree)  # keys that cannot be compared
    del tree[5]
    ashore.jax.save(executor, 1, tree).wait()
    got = executor.latest().tree()
    assert same(got["a"].pop(0), numbers(8))
    assert got == {"a": [{}], "n": {"left": 1, "right": (2, None)}, "o": ()}


def test_each_shard_is_one_box_and_replicas_are_saved_once(executor):
    tree = {
        "whole": jax.device_put(numbers(8, 8), over((4, 2))),
        "rows": jax.device_put(numbers(8, 8), over((4, 2), "x")),
        "tiles": jax.device_put(numbers(8, 8), over((4, 2), "y", "x")),
    }
    ashore.jax.save(executor, 1, tree).wait()
    checkpoint = executor.latest()
    assert len(checkpoint.boxes("whole")) == 1
    assert sorted(checkpoint.boxes("rows")) == [((i, i + 2), (0, 8)) for i in range(0, 8, 2)]
    assert len(checkpoint.boxes("tiles")) == 8 and ((4, 8), (2, 4)) in checkpoint.boxes("tiles")
    for name in tree:
        assert same(checkpoint.read(name), numbers(8, 8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_safetensors_comes_back_bit_for_bit(executor, dtype):
    most = 2 if dtype == "bool" else 256
    raw = numpy.random.default_rng(1).integers(0, most, 32 * jnp.dtype(dtype).itemsize, "uint8")
    host = raw.view(jnp.dtype(dtype)).reshape(8, 4)
    tree = {"one": jax.device_put(host), "shards": jax.device_put(host, over((2, 4), "x", "y")), "host": host}
    ashore.jax.save(executor, 1, tree).wait()
    got = ashore.jax.restore(executor.latest(), tree)
    assert all(same(got[name], host) for name in tree)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2", "float8_e4m3", "float8_e3m4", "float4_e2m1fn"])
@pytest.mark.parametrize("where", ["jax", "numpy"])
def test_a_dtype_that_safetensors_lacks_is_refused_by_name(executor, dtype, where):
    leaf = jnp.zeros(4, dtype) if where == "jax" else numpy.zeros(4, getattr(ml_dtypes, dtype))
    with pytest.raises(ashore.InvalidError, match=rf"(?s)dtype={dtype}.*layers\.0\.scale") as caught:
        ashore.jax.save(executor, 1, {"layers": [{"scale": leaf}]})
    assert caught.value.tensor == "layers.0.scale"


def test_wide_dtypes_are_saved_with_x64_and_complex128_is_refused(executor):
    with enable_x64(True):
        tree = {"f": jnp.arange(4.0) / 3, "i": jnp.arange(4) << 40}
        assert tree["f"].dtype == "float64" and tree["i"].dtype == "int64"
        ashore.jax.save(executor, 1, tree).wait()
        got = ashore.jax.restore(executor.latest(), tree)
        assert same(got["f"], tree["f"]) and same(got["i"], tree["i"])
        with pytest.raises(ashore.InvalidError, match=r'leaf\.real.*"z"'):
            ashore.jax.save(executor, 2, {"z": jnp.zeros(2, "complex128")})
    with pytest.raises(ashore.InvalidError, match="jax_enable_x64") as caught:
        target = {"f": jax.ShapeDtypeStruct((4,), "float64"), "i": numpy.zeros(4, "int64")}
        ashore.jax.restore(executor.latest(), target)
    assert caught.value.tensor == "f"


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_typed_keys_keep_their_implementation_and_sharding(executor, impl):
    keys = jax.device_put(jax.random.split(jax.random.key(5, impl=impl), 8), over((4, 2), "x"))
    tree = {"one": jax.random.key(6, impl=impl), "many": keys}
    ashore.jax.save(executor, 1, tree).wait()
    target = {
        "one": jax.ShapeDtypeStruct((), keys.dtype),
        "many": jax.ShapeDtypeStruct((8,), keys.dtype, sharding=over((2,), "x")),
    }
    for wanted in (tree, target):
        got = ashore.jax.restore(executor.latest(), wanted)
        assert same(jax.random.bits(got["one"]), jax.random.bits(tree["one"]))
        assert same(jax.vmap(jax.random.bits)(got["many"]), jax.vmap(jax.random.bits)(keys))
        assert got["many"].sharding.is_equivalent_to(wanted["many"].sharding, 1)
    other = "rbg" if impl == "threefry2x32" else "threefry2x32"
    with pytest.raises(ashore.InvalidError, match=f'keys of {impl}.*"one"'):
        ashore.jax.restore(executor.latest(), {**tree, "one": jax.random.key(0, impl=other)})
    with pytest.raises(ashore.InvalidError, match=f'keys of {impl}.*"one"'):
        ashore.jax.restore(executor.latest(), {**tree, "one": jax.random.key_data(tree["one"])})
    assert jax.random.key_impl(ashore.jax.restore(executor.latest())["one"]) == impl


def test_names_that_collide_are_refused_with_both_paths(executor):
    tree = {"a": {"b": jnp.zeros(1)}, "a.b": 3}
    with pytest.raises(ashore.InvalidError, match=r"\['a'\]\['b'\] and \['a\.b'\].*\"a\.b\""):
        ashore.jax.save(executor, 1, tree)
    with pytest.raises(ashore.InvalidError, match=r'"a\.0"'):
        ashore.jax.save(executor, 1, {"a": [jnp.zeros(1)], "a.0": jnp.zeros(1)})
    assert executor.latest() is None


def test_what_is_no_leaf_is_refused_by_name(executor):
    class Thing:
        pass

    class Tensor:
        dtype = numpy.dtype("float32")

    for leaf, what in [
        (Thing(), "Thing"),
        (lambda: 0, "function"),
        (Tensor(), "Tensor"),
        (jax.ShapeDtypeStruct((1,), "int8"), "Shape"),
        (numpy.array([Thing()]), "object"),
    ]:
        with pytest.raises(ashore.InvalidError, match=f'{what}.*"x.0"|"x.0".*{what}') as caught:
            ashore.jax.save(executor, 1, {"x": [leaf]})
        assert caught.value.tensor == "x.0"
    with pytest.raises(ashore.InvalidError, match="one leaf"):
        ashore.jax.save(executor, 1, jnp.zeros(3))
    with pytest.raises(ashore.InvalidError, match='outside of jit.*"x"'):
        jax.jit(lambda x: ashore.jax.save(executor, 1, {"x": x}))(1.0)
    with pytest.raises(ashore.InvalidError):
        ashore.jax.save(executor, 1, {"": jnp.zeros(3)})
    assert executor.latest() is None


def test_an_array_that_was_donated_before_is_refused_by_name(executor):
    state = placed(numbers(8, 8), over((8,), "x"))
    jax.block_until_ready(jax.jit(lambda x: x + 1, donate_argnums=0)(state))
    with pytest.raises(ashore.InvalidError, match='donated.*"model.w"'):
        ashore.jax.save(executor, 1, {"model": {"w": state}})


def test_a_save_waits_for_arrays_that_are_still_computed(executor):
    def slow(x):
        return jax.lax.fori_loop(0, 300, lambda _, x: jnp.sin(x @ x), x)

    computed = jax.jit(slow)(jnp.eye(256) / 3)
    ashore.jax.save(executor, 1, {"x": computed}).wait()
    assert same(executor.latest().read("x"), computed)


def test_metadata_and_options_reach_the_step(executor, tmp_path):
    ashore.jax.save(executor, 1, {"w": jnp.zeros(2)}, metadata={"loss": 0.5}).wait()
    assert executor.latest().metadata() == {"loss": 0.5}
    assert Path(ashore.jax.save(executor, 1, {"w": jnp.zeros(2)}, name="best").wait().path).name == "best"
    ashore.jax.save(executor, 2, {"w": jnp.ones(2)}, directory=tmp_path / "there").wait()
    assert executor.latest().step == 1
    assert ashore.jax.restore(ashore.Checkpoint(tmp_path / "there"), {"w": jnp.zeros(2)})["w"].sum() == 2


def test_a_structure_whose_static_fields_cannot_be_hashed_is_saved(executor):
    @jax.tree_util.register_pytree_node_class
    class Node:
        def __init__(self, child, notes):
            self.child, self.notes = child, notes

        def tree_flatten(self):
            return (self.child,), [self.notes]

        @classmethod
        def tree_unflatten(cls, notes, children):
            return cls(children[0], notes[0])

    for step in (1, 2):
        ashore.jax.save(executor, step, {"n": Node(jnp.full(2, step), "x")}).wait()
        got = ashore.jax.restore(executor.latest(), {"n": Node(jnp.zeros(2, "int32"), "y")})["n"]
        assert got.notes == "y" and got.child.tolist() == [step, step]


def test_arrays_in_pinned_host_memory_are_saved_and_restored_there(executor):
    if "pinned_host" not in {memory.kind for memory in jax.devices()[0].addressable_memories()}:
        pytest.skip("this version of JAX has one kind of memory on the processor")
    sharding = over((4,), "x").with_memory_kind("pinned_host")
    tree = {"w": jax.device_put(numbers(8), sharding)}
    ashore.jax.save(executor, 1, tree).wait()
    got = ashore.jax.restore(executor.latest(), tree)["w"]
    assert same(got, numbers(8)) and got.sharding == sharding and got.sharding.memory_kind == "pinned_host"


def test_shardings_of_all_kinds_are_saved(executor):
    devices = jax.devices()
    tree = {
        "one": jax.device_put(numbers(4), devices[5]),
        "three": jax.device_put(numbers(6), over((3,), "x", first=2)),
        "both": jax.device_put(numbers(8, 3), NamedSharding(mesh(4, 2), PartitionSpec(("x", "y")))),
        "last": jax.device_put(numbers(2, 3, 4), over((2, 2, 2), None, None, ("z", "x"))),
        "nothing": jax.device_put(numbers(0, 8), over((4,), None, "x")),
    }
    ashore.jax.save(executor, 1, tree).wait()
    got = ashore.jax.restore(executor.latest(), tree)
    for name, array in tree.items():
        assert same(got[name], array) and got[name].sharding == array.sharding
