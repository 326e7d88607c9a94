"""accelerate: collects the objects that an `Accelerator` has prepared as a state.

    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    state = ashore.torch.accelerate.state(accelerator, progress=progress)
    ashore.torch.fence_before(executor, optimizer)

`accelerator.save_state` would itself write optimizers and random numbers, by pickle. Save this state instead.
"""

from __future__ import annotations

from typing import Any

from ._rng import Rng
from ._state import State


def state(accelerator: Any, **more: Any) -> State:
    """Collects what an accelerator has prepared and registered, the random numbers, and `more`.

    The first object of each kind is named after the kind (`model`); the next ones have a number (`model1`).
    """
    objects: dict[str, Any] = {}
    kinds = {
        "model": [accelerator.unwrap_model(model) for model in accelerator._models],
        "optimizer": accelerator._optimizers,
        "scheduler": accelerator._schedulers,
        "scaler": [accelerator.scaler] if accelerator.scaler is not None else [],
        "custom": accelerator._custom_objects,
    }
    for kind, found in kinds.items():
        objects |= {f"{kind}{number or ''}": each for number, each in enumerate(found)}
    return State(**objects, rng=Rng(), **more)
