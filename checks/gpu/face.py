"""ashore from Python, through the C interface in `face/`: an executor, its saves, and steps read back.

A `Tensor` describes memory of torch or of the driver alone; this file keeps its owner alive until ashore has released it.
"""
import ctypes
import itertools
import json
import threading
from ctypes import POINTER, byref, c_char_p, c_double, c_int32, c_uint32, c_uint64, c_void_p
from pathlib import Path

RELEASE = ctypes.CFUNCTYPE(None, c_uint64)
USUAL, AT_SAVE, AT_FENCE = range(3)
HOST = -1


class CTensor(ctypes.Structure):
    _fields_ = [
        ("name", c_char_p), ("dtype", c_char_p), ("shape", POINTER(c_uint64)), ("rank", c_uint64), ("address", c_uint64),
        ("bytes", c_uint64), ("stream", c_uint64), ("ordinal", c_int32), ("capture", c_int32), ("release", RELEASE),
        ("token", c_uint64),
    ]  # fmt: skip


class CStream(ctypes.Structure):
    _fields_ = [("handle", c_uint64), ("ordinal", c_uint32)]


class Committed(ctypes.Structure):
    """Bytes, and seconds since the save was called."""

    _fields_ = [(n, c_double) for n in ("blocked", "staged", "durable", "tail")]
    _fields_ = [("bytes", c_uint64), *_fields_, ("over_budget", c_uint64), ("late_chunks", c_uint64)]


class Failed(Exception):
    """An error of ashore; `kind` is what the caller can do about it: Invalid, Device, Deadline..."""

    def __init__(self, text):
        super().__init__(text)
        self.kind = text.partition(":")[0]


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
        for name in ("open", "report", "save", "step", "error"):
            getattr(self.lib, f"face_{name}").restype = c_char_p if name in ("report", "error") else c_void_p
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
        result = getattr(self.lib, f"face_{name}")(*arguments)
        if result is None or (isinstance(result, int) and result < 0):
            raise Failed(self.lib.face_error().decode())
        return result

    def packed(self, tensors):
        """An array for `save`. Tensors with a `keep` are released once for each save of the array."""
        array = (CTensor * len(tensors))()
        for to, t in zip(array, tensors):
            to.name, to.dtype = t.name.encode(), t.dtype.encode()
            to.shape, to.rank = (c_uint64 * len(t.shape))(*t.shape), len(t.shape)
            to.address, to.bytes, to.stream = t.address, t.size, t.stream
            to.ordinal, to.capture = t.ordinal, t.capture
            if t.keep is not None:
                token = next(self.tokens)
                with self.released:
                    self.kept[token] = t.keep
                to.release, to.token = self.release, token
        return array


class Executor:
    """An executor over a folder; settings are those of `ashore::Settings`. Leaving it shuts it down."""

    def __init__(self, face, root, device, driver=None, seconds=120, **settings):
        self.face, self.root, self.seconds = face, Path(root), seconds
        self.root.mkdir(parents=True, exist_ok=True)
        settings = json.dumps({"device": device, **settings}).encode()
        self.handle = c_void_p(face("open", str(root).encode(), settings, driver and str(driver).encode()))
        self.report = face("report", self.handle).decode()

    def save(self, step, tensors):
        """Saves a list of tensors, or an array packed from tensors without a `keep`."""
        array = tensors if isinstance(tensors, ctypes.Array) else self.face.packed(tensors)
        return Save(self.face, self.face("save", self.handle, c_uint64(step), array, c_uint64(len(array))))

    def fence(self):
        self.face("fence", self.handle)

    def fence_on(self, streams):
        """Streams are pairs of ordinal and handle."""
        array = (CStream * len(streams))(*[CStream(handle, ordinal) for ordinal, handle in streams])
        self.face("fence_on", self.handle, array, c_uint64(len(streams)))

    def step(self, step):
        return Step(self.face, self.root, step)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            self.face("shutdown", self.handle, c_double(self.seconds))
        except Failed:
            if kind is None:
                raise


class Save:
    def __init__(self, face, handle):
        self.face, self.handle = face, c_void_p(handle)

    def staged(self, seconds=60):
        self.face("staged", self.handle, c_double(seconds))

    def wait(self, seconds=60):
        """The cost of the save, once it is durable; None if it was not begun."""
        committed = Committed()
        return committed if self.face("wait", self.handle, c_double(seconds), byref(committed)) == 0 else None

    def __del__(self):
        self.face("drop_save", self.handle)


class Step:
    """A step, read by ashore's own reader."""

    def __init__(self, face, root, step):
        self.face = face
        self.handle = c_void_p(face("step", str(root).encode(), c_uint64(step)))

    def read(self, name, size):
        to = bytearray(size)
        at = (ctypes.c_char * size).from_buffer(to) if size else None
        self.face("read", self.handle, name.encode(), at, c_uint64(size))
        return to

    def __del__(self):
        if hasattr(self, "handle"):
            self.face("drop_step", self.handle)
