"""Saving and reading back: tensors, values, trees."""

import collections
import math
import random
from pathlib import Path

import ml_dtypes
import numpy
import pytest
import torch
from conftest import SMALL
from safetensors.numpy import load_file

import ashore

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else bytes(
        tensor.detach().reshape(1).view(torch.uint8).numpy()
    )


def made(dtype, *shape):
    size = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_tensors_of_every_dtype_come_back_bit_for_bit(executor, dtype):
    state = {"matrix": made(dtype, 5, 7), "scalar": made(dtype), "empty": made(dtype, 0, 3)}
    executor.save(1, state).wait()
    targets = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    executor.latest().read_into(targets)
    for name, tensor in state.items():
        assert bits(targets[name]) == bits(tensor), name


def test_parameters_that_require_grad_are_saved(executor):
    module = torch.nn.Linear(3, 4)
    executor.save(1, module.state_dict(keep_vars=True)).wait()
    copy = torch.nn.Linear(3, 4)
    executor.latest().read_into(dict(copy.state_dict()))
    assert torch.equal(copy.weight, module.weight) and torch.equal(copy.bias, module.bias)


@pytest.mark.parametrize(
    "name", ["bool", "int8", "uint16", "int64", "float16", "float32", "float64", "complex64", "bfloat16", "float8_e4m3fn"]
)
def test_arrays_of_numpy_come_back(executor, name):
    dtype = numpy.dtype(getattr(ml_dtypes, name, name))
    array = numpy.arange(24).reshape(2, 3, 4).astype(dtype)
    executor.save(1, {"a": array, "s": array[0, 0, 1], "t": array.T, "c": array[:, 1]}).wait()
    tree = executor.latest().tree()
    for key, want in {"a": array, "t": array.T, "c": array[:, 1]}.items():
        assert tree[key].dtype == dtype and tree[key].tobytes() == want.tobytes(), key
    assert type(tree["s"]) is type(array[0, 0, 1]) and tree["s"] == array[0, 0, 1]


def test_a_read_only_array_is_saved_and_is_no_target(executor):
    array = numpy.arange(4.0)
    array.flags.writeable = False
    executor.save(1, {"a": array}).wait()
    with pytest.raises(ashore.InvalidError, match="read-only") as error:
        executor.latest().read_into({"a": array})
    assert error.value.tensor == "a"


def test_views_come_back_packed(executor):
    base = torch.arange(60.0).reshape(3, 4, 5)
    state = {
        "transposed": base.permute(2, 0, 1),
        "column": base[:, 1],
        "steps": base[:, ::2, 1:4],
        "expanded": torch.arange(3.0).expand(4, 3),
        "channels_last": torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "offset": base[1],
        "real": torch.randn(4, dtype=torch.complex64).real,
    }
    executor.save(1, state).wait()
    tree = executor.latest().tree()
    for name, tensor in state.items():
        assert numpy.array_equal(tree[name], tensor.numpy()), name


