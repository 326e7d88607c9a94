"""Saves checkpoints of training programs while they compute: durable, never torn, readable by stock tools.

>>> import ashore, numpy, tempfile
>>> root = tempfile.mkdtemp()
>>> weights = numpy.zeros((2, 3), "float32")
>>> with ashore.CheckpointExecutor(root, arena=16 << 20, chunk=1 << 20) as executor:
...     save = executor.save(1, {"weights": weights, "epoch": 4})
...     executor.fence()  # now the weights may be written
>>> ashore.latest(root).value("epoch")
4
"""

from ._ashore import __version__
from ._checkpoint import Catalog, Checkpoint, Entry, Report, TensorInfo
from ._errors import (
    BusyError,
    CancelledError,
    ClosedError,
    ConflictError,
    DamagedError,
    DeadlineError,
    DeviceError,
    Error,
    InternalError,
    InvalidError,
    NotFoundError,
    StorageError,
)
from ._executor import CheckpointExecutor, latest, save
from ._save import Committed, Progress, Save
from ._tiers import Promoted, Tier, TierReport

__all__ = [
    "BusyError",
    "CancelledError",
    "Catalog",
    "Checkpoint",
    "CheckpointExecutor",
    "ClosedError",
    "Committed",
    "ConflictError",
    "DamagedError",
    "DeadlineError",
    "DeviceError",
    "Entry",
    "Error",
    "InternalError",
    "InvalidError",
    "NotFoundError",
    "Progress",
    "Promoted",
    "Report",
    "Save",
    "StorageError",
    "TensorInfo",
    "Tier",
    "TierReport",
    "__version__",
    "latest",
    "save",
]

for _name in (
    "Catalog", "Checkpoint", "CheckpointExecutor", "Committed", "Entry", "Progress", "Promoted", "Report", "Save", "TensorInfo",
    "Tier", "TierReport",
):  # fmt: skip
    globals()[_name].__module__ = __name__
del _name
