"""ashore from Python, through its C interface: an executor, its saves, and steps read back.

A `Tensor` describes memory of torch or of the driver alone; this file keeps its owner alive until ashore has released it.
"""
import ctypes
import itertools
import json
import threading
from ctypes import POINTER, byref, c_char_p, c_double, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path

RELEASE = ctypes.CFUNCTYPE(None, c_void_p)
USUAL, AT_SAVE, AT_FENCE = range(3)
HOST = -1
ABI, SKIPPED = 1, 100

# The numbers of `ashore.h`, in order.
KINDS = "Ok Invalid NotFound Conflict Busy NoSpace Unavailable Corrupt Device Cancelled Deadline Indeterminate Internal".split()
DTYPES = "BOOL U8 I8 I16 U16 F16 BF16 I32 U32 F32 F64 I64 U64 F8_E4M3 F8_E5M2 F8_E8M0 C64".split()


class CStream(ctypes.Structure):
    _fields_ = [("handle", c_void_p), ("device", c_uint32)]


class CTensor(ctypes.Structure):
    _fields_ = [
        ("name", c_char_p), ("data", c_void_p), ("shape", POINTER(c_int64)), ("strides", POINTER(c_int64)),
        ("global_shape", POINTER(c_int64)), ("offset", POINTER(c_int64)), ("dims", c_uint32), ("dtype", c_int32),
        ("on_device", c_uint32), ("capture", c_uint32), ("stream", CStream), ("release", RELEASE), ("context", c_void_p),
    ]  # fmt: skip


class CError(ctypes.Structure):
    _fields_ = [("kind", c_int32), ("rank", c_int32), ("step", c_int64), ("text", c_char_p), ("tensor", c_char_p), ("path", c_char_p)]


class Committed(ctypes.Structure):
    """Bytes, and seconds since the save was called."""

    _fields_ = [("size", c_size_t), ("bytes", c_uint64)]
    _fields_ += [(n, c_double) for n in ("blocked", "staged", "durable", "tail")]
    _fields_ += [("over_budget", c_uint64), ("late_chunks", c_uint64)]


class Failed(Exception):
    """An error of ashore; `kind` is what the caller can do about it: Invalid, Device, Deadline..."""

    def __init__(self, error):
        super().__init__(error.text.decode())
        self.kind = KINDS[error.kind]


class Tensor:
    """Describes a tensor to ashore. `keep` stays alive until ashore releases it; an ordinal below 0 is host memory."""

    def __init__(self, name, address, size, dtype="U8", shape=None, ordinal=HOST, stream=0, capture=USUAL, keep=None):
        self.name, self.address, self.size, self.dtype = name, address, size, dtype
        self.shape, self.ordinal, self.stream, self.capture, self.keep = shape, ordinal, stream, capture, keep
        if shape is None:
            self.shape = (size,)


class Face:
    """The library, and what its sources keep alive."""

    def __init__(self, path):
        self.lib = ctypes.CDLL(str(Path(path).resolve()))
        self.lib.ashore_last_error.restype = POINTER(CError)
        assert self.lib.ashore_abi() == ABI, f"{path} has another ABI"
        self.kept, self.tokens, self.strange = {}, itertools.count(1), []
        self.released = threading.Condition()
        self.release = RELEASE(self.let_go)  # must outlive every save

    def let_go(self, token):
        with self.released:
            if token not in self.kept:
                self.strange.append(token)
            keep = self.kept.pop(token, None)
            self.released.notify_all()
        del keep  # outside the lock: dropping it may free memory

    def wait_released(self, seconds=60):
        """Waits until every source was released. Each is released once."""
        with self.released:
            assert self.released.wait_for(lambda: not self.kept, seconds), f"{len(self.kept)} sources were never released"
        assert not self.strange, f"released twice: {self.strange}"

    def __call__(self, name, *arguments):
        """Calls a function that returns a status: 0, or that of a save that was skipped."""
        status = getattr(self.lib, f"ashore_{name}")(*arguments)
        if status not in (0, SKIPPED):
            raise Failed(self.lib.ashore_last_error().contents)
        return status

    def made(self, name, *arguments):
        """Calls a function whose last argument is the place for a handle."""
        handle = c_void_p()
        self(name, *arguments, byref(handle))
        return handle

    def json(self, name, *arguments):
        """Calls a function that makes a JSON text."""
        text = self.made(name, *arguments)
        try:
            return json.loads(ctypes.string_at(text))
        finally:
            self.lib.ashore_text_free(text)

    def packed(self, tensors):
        """An array for `save`. Tensors with a `keep` are released once for each save of the array."""
        array = (CTensor * len(tensors))()
        for to, t in zip(array, tensors):
            to.name, to.dtype = t.name.encode(), DTYPES.index(t.dtype) + 1
            to.shape, to.dims = (c_int64 * len(t.shape))(*t.shape), len(t.shape)
            to.data, to.capture = t.address, t.capture
            to.on_device, to.stream = t.ordinal >= 0, CStream(t.stream, max(t.ordinal, 0))
            if t.keep is not None:
                token = next(self.tokens)
                with self.released:
                    self.kept[token] = t.keep
                to.release, to.context = self.release, token
        return array