class Array:
    """An array of a library that only knows DLPack."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Older(Array):
    def __dlpack__(self, stream=None):
        return self.array.__dlpack__()


@pytest.mark.parametrize("kind", [Array, Older])
def test_arrays_of_other_libraries_are_saved_by_dlpack(executor, kind):
    array = numpy.arange(12, dtype="float32").reshape(3, 4)
    executor.save(1, {"a": kind(array)}).wait()
    target = numpy.empty_like(array)
    executor.latest().read_into({"a": kind(target)})
    assert numpy.array_equal(target, array)


def test_a_torch_without_the_exchange_table_is_read_by_attributes(python, root):
    python(
        """
        import sys, torch
        torch.Tensor.__dlpack_c_exchange_api__ = None
        import ashore
        base = torch.arange(12.0).reshape(3, 4)
        module = torch.nn.Linear(2, 2)
        state = {"a": base, "t": base.T, "e": base[:0], "b": torch.ones(2, dtype=torch.bfloat16), **module.state_dict()}
        with ashore.CheckpointExecutor(sys.argv[1], **SMALL) as executor:
            for step in (1, 2, 3):
                executor.save(step, state).wait()
            found = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in state.items()}
            executor.latest().read_into(found)
            assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
        """,
        root,
    )


def test_the_files_are_plain_safetensors(executor):
    saved = executor.save(1, {"a": torch.arange(6.0).reshape(2, 3), "b": {"c": numpy.ones(2, "int8")}}).wait()
    (file,) = Path(saved.path).glob("*.safetensors")
    found = load_file(file)
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and found["b.c"].tolist() == [1, 1]


VALUES = {
    "int": 3, "negative": -(1 << 63), "unsigned": (1 << 64) - 1, "big": 1 << 125, "minus_big": -(1 << 70), "float": 0.1,
    "zero": -0.0, "inf": float("inf"), "text": "\xe4\xf6\U0001f600\n\"$", "none": None, "true": True, "bytes": b"\x00\xff",
    "tuple": (1, (2.5, None)), "list": [1, [True, "x"], {}], "set": {1, "a"}, "frozen": frozenset([(1, 2)]),
    "complex": complex(0.5, -0.0), "empty": {}, "empty_list": [], "empty_tuple": (), "betas": (0.9, 0.999),
    "counter": collections.Counter({9: 2, 80: 1}), "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
    "keys": {(1, 2): "a", None: 1, 2.5: 2}, "bools": {True: 1, False: 0}, "ints": {5: "a", -1: "b"},
    "float32": numpy.float32(0.1), "int8": numpy.int8(-3), "bool_": numpy.bool_(True), "bf16": ml_dtypes.bfloat16(1.5),
    "complex64": numpy.complex64(1 + 2j), "time": numpy.datetime64("2020-01-02T03:04:05"), "str_": numpy.str_("x"),
    "$key": {"$set": [1], "$$": 2},
}  # fmt: skip


def same(one, other):
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            any(same(key, k) and same(one[key], other[k]) for k in other) for key in one
        ) and (not isinstance(one, collections.OrderedDict) or list(one) == list(other))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return one == other and math.copysign(1, one) == math.copysign(1, other)
    return bool(one == other)


def test_values_come_back_as_they_were(executor):
    executor.save(1, VALUES).wait()
    tree = executor.latest().tree()
    assert list(tree) == list(VALUES)
    for name, value in VALUES.items():
        assert same(tree[name], value), (name, tree[name])


def test_integers_beyond_64_bits_are_keys_of_values(executor):
    """A dict with such keys was taken for a level of names, which hold 64 bits, though no tensor was in it."""
    seen = {2**63 + 5: 1, -(2**63): 2, 2**63 - 1: {1 << 70: [3]}}
    executor.save(1, {"seen": seen, "w": torch.ones(2)}).wait()
    assert executor.latest().tree()["seen"] == seen
    with pytest.raises(ashore.InvalidError, match="integers of 64 bits"):
        executor.save(2, {"seen": seen | {0: torch.ones(2)}})


def test_nan_comes_back_in_values_and_metadata(executor):
    executor.save(1, {"nan": float("nan")}, values={"v": [math.nan]}, metadata={"m": math.nan}).wait()
    latest = executor.latest()
    assert math.isnan(latest.value("nan")) and math.isnan(latest.value("v")[0]) and math.isnan(latest.metadata()["m"])


def test_states_of_random_generators_come_back(executor):
    state = {
        "python": random.getstate(),
        "mt": numpy.random.RandomState(3).get_state(),
        "pcg": numpy.random.default_rng(3).bit_generator.state,
        "torch": torch.get_rng_state(),
    }
    executor.save(1, state).wait()
    tree = executor.latest().tree()
    random.setstate(tree["python"])
    generator = numpy.random.RandomState()
    generator.set_state(tree["mt"])
    assert generator.rand() == numpy.random.RandomState(3).rand()
    pcg = numpy.random.default_rng()
    pcg.bit_generator.state = tree["pcg"]
    assert pcg.random() == numpy.random.default_rng(3).random()
    assert torch.equal(torch.from_numpy(tree["torch"]), state["torch"])


def test_trees_come_back_as_they_were(executor):
    one, two = numpy.ones(2), numpy.zeros((1, 3), "int32")
    state = {
        "model": collections.OrderedDict([("layer.0.weight", one), ("layer.0.bias", two)]),
        "optimizer": {"state": {0: {"exp_avg": one * 2, "step": 3}, 7: {}}, "param_groups": [{"lr": 0.1, "params": [0, 7]}]},
        "list": [one * 3, (two, "x"), []],
        "plain": [1, (2, 3)],
        'odd "key"\\\n': {"\xe4": one * 4},
        "a.b": one * 5,
        "epoch": 1,
    }
    executor.save(1, state).wait()
    latest = executor.latest()
    assert "optimizer.state.0.exp_avg" in latest.names() and latest.value("optimizer.state.0.step") == 3
    tree = latest.tree()

    def equal(one, other):
        if isinstance(one, numpy.ndarray):
            return isinstance(other, numpy.ndarray) and one.dtype == other.dtype and numpy.array_equal(one, other)
        if isinstance(one, dict):
            return type(one) is type(other) and list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
        if isinstance(one, (list, tuple)):
            return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
        return same(one, other)

    assert equal(state, tree), tree


def test_a_real_training_state_comes_back(executor):
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
    module(torch.rand(8, 4)).sum().backward()
    optimizer.step()
    scheduler.step()
    state = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    executor.save(1, state).wait()
    tree = executor.latest().tree()
    scheduler.load_state_dict(tree["scheduler"])
    assert type(tree["scheduler"]["milestones"]) is collections.Counter
    assert tree["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
    assert numpy.array_equal(tree["model"]["1.running_var"], module[1].running_var.numpy())


def test_views_are_targets(executor):
    value = torch.arange(6.0).reshape(2, 3)
    executor.save(1, {"a": value, "b": value + 1, "c": value + 2}).wait()
    wide, turned, fortran = torch.zeros(2, 7), torch.zeros(3, 2), numpy.zeros((2, 3), "float32", order="F")
    executor.latest().read_into({"a": wide[:, 1::2], "b": turned.T, "c": fortran})
    assert torch.equal(wide[:, 1::2], value) and wide.sum() == value.sum()
    assert torch.equal(turned.T, value + 1) and numpy.array_equal(fortran, (value + 2).numpy())
    with pytest.raises(ashore.InvalidError, match="share memory"):
        executor.latest().read_into({"a": wide[:, 1::2], "b": wide[:, ::2][:, :3]}, strict=False)


def test_tied_tensors_are_stored_once_and_read_into_tied_ones(executor):
    weight = torch.rand(16, 16)
    saved = executor.save(1, {"embedding": weight, "head": weight, "view": weight[:], "part": weight[:8]}).wait()
    assert saved.bytes == 16 * 16 * 4 + 8 * 16 * 4
    target = torch.zeros(16, 16)
    latest = executor.latest()
    latest.read_into({"embedding": target, "head": target, "view": torch.empty(16, 16), "part": torch.empty(8, 16)})
    assert torch.equal(target, weight)
    with pytest.raises(ashore.InvalidError, match="share memory") as error:
        latest.read_into({"embedding": target, "part": target[:8], "head": torch.empty(16, 16), "view": torch.empty(16, 16)})
    assert error.value.tensor in ("embedding", "part")


def test_tied_tensors_are_not_read_into_one_memory_at_other_strides(executor):
    """Both targets have all of the memory, and the transposed one came back with the values of the other."""
    weight = torch.arange(4.0).reshape(2, 2)
    executor.save(1, {"a": weight, "b": weight}).wait()
    memory = torch.zeros(2, 2)
    with pytest.raises(ashore.InvalidError, match="share memory"):
        executor.latest().read_into({"a": memory, "b": memory.T})
    assert memory.sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.bool], ids=str)
def test_tied_scalars_are_read_into_one_target(executor, dtype):
    """A slice without elements stands for a tied target, and a scalar has none: it was refused by its length."""
    scale = torch.ones((), dtype=dtype)
    executor.save(1, {"p": scale, "t": scale}).wait()
    target = torch.zeros((), dtype=dtype)
    executor.latest().read_into({"p": target, "t": target})
    assert target == scale
    executor.save(2, {"p": scale, "t": torch.zeros((), dtype=dtype)}).wait()
    with pytest.raises(ashore.InvalidError, match="stored apart") as error:
        executor.latest().read_into({"p": target, "t": target})
    assert error.value.tensor in ("p", "t")


def test_empty_tensors_are_not_tied(executor):
    executor.save(1, {"a": torch.empty(0), "b": torch.empty(0)}).wait()
    assert executor.latest().names() == ["a", "b"]


def test_the_fence_lets_tensors_change_and_saves_have_what_was_there(root):
    weights = [torch.zeros(1 << 18) for _ in range(4)]
    with ashore.CheckpointExecutor(root, detect="all", **SMALL) as executor:
        saves = []
        for step in range(1, 5):
            for weight in weights:
                weight.fill_(step)
            saves.append(executor.save(step, {"weights": weights}))
            executor.fence()
        assert [save.wait().step for save in saves] == [1, 2, 3, 4]
        for step in range(1, 5):
            assert {float(array.mean()) for array in executor.checkpoint(step).tree()["weights"]} == {step}


def test_a_forgotten_fence_is_found_by_the_first_saves(root):
    weight = torch.zeros(1 << 22)
    executor = ashore.CheckpointExecutor(root, **SMALL)
    save = executor.save(1, {"weight": weight})
    weight.fill_(1.0)
    try:
        save.wait()
    except ashore.Error as error:
        assert error.tensor == "weight"
    else:
        # The whole tensor was staged before the write.
        assert executor.latest().read("weight").max() == 0.0
    executor.shutdown()


def test_a_storage_that_was_resized_before_the_fence_cancels_the_save(root):
    """The engine reads freed memory then, which no reference prevents: the step could have any bytes."""
    # Larger than the arena, so that the engine still reads when the fence is called.
    big, small = torch.ones(64 << 20), torch.ones(1 << 14)
    with ashore.CheckpointExecutor(root, **SMALL) as executor:
        save = executor.save(1, {"big": big, "small": small})
        small.untyped_storage().resize_(1 << 20)
        with pytest.raises(ashore.InvalidError, match="resized between save and fence: the save was cancelled") as error:
            executor.fence()
        assert error.value.tensor == "small"
        with pytest.raises(ashore.CancelledError):
            save.wait()
        # It is told once, and later saves go on.
        executor.fence()
        executor.save(2, {"big": big, "small": torch.zeros(1 << 14)})
        executor.fence()
    assert ashore.Catalog(root).steps() == [2]


def test_a_tensor_that_was_captured_in_the_call_may_be_resized(root):
    big, small = torch.ones(64 << 20), torch.ones(1 << 8)
    with ashore.CheckpointExecutor(root, **SMALL) as executor:
        executor.save(1, {"big": big, "small": small}, capture={"small": "save"})
        small.untyped_storage().resize_(1 << 20)
        executor.fence()
        assert executor.latest() is None or executor.latest().step == 1


def test_capture_at_save_needs_no_fence(executor):
    counter = torch.zeros(4)
    save = executor.save(1, {"model": {"counter": counter}}, capture={"model": "save"})
    counter.fill_(9)
    save.wait()
    assert executor.latest().read("model.counter").max() == 0
    big = torch.zeros(1 << 20)
    save = executor.save(2, {"big": big}, capture="save")
    big.fill_(9)
    save.wait()
    assert executor.latest().read("big").max() == 0


def test_a_capture_of_one_name_of_a_tied_tensor_is_of_its_bytes(root):
    """The second name becomes an alias, and its capture was dropped: the save had what the program wrote after it."""
    # What is not asked for uses up the budget, or is staged after 64 MiB.
    other, big, weight = torch.ones(4), torch.zeros(16 << 20), torch.zeros(4)
    with ashore.CheckpointExecutor(root, capture_budget=16, **SMALL) as executor:
        state = {"other": other, "big": big, "embed": weight, "head": weight.view(4)}
        for step in (1, 2):
            capture = {"head": "save"}
            if step == 1:
                save = executor.save(step, state, capture=capture)
            else:
                names, tensors = ["other", "big", "embed"], [other, big, weight]
                save = executor._save_prepared(step, names, tensors, aliases={"head": "embed"}, capture=capture)
            weight.fill_(9)
            save.wait()
            assert executor.latest().read("embed").max() == executor.latest().read("head").max() == 0
            weight.zero_()
    with ashore.CheckpointExecutor(root, capture_budget=15, **SMALL) as executor:
        with pytest.raises(ashore.InvalidError, match="cannot be captured") as error:
            executor.save(3, {"embed": weight, "head": weight}, capture={"head": "save"})
        assert error.value.tensor == "embed"


def test_prepared_tensors_come_with_boxes_aliases_and_what_keeps_them(executor):
    import weakref

    class Keep:
        pass

    keep = Keep()
    gone = weakref.ref(keep)
    whole = torch.arange(24.0).reshape(6, 4)
    save = executor._save_prepared(
        1, ["w", "w", "b"], [whole[:2], whole[2:], torch.ones(3)],
        boxes=[((6, 4), (0, 0)), ((6, 4), (2, 0)), None], aliases={"tied": "b"}, values={"v": (1,)}, keep=keep,
    )  # fmt: skip
    del keep
    save.wait()
    latest = executor.latest()
    assert gone() is None
    assert latest.names() == ["b", "tied", "w"] and latest.value("v") == (1,)
    assert numpy.array_equal(latest.read("w"), whole.numpy()) and len(latest.boxes("w")) == 2
    assert latest.tree()["tied"].tolist() == [1, 1, 1]
    part, rest = torch.empty(3, 2), torch.empty(3)
    latest._read_prepared(["w", "b"], [part, rest], regions=[[(1, 4), (1, 3)], None])
    assert torch.equal(part, whole[1:4, 1:3])
    assert numpy.array_equal(latest.read("w", [slice(1, 4), (1, 3)]), part.numpy())
    with pytest.raises(ashore.InvalidError, match="box reaches beyond"):
        executor._save_prepared(2, ["w"], [whole], boxes=[((5, 4), (0, 0))])


def test_module_functions_save_and_find(root):
    assert ashore.latest(root) is None
    saved = ashore.save(root, 4, {"w": torch.ones(2)}, metadata={"run": "a"}, **SMALL)
    assert Path(saved.path).is_dir() and saved.bytes == 8
    assert ashore.latest(root).metadata() == {"run": "a"}
    assert ashore.Checkpoint(saved.path).step == 4


def test_a_checkpoint_in_a_directory_of_the_programs_is_no_step(executor, tmp_path):
    saved = executor.save(3, {"w": torch.ones(2)}, directory=tmp_path / "deep" / "last.ckpt").wait()
    assert saved.path == tmp_path / "deep" / "last.ckpt"
    assert ashore.Checkpoint(saved.path).tree()["w"].tolist() == [1, 1]
    assert executor.latest() is None
    with pytest.raises(ashore.ConflictError):
        executor.save(4, {"w": torch.ones(2)}, directory=saved.path).wait()
    executor.save(4, {"w": torch.ones(2)}, directory=saved.path, overwrite=True).wait()
    assert ashore.Checkpoint(saved.path).step == 4


def test_a_catalog_lists_verifies_and_deletes(root):
    for step in range(1, 6):
        ashore.save(root, step, {"w": torch.full((4,), float(step))}, **SMALL)
    catalog = ashore.Catalog(root)
    report = catalog.checkpoint(3).verify()
    assert report.sound and report.tensors == 1 and report.damage == ()
    (file,) = Path(catalog.checkpoint(5).path).glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert not catalog.checkpoint(5).verify().sound
    with pytest.raises(ashore.DamagedError) as error:
        catalog.checkpoint(5).tree()
    assert error.value.kind == "corrupt" and isinstance(error.value, OSError)
    valid, skipped = catalog.latest_valid()
    assert (valid.step, skipped) == (4, [5])
    assert catalog.prune(2, dry_run=True) and catalog.steps() == [1, 2, 3, 4, 5]
    catalog.delete(2)
    assert catalog.steps() == [1, 3, 4, 5]


def test_a_step_of_another_program_is_a_flat_dict(executor):
    executor._save_prepared(1, ["a.b"], [torch.ones(1)], values={"c.d": 5}).wait()
    tree = executor.latest().tree()
    assert tree["c.d"] == 5 and tree["a.b"].tolist() == [1]


def test_frozen_tensors_are_named_by_what_they_are_in(root):
    state = {"base": {"a": numpy.ones(1 << 18, "float32"), "b": numpy.ones(1 << 18, "float32")}, "head": numpy.ones(4)}
    with ashore.CheckpointExecutor(root, **SMALL) as executor:
        done = [executor.save(step, state, frozen=["base"]).wait() for step in (1, 2)]
        assert [committed.linked_bytes + committed.cloned_bytes > 1 << 21 for committed in done] == [False, True]
        with pytest.raises(ashore.InvalidError, match="frozen") as refused:
            executor.save(3, state, frozen=["bas"])
        assert refused.value.tensor == "bas"
