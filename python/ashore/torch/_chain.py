"""Applies updates of a chain to torch tensors on any device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ashore.chain import Changed, Follow, Update

from ._dtypes import torch_dtype
from ._errors import invalid

# Elements are copied as integers: this keeps every bit pattern, and devices need not support the dtype.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def changed(change: Changed) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Returns 64-bit indices into the flattened tensor (None: all elements), and the values at these indices,
    as new tensors on the host.

    >>> import ashore.chain, ashore.torch, tempfile, torch
    >>> root, weight, served = tempfile.mkdtemp(), torch.zeros(99, 99), torch.zeros(99, 99)
    >>> with ashore.chain.Publisher(root, arena=4 << 20) as publisher:
    ...     _ = publisher.publish({"w": weight}).wait()
    ...     follow = ashore.chain.Follow(root)
    ...     _ = follow.advance()
    ...     weight[1, 1] = 2.0
    ...     _ = publisher.publish({"w": weight}).wait()
    >>> (change,) = follow.next().changes()
    >>> indices, values = ashore.torch.changed(change)
    >>> served.view(-1).index_copy_(0, indices, values).nonzero(), float(served[1, 1])
    (tensor([[100]]), 2.0)
    """
    dtype = torch_dtype(change.dtype)
    count = change._core.count
    indices = None if count is None else torch.empty(count, dtype=torch.int64)
    values = torch.empty(change._core.bytes // dtype.itemsize, dtype=dtype)
    change._core.fill(indices, values)
    return indices, values


def apply_update(follow: Follow, update: Update, tensors: Mapping[str, torch.Tensor]) -> int:
    """Applies ``update`` to ``follow``, and copies the changes to ``tensors``. Returns the version of both.

    ``tensors`` maps names in the chain to tensors, such as those of a module on a GPU
    (``module.state_dict()``).

    ``follow`` must have no targets: its weights are the copy in host memory against which updates are
    checked. For a delta, only the changes cross the bus. If the tensors are not at the version before, as at
    the first call and after a call that failed, all of them are copied. Copies to a GPU are queued in its
    current stream. Nothing else may write the tensors, and a follower may have only one set of tensors.

    Raises what :meth:`Follow.apply <ashore.chain.Follow.apply>` raises. Raises ``InvalidError``, naming the
    tensor, for a tensor that is missing, not contiguous, or of another dtype or shape.

    >>> import ashore.chain, ashore.torch, tempfile, torch
    >>> root, trained = tempfile.mkdtemp(), torch.nn.Linear(4, 4)
    >>> with ashore.chain.Publisher(root, arena=4 << 20) as publisher:
    ...     _ = publisher.publish(trained.state_dict()).wait()
    >>> served = torch.nn.Linear(4, 4)  # on any device
    >>> follow = ashore.chain.Follow(root)
    >>> ashore.torch.apply_update(follow, follow.next(), served.state_dict())
    1
    >>> torch.equal(served.weight, trained.weight)
    True
    """
    changes = update.changes()
    if not update.is_full:
        _check(follow, tensors)
    # The tensors of a full are known only after it is applied.
    whole = update.is_full or follow._copied is None or follow._copied != follow.version
    version = follow.apply(update)
    follow._copied = None
    with torch.no_grad():
        if whole:
            _check(follow, tensors)
            for name, *_ in follow._core.tensors():
                target = tensors[name].detach()
                host = torch.empty(target.shape, dtype=target.dtype)
                follow.read_into({name: host})
                _words(target).copy_(_words(host))
            follow._copied = version
            return version
        names: dict[str, list[str]] = {}
        for name, *_, holder in follow._core.tensors():
            names.setdefault(holder, []).append(name)
        for change in changes:
            indices, values = changed(change)
            for name in names[change.name]:
                target = _words(tensors[name].detach())
                words = _words(values).to(target.device)
                if indices is None:
                    target.copy_(words)
                else:
                    target.index_copy_(0, indices.to(target.device), words)
    follow._copied = version
    return version


def _words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(_INTEGERS[tensor.itemsize])


def _check(follow: Follow, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, stored, _, shape, _ in follow._core.tensors():
        tensor = tensors.get(name)
        if tensor is None:
            raise invalid(f"the version has a tensor that is not given: give state_dict() tensor={name!r}", name)
        dtype = torch_dtype(stored)
        if stored == "F4" and shape:
            # torch counts pairs of F4 elements.
            shape = [*shape[:-1], shape[-1] // 2]
        if tensor.dtype != dtype or list(tensor.shape) != shape or not tensor.is_contiguous():
            raise invalid(
                f"a tensor is not contiguous, or has another dtype or shape than the version tensor={name!r} "
                f"version={stored}{shape} given={tensor.dtype}{list(tensor.shape)}",
                name,
            )
