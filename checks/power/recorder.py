"""An nbdkit plugin that keeps a disk in a file and records every write and every flush, in their order.

Parameters: `disk=FILE` keeps the bytes, `log=FILE` the records. A record is `<BQI`: 1 for a write or 2 for a
flush, then offset and length; the bytes of a write follow. The plugin appends a record before it answers the
call. So the length of the log, read after a program has printed something, is a position behind every write
and flush that had ended by then.
"""
import os
import struct

import nbdkit

API_VERSION = 2
WRITE, FLUSH = 1, 2
files = {}


def thread_model():
    return nbdkit.THREAD_MODEL_SERIALIZE_ALL_REQUESTS


def config(key, value):
    files[key] = value


def open(readonly):
    disk = os.open(files["disk"], os.O_RDWR)
    log = os.open(files["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    return disk, log


def get_size(handle):
    return os.fstat(handle[0]).st_size


def can_flush(handle):
    return True


def can_write(handle):
    return True


def pread(handle, buffer, offset, flags):
    os.preadv(handle[0], [buffer], offset)


def pwrite(handle, buffer, offset, flags):
    os.writev(handle[1], [struct.pack("<BQI", WRITE, offset, len(buffer)), buffer])
    os.pwrite(handle[0], buffer, offset)


def flush(handle, flags):
    os.write(handle[1], struct.pack("<BQI", FLUSH, 0, 0))
