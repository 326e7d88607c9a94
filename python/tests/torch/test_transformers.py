"""The Trainer of transformers, real: an interrupted run goes on as one that was not."""

import ashore
import ashore.torch
import pytest
import torch
from helpers import bits, executor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import ashore.torch.transformers as ashore_transformers  # noqa: E402
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Dropout(0.2), torch.nn.Linear(64, 1))

    def forward(self, x, labels=None):
        return {"loss": (self.net(x) - labels).square().mean()}


class Stop(TrainerCallback):
    def __init__(self, at):
        self.at = at

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.at


def trainer(root, saves, *callbacks, **options):
    torch.manual_seed(1)
    data = [{"x": torch.randn(8), "labels": torch.randn(1)} for _ in range(24)]
    model = Model()
    callback = ashore_transformers.Callback(saves, every=1)
    given = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True} | options
    arguments = TrainingArguments(str(root / "out"), max_steps=14, per_device_train_batch_size=4, **given)
    return Trainer(model, arguments, train_dataset=data, callbacks=[callback, *callbacks]), callback, model


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path):
    with executor(tmp_path / "whole", detect="all") as saves:
        whole, callback, model = trainer(tmp_path, saves)
        ashore_transformers.train(whole, callback)
        expected = bits([model.state_dict(), whole.optimizer.state_dict()])
    with executor(tmp_path / "cut", detect="all") as saves:
        # In the second epoch of six steps each.
        cut, callback, _ = trainer(tmp_path, saves, Stop(8))
        ashore_transformers.train(cut, callback)
        saves.shutdown()
    assert ashore.latest(tmp_path / "cut").step == 8
    with executor(tmp_path / "cut", detect="all") as saves:
        resumed, callback, model = trainer(tmp_path, saves)
        assert ashore_transformers.train(resumed, callback).global_step == 14
        assert bits([model.state_dict(), resumed.optimizer.state_dict()]) == expected


def test_a_trainer_that_saves_itself_is_refused(tmp_path):
    with executor(tmp_path / "steps") as saves:
        made, callback, _ = trainer(tmp_path, saves, save_strategy="steps")
        with pytest.raises(ashore.InvalidError, match='save_strategy="no"'):
            ashore_transformers.train(made, callback)
