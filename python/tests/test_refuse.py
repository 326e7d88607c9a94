"""What cannot be saved or read as it is: an error that names the tensor, and nothing is lost."""

import collections
import math
import warnings

import numpy
import pytest
import torch
from conftest import SMALL

import ashore


def shrunk(resized_to):
    tensor = torch.arange(100.0)
    tensor.untyped_storage().resize_(resized_to)
    return tensor


def fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.zeros(3)


def nested(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.rand(4), 0.1, 0, torch.quint8)


class Subclass(torch.Tensor):
    pass


class Wrapper(torch.Tensor):
    @staticmethod
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, (3,), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("nothing is computed with it")


Point = collections.namedtuple("Point", "x y")


class Number(int):
    pass


def itself():
    state = {"a": [torch.ones(1)]}
    state["a"].append(state["a"])
    return state["a"]


REFUSED = {
    "storage resized to 0": (lambda: shrunk(0), "no memory"),
    "shrunk storage": (lambda: shrunk(40), "resized"),
    "conj view": (lambda: torch.randn(3, dtype=torch.complex64).conj(), "resolve_conj"),
    "neg view": (lambda: torch.randn(3, dtype=torch.complex64).conj().imag, "resolve_neg"),
    "contiguous neg view": (lambda: torch._neg_view(torch.ones(4)), "resolve_neg"),
    "zero tensor": (lambda: torch._efficientzerotensor(3), "no memory"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "indices and values|where its memory"),
    "sparse csr": (lambda: torch.eye(3).to_sparse_csr(), "indices and values|where its memory"),
    "quantized": (quantized, "int_repr|where its memory"),
    "nested": (lambda: nested(torch.strided), "unbind|where its memory"),
    "jagged": (lambda: nested(torch.jagged), "subclass|plain tensors"),
    "fake": (fake, "fake"),
    "meta": (lambda: torch.empty(3, device="meta"), "meta|no memory|where its memory"),
    "lazy parameter": (lambda: torch.nn.LazyLinear(3).weight, "lazy module"),
    "subclass": (lambda: torch.ones(3).as_subclass(Subclass), "subclass of torch.Tensor"),
    "wrapper": (Wrapper, "subclass of torch.Tensor"),
    "complex128": (lambda: torch.ones(2, dtype=torch.complex128), "view_as_real"),
    "uint4": (lambda: torch.zeros(4, dtype=torch.uint8).view(torch.uint4), "no such dtype"),
    "numpy object": (lambda: numpy.array([None]), "no such dtype"),
    "numpy text": (lambda: numpy.array(["a"]), "no such dtype"),
    "numpy big-endian": (lambda: numpy.ones(2, ">f4"), "no such dtype"),
    "numpy record": (lambda: numpy.zeros(2, [("a", "f4")]), "no such dtype"),
    "numpy masked": (lambda: numpy.ma.masked_array([1.0], [True]), "numpy.asarray"),
    "numpy matrix": (lambda: numpy.asmatrix([[1.0]]), "numpy.asarray"),
    "longdouble": (lambda: numpy.longdouble(1), "plain"),
    "void": (lambda: numpy.void(b"abc"), "plain"),
    "object": (object, "neither a tensor nor a plain value"),
    "function": (lambda: len, "neither a tensor nor a plain value"),
    "named tuple": (lambda: Point(1, 2), "tuple\\(\\)"),
    "named tuple of tensors": (lambda: Point(torch.ones(1), 2), "tuple\\(\\)"),
    "subclass of int": (lambda: Number(3), "int\\(\\)"),
    "default dict": (lambda: collections.defaultdict(list, a=1), "dict\\(\\)"),
    "torch dtype": (lambda: torch.float32, "neither"),
    "set of tensors": (lambda: {torch.ones(1)}, "within a value"),
    "tuple key above a tensor": (lambda: {(1, 2): torch.ones(1)}, "keys above a tensor"),
    "none key above a tensor": (lambda: {None: torch.ones(1)}, "keys above a tensor"),
    "huge key above a tensor": (lambda: {1 << 70: torch.ones(1)}, "keys above a tensor"),
    "contains itself": (itself, "contains itself"),
    "surrogate": (lambda: "\ud800", "surrogate"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_by_name_and_the_next_save_works(executor, what):
    make, why = REFUSED[what]
    with pytest.raises(ashore.InvalidError, match=why) as error:
        executor.save(1, {"good": torch.ones(3), "bad": {"leaf": make()}})
    assert error.value.kind == "invalid" and isinstance(error.value, ValueError)
    assert error.value.tensor.startswith("bad.leaf"), error.value.tensor
    executor.save(1, {"good": torch.ones(3)}).wait()
    assert executor.latest().names() == ["good"]


@pytest.mark.parametrize(
    "state",
    [
        {"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)},
        {1: torch.ones(1), "1": torch.zeros(1)},
        {"a": [torch.ones(1)], "a.0": torch.zeros(1)},
        {"a": {"b": torch.ones(1)}, "a.b": 3},
        {"a": {"b": 1}, "a.b": 3},
        {"a": {"b": {}}, "a.b": torch.ones(1)},
        {1: 1, "1": 2},
    ],
    ids=str,
)
def test_colliding_keys_are_refused(executor, state):
    with pytest.raises(ashore.InvalidError, match="the same name") as error:
        executor.save(1, state)
    assert error.value.tensor in ("a.b", "1", "a.0")


@pytest.mark.parametrize("state", [torch.ones(1), 3, "text", None, numpy.ones(1), {1, 2}], ids=str)
def test_a_state_is_a_container(executor, state):
    with pytest.raises(ashore.InvalidError, match="a state is a dict, list or tuple"):
        executor.save(1, state)


def test_reserved_and_empty_names_are_refused(executor):
    for name in ("", "__metadata__"):
        with pytest.raises(ashore.InvalidError):
            executor.save(1, {name: torch.ones(1)})


def test_a_tensor_resized_after_it_was_seen_is_refused(executor):
    tensor = torch.arange(100.0)
    executor.save(1, {"t": tensor}).wait()
    tensor.untyped_storage().resize_(40)
    with pytest.raises(ashore.InvalidError, match="resized|no memory"):
        executor.save(2, {"t": tensor})
    other = torch.zeros(100, dtype=torch.complex64)
    executor.save(3, {"t": other}).wait()
    with pytest.raises(ashore.InvalidError, match="resolve_conj"):
        executor.save(4, {"t": other.conj()})
    bytes_ = torch.zeros(16, dtype=torch.uint8)
    executor.save(5, {"t": bytes_}).wait()
    with pytest.raises(ashore.InvalidError, match="no such dtype"):
        executor.save(6, {"t": bytes_.view(torch.uint4)})


@pytest.fixture
def saved(executor):
    executor.save(1, {"vector": torch.arange(3.0), "scalar": torch.tensor(1.0), "matrix": torch.ones(2, 3)}).wait()
    return executor.latest()


@pytest.mark.parametrize(
    "name, target, why",
    [
        ("vector", lambda: torch.zeros(3, dtype=torch.float64), "F64"),
        ("vector", lambda: torch.zeros(3, dtype=torch.int32), "I32"),
        ("vector", lambda: torch.zeros(4), "shape"),
        ("vector", lambda: torch.tensor(0.0), "shape"),
        ("vector", lambda: numpy.float32(0), "plain|tensor"),
        ("vector", lambda: [0.0, 0.0, 0.0], "type=list"),
        ("vector", lambda: torch.zeros(1).expand(3), "overlap"),
        ("scalar", lambda: torch.zeros(1), "shape"),
        ("matrix", lambda: torch.zeros(3, 2), "shape"),
        ("matrix", lambda: shrunk(0), "no memory"),
    ],
)
def test_a_target_that_does_not_fit_is_refused_by_name(saved, name, target, why):
    with pytest.raises(ashore.InvalidError, match=why) as error:
        saved.read_into({name: target()}, strict=False)
    assert error.value.tensor == name


def test_a_missing_name_and_a_tensor_without_a_target_are_errors(saved):
    with pytest.raises(ashore.NotFoundError) as error:
        saved.read_into({"missing": torch.zeros(1)}, strict=False)
    assert error.value.tensor == "missing" and isinstance(error.value, LookupError)
    with pytest.raises(ashore.InvalidError, match="no target"):
        saved.read_into({"vector": torch.zeros(3)})
    saved.read_into({"vector": torch.zeros(3)}, strict=False)
    with pytest.raises(ashore.NotFoundError):
        saved.value("vector")
    with pytest.raises(ashore.NotFoundError):
        saved.info("none")


def test_steps_settings_and_captures_that_are_wrong(executor, root, tmp_path):
    executor.save(1, {"a": torch.ones(1)}).wait()
    with pytest.raises(ashore.ConflictError) as error:
        executor.save(1, {"a": torch.ones(1)}).wait()
    assert error.value.step == 1
    executor.save(1, {"a": torch.zeros(1)}, overwrite=True).wait()
    with pytest.raises(ashore.NotFoundError) as error:
        executor.checkpoint(9)
    assert error.value.step == 9
    with pytest.raises(ashore.InvalidError, match="capture") as error:
        executor.save(2, {"a": torch.ones(1)}, capture={"b": "save"})
    assert error.value.tensor == "b"
    with pytest.raises(ashore.InvalidError, match="capture"):
        executor.save(2, {"a": torch.ones(1)}, capture={"a": "later"})
    with pytest.raises(ashore.InvalidError, match="seconds"):
        executor.save(2, {"a": torch.ones(1)}, deadline=-1.0)
    with pytest.raises(ashore.InvalidError, match="unknown|wrong type"):
        ashore.CheckpointExecutor(tmp_path / "x", arenas=3)
    with pytest.raises(ashore.InvalidError, match="chunk"):
        ashore.CheckpointExecutor(tmp_path / "x", chunk=3)
    with pytest.raises(OverflowError):
        executor.save(-1, {"a": torch.ones(1)})
    with pytest.raises(ashore.Error):
        ashore.CheckpointExecutor("/proc/nothing/here")
    with pytest.raises(ashore.InvalidError, match="metadata"):
        executor.save(2, {"a": torch.ones(1)}, metadata={"ashore.tree": 1})


def test_a_closed_executor_says_so(root):
    executor = ashore.CheckpointExecutor(root, **SMALL)
    save = executor.save(1, {"a": torch.ones(1)})
    executor.shutdown()
    executor.shutdown()
    for call in (
        lambda: executor.save(2, {"a": torch.ones(1)}), executor.fence, executor.latest, lambda: executor.checkpoint(1)
    ):
        with pytest.raises(ashore.ClosedError) as error:
            call()
        assert error.value.kind == "closed" and isinstance(error.value, RuntimeError)
    assert save.wait().step == 1 and executor.catalog.steps() == [1]
    assert "closed" in repr(executor)


def test_an_error_of_the_block_is_not_masked(root):
    with pytest.raises(KeyError), ashore.CheckpointExecutor(root, **SMALL) as executor:
        executor.save(1, {"a": torch.ones(1)})
        raise KeyError("of the block")
    assert ashore.latest(root).step == 1


def test_an_error_that_nothing_saw_comes_from_the_next_call(root):
    with ashore.CheckpointExecutor(root, **SMALL) as executor:
        executor.save(1, {"a": torch.ones(1)}).wait()
        executor.save(1, {"a": torch.ones(1)})
        with pytest.raises(ashore.ConflictError):
            for step in range(2, 1000):
                executor.save(step, {"a": torch.ones(1)}).staged.result()


def test_errors_can_be_pickled():
    import pickle

    error = ashore.DamagedError("text", "corrupt", "t", "/p", 3)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.kind, copy.tensor, copy.path, copy.step, str(copy)) == (
        ashore.DamagedError, "corrupt", "t", "/p", 3, "text",
    )  # fmt: skip


def test_a_panic_is_an_internal_error():
    with pytest.raises(ashore.InternalError, match="as the test asked") as error:
        ashore._ashore.panic_for_test()
    assert error.value.kind == "internal" and isinstance(error.value, Exception)


def test_a_tensor_whose_own_code_fails_is_refused_with_the_cause(executor):
    class Broken:
        def __dlpack__(self, **_):
            raise BufferError("cannot export")

        def __dlpack_device__(self):
            return (1, 0)

    with pytest.raises(ashore.InvalidError, match="cannot export") as error:
        executor.save(1, {"t": Broken()})
    assert isinstance(error.value.__cause__, BufferError) and error.value.tensor == "t"


def test_nan_in_a_deadline_is_refused(executor):
    with pytest.raises(ashore.InvalidError):
        executor.save(1, {"a": torch.ones(1)}, deadline=math.nan)
