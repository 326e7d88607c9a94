"""The Trainer of transformers: a callback saves, with `save_strategy="no"`.

    callback = ashore.torch.transformers.Callback(executor, every=100)
    trainer = Trainer(model, TrainingArguments(..., save_strategy="no"), train_dataset=data, callbacks=[callback])
    ashore.torch.transformers.train(trainer, callback)  # from the newest step, or from the beginning
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

import ashore

from ._rng import Rng
from ._state import State, restore, save


class _LateRng(Rng):
    """Random numbers that are set only when the first step begins, because skipping data draws some
    before."""

    _loaded: dict[str, Any] | None = None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state

    def apply(self) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            super().load_state_dict(loaded)


class Callback(TrainerCallback):
    """Saves every `every` steps, fences before the optimizer's step, and restores the checkpoint that `train`
    found.

    The model is saved under its own names below `model.`, together with optimizer, scheduler, random numbers
    and the Trainer's state. The Trainer finds its place in the data from that state.
    """

    def __init__(self, executor: Any, every: int) -> None:
        self._executor, self._every = executor, every
        self._state: State | None = None
        self._rng = _LateRng()
        self._progress: dict[str, Any] = {}
        self._found: ashore.Checkpoint | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if str(getattr(args.save_strategy, "value", args.save_strategy)) != "no":
            raise ashore.InvalidError('the Trainer saves, too: give it save_strategy="no"', "invalid")
        self._state = State(
            model=kwargs["model"],
            optimizer=kwargs["optimizer"],
            scheduler=kwargs["lr_scheduler"],
            trainer=self._progress,
            rng=self._rng,
        )
        found, self._found = self._found, None
        if found is not None:
            restore(found, self._state)
        elif state.global_step > 0:
            text = "the Trainer resumes without its optimizer: start it by ashore.torch.transformers.train"
            raise ashore.InvalidError(text, "invalid")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._rng.apply()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._executor.fence()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every == 0 and self._state is not None:
            self._progress["state"] = json.dumps(dataclasses.asdict(state))
            save(self._executor, state.global_step, self._state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._executor.fence()


def train(trainer: Any, callback: Callback) -> TrainOutput:
    """Runs `trainer.train()` from the newest durable step of the callback's executor, if there is one."""
    found = callback._executor.latest()
    if found is None:
        output: TrainOutput = trainer.train()
        return output
    callback._found = found
    with tempfile.TemporaryDirectory(prefix="ashore-resume-") as directory:
        with open(os.path.join(directory, "trainer_state.json"), "w") as file:
            file.write(found.value("trainer.state"))
        # The callback restores the weights. The Trainer only learns its place in the data.
        trainer._load_from_checkpoint = lambda *_, **__: None
        try:
            output = trainer.train(resume_from_checkpoint=directory)
            return output
        finally:
            del trainer._load_from_checkpoint
