"""accelerate, real: what an accelerator prepared is saved and restored, and its optimizer is fenced."""

import ashore
import ashore.torch
import pytest
import torch
from helpers import bits, executor

pytest.importorskip("accelerate")

import ashore.torch.accelerate as ashore_accelerate  # noqa: E402
from accelerate import Accelerator  # noqa: E402


def prepared(seed):
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=True)
    net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(net.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    accelerator.free_memory()
    net, optimizer, scheduler = accelerator.prepare(net, optimizer, scheduler)
    return accelerator, net, optimizer, scheduler


def train(accelerator, net, optimizer, scheduler):
    optimizer.zero_grad()
    accelerator.backward(net(torch.randn(4, 8)).square().mean())
    optimizer.step()
    scheduler.step()


def test_prepared_objects_come_back_bit_for_bit(tmp_path):
    with executor(tmp_path, detect="all") as saves:
        objects, progress = prepared(1), {"epoch": 3}
        state = ashore_accelerate.state(objects[0], progress=progress)
        with ashore.torch.fence_before(saves, objects[2]):
            for step in range(1, 5):
                train(*objects)
                save = ashore.torch.save(saves, step, state)
            save.wait()
            train(*objects)
        assert "model.0.weight" in saves.latest().names()
        expected = bits([objects[1].state_dict(), objects[2].state_dict(), objects[3].state_dict()])
        other, empty = prepared(2), {}
        ashore.torch.restore(saves.latest(), ashore_accelerate.state(other[0], progress=empty))
        train(*other)
    assert bits([other[1].state_dict(), other[2].state_dict(), other[3].state_dict()]) == expected
    assert empty == {"epoch": 3}
