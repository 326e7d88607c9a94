"""Tensors on GPUs, on the simulated driver: streams and devices."""

import os
from pathlib import Path

import pytest

DRIVER = Path(__file__).parents[2] / "target/debug/libfakecuda.so"

pytestmark = pytest.mark.skipif(not DRIVER.exists(), reason="the simulated driver is not built: cargo build -p fakecuda")

# A program with one GPU, a library that knows DLPack alone, and a `torch` that is described by its attributes.
PROGRAM = """
import ctypes, os, sys, time, types
os.environ["FAKECUDA_DEVICES"] = "1"
cuda = ctypes.CDLL(sys.argv[2])  # ashore finds it by its name then
def call(name, *arguments):
    assert getattr(cuda, name)(*arguments) == 0, name
def made(name, *arguments):
    value = ctypes.c_uint64()
    call(name, ctypes.byref(value), *arguments)
    return value.value
def hold(kinds):
    call("fakecuda_set", ctypes.c_uint64(0), b"hold", ctypes.c_uint64(kinds))
call("cuInit", 0)
call("cuCtxSetCurrent", ctypes.c_void_p(made("cuDevicePrimaryCtxRetain", 0)))
LENGTH = 1 << 20
ADDRESSES = [made("cuMemAlloc_v2", ctypes.c_size_t(4 * LENGTH)) for _ in range(2)]
WRITTEN = made("cuMemHostAlloc", ctypes.c_size_t(4 * LENGTH), 0)
ctypes.memset(WRITTEN, 7, 4 * LENGTH)
def write(address, stream):
    size = ctypes.c_size_t(4 * LENGTH)
    call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), ctypes.c_void_p(WRITTEN), size, ctypes.c_void_p(stream))
STREAM = made("cuStreamCreate", 1)  # it does not wait for the default stream

class Managed(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("kind", ctypes.c_int32), ("ordinal", ctypes.c_int32), ("dims", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16), ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p), ("offset", ctypes.c_uint64), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
    ]

class Array:
    def __init__(self, address, ordinal=0):
        self.shape, self.device = (ctypes.c_int64 * 1)(LENGTH), (2, ordinal)
        self.managed = Managed(address, 2, ordinal, 1, 2, 32, 1, ctypes.addressof(self.shape), None, 0, None, None)
    def __dlpack_device__(self):
        return self.device
    def __dlpack__(self, **options):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.managed), b"dltensor", None)

class Tensor:
    dtype, layout, shape, is_quantized, is_nested = "torch.float32", "torch.strided", (LENGTH,), False, False
    device = types.SimpleNamespace(type="cuda", index=0)
    def __init__(self, address):
        self.data_ptr = lambda: address
    is_neg = is_conj = lambda self: False
    stride = lambda self: (1,)
    untyped_storage = lambda self: types.SimpleNamespace(data_ptr=self.data_ptr, nbytes=lambda: 4 * LENGTH)

torch = types.ModuleType("torch")
torch.Tensor, torch.cuda = Tensor, types.SimpleNamespace(current_stream=lambda _: types.SimpleNamespace(cuda_stream=STREAM))
sys.modules["torch"] = torch
import ashore
executor = ashore.CheckpointExecutor(sys.argv[1], arena=16 << 20, chunk=1 << 20, device="cuda:0")
"""


@pytest.fixture
def program(python, root):
    def run(script):
        return python(PROGRAM + script, root, os.fspath(DRIVER))

    return run


def test_a_device_of_a_save_that_was_refused_is_no_matter_of_fences(program):
    """It was noted before the engine took the save, and each later fence with something to wait for was refused."""
    program(
        """
with executor:
    try:
        executor.save(1, {"a": Array(1 << 20, ordinal=7)})
    except ashore.Error:
        pass
    else:
        raise AssertionError("there is one GPU")
    hold(1)  # copies to the host do not begin
    save = executor.save(2, {"a": Tensor(ADDRESSES[0])})
    executor.fence()
    hold(0)
    assert save.wait().step == 2
"""
    )


@pytest.mark.parametrize("order", ["Array, Tensor", "Tensor, Array"])
def test_a_save_waits_for_the_streams_of_all_libraries_on_a_device(program, order):
    """The first tensor on a device chose the stream of all: others were read before the work in the stream of their
    own library wrote them."""
    program(
        f"""
first, second = {order}
"""
        """
with executor:
    streams = [0, STREAM] if first is Array else [STREAM, 0]
    write(ADDRESSES[0], streams[0])
    call("cuStreamSynchronize", ctypes.c_void_p(streams[0]))
    hold(2)  # copies to the device do not begin
    write(ADDRESSES[1], streams[1])
    save = executor.save(1, {"first": first(ADDRESSES[0]), "second": second(ADDRESSES[1])})
    time.sleep(0.2)
    hold(0)
    save.wait()
    for name in ("first", "second"):
        assert set(executor.latest().read(name).tobytes()) == {7}, name
"""
    )