class Executor:
    """An executor over a folder; settings are those of `ashore::Settings`. Leaving it shuts it down."""

    def __init__(self, face, root, device, seconds=120, **settings):
        self.face, self.root, self.seconds = face, Path(root), seconds
        self.root.mkdir(parents=True, exist_ok=True)
        settings = json.dumps({"device": device, **settings}).encode()
        self.handle = face.made("open", str(root).encode(), settings, None)
        report = face.json("report", self.handle)
        scratch = report["scratch"] if isinstance(report["scratch"], str) else f"{report['scratch']} slots"
        told = (f"{name}={report[name]}" for name in ("arena", "slabs", "huge_pages", "pinned", "locked"))
        self.report = f"{report['device']}: {report['device_why']}, scratch: {scratch}, {report['engine']}, {' '.join(told)}"

    def save(self, step, tensors):
        """Saves a list of tensors, or an array packed from tensors without a `keep`."""
        array = tensors if isinstance(tensors, ctypes.Array) else self.face.packed(tensors)
        begin = self.handle, c_uint64(step), array, c_size_t(len(array)), None
        return Save(self.face, self.face.made("save_begin", *begin))

    def fence(self):
        self.fence_on([])

    def fence_on(self, streams):
        """Streams are pairs of ordinal and handle."""
        array = (CStream * len(streams))(*[CStream(handle, ordinal) for ordinal, handle in streams])
        self.face("fence", self.handle, array, c_size_t(len(streams)))

    def step(self, step):
        return Step(self.face, self.root, step)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            self.face("close", self.handle, c_double(self.seconds))
        except Failed:
            if kind is None:
                raise


class Save:
    def __init__(self, face, handle):
        self.face, self.handle = face, handle

    def staged(self, seconds=60):
        self.face("save_staged", self.handle, c_double(seconds))

    def wait(self, seconds=60):
        """The cost of the save, once it is durable; None if it was not begun."""
        committed = Committed(size=ctypes.sizeof(Committed))
        return committed if self.face("save_wait", self.handle, c_double(seconds), byref(committed)) == 0 else None

    def __del__(self):
        self.face.lib.ashore_save_free(self.handle)


class Step:
    """A step, read by ashore's own reader."""

    def __init__(self, face, root, step):
        self.face, self.handle = face, face.made("checkpoint_open", f"{root}/step-{step:08}".encode())
        self.tensors = {t["name"]: t for t in face.json("checkpoint_json", self.handle, None)["tensors"]}

    def read(self, name, size):
        to, told = bytearray(size), self.tensors[name]
        assert told["bytes"] == size, f"{name} has {told['bytes']} bytes, not {size}"
        address = ctypes.addressof((ctypes.c_char * size).from_buffer(to)) if size else 0
        target = self.face.packed([Tensor(name, address, size, told["dtype"], told["shape"])])
        self.face("restore", self.handle, target, c_size_t(1))
        return to

    def __del__(self):
        if hasattr(self, "handle"):
            self.face.lib.ashore_checkpoint_free(self.handle)
