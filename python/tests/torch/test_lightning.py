"""Lightning with its real Trainer: a run goes on from our checkpoints as from Lightning's own."""

import pathlib

import ashore
import ashore.torch
import pytest
import torch
from helpers import bits, executor, skips_saves

pytest.importorskip("lightning")

import ashore.torch.lightning as ashore_lightning  # noqa: E402
import lightning  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 256), torch.nn.BatchNorm1d(256), torch.nn.Linear(256, 1))
        self.save_hyperparameters({"root": pathlib.PurePosixPath("/data")})

    def training_step(self, batch, _):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def fitted(root, steps, saves=None, resume=None):
    """The end of a run; without an executor by Lightning's own checkpoints."""
    torch.manual_seed(1)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(32, 8)), batch_size=4)
    module = Module()
    every = ModelCheckpoint(root, "{step}", every_n_train_steps=1, save_top_k=2, monitor="step", mode="max", save_last=True)
    callbacks, plugins = [every], []
    if saves is not None:
        fence = ashore_lightning.Fence(saves)
        callbacks, plugins = [fence, every], [ashore_lightning.CheckpointIO(saves, fence)]
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=steps, callbacks=callbacks, plugins=plugins, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume, weights_only=False)
    trainer.strategy.checkpoint_io.teardown()
    return bits([module.state_dict(), trainer.optimizers[0].state_dict()])


def test_a_run_goes_on_as_from_the_checkpoints_of_lightning(tmp_path):
    own, ours = tmp_path / "own", tmp_path / "ours"
    with executor(tmp_path / "steps", detect="all") as saves:
        assert fitted(ours, 5, saves) == fitted(own, 5)
        assert {path.name for path in ours.iterdir()} == {path.name for path in own.iterdir()}
        resumed = fitted(ours, 12, saves, resume=ours / "last.ckpt")
        assert resumed == fitted(own, 12, resume=own / "last.ckpt")
        # Plain safetensors under Lightning's names.
        last = ashore.Checkpoint(ours / "last.ckpt")
        assert last.step == 12 and "state_dict.net.0.weight" in last.names()


def plugin(saves):
    return ashore_lightning.CheckpointIO(saves, ashore_lightning.Fence(saves))


def checkpoint(step, numbers=8):
    return {"global_step": step, "state_dict": {"weight": torch.full((numbers,), float(step))}}


def test_a_checkpoint_that_the_policy_skips_is_an_error(tmp_path, monkeypatch):
    with executor(tmp_path / "steps", overlap="skip") as saves:
        skips_saves(saves, monkeypatch)
        io = plugin(saves)
        io.save_checkpoint(checkpoint(2), tmp_path / "2.ckpt")
        with pytest.raises(ashore.InvalidError, match="left out the save.*step=2"):
            io.teardown()
        assert not (tmp_path / "2.ckpt").exists()


def test_the_old_checkpoint_is_removed_when_the_new_one_is_durable(tmp_path):
    """As Lightning does with save_top_k=1: a crash at any time leaves one of the two."""
    old, new = tmp_path / "1.ckpt", tmp_path / "2.ckpt"
    with executor(tmp_path / "steps") as saves:
        io = plugin(saves)
        io.save_checkpoint(checkpoint(1), old)
        io.save_checkpoint(checkpoint(2, 32 << 20), new)
        io.remove_checkpoint(old)
        assert not old.exists() and ashore.Checkpoint(new).step == 2


def test_the_old_checkpoint_stays_where_the_new_one_failed(tmp_path):
    old, new = tmp_path / "1.ckpt", tmp_path / "2.ckpt"
    with executor(tmp_path / "steps") as saves:
        io = plugin(saves)
        io.save_checkpoint(checkpoint(1), old)
        io.save_checkpoint(checkpoint(2, 32 << 20), new)
        assert io._saves[str(new)].cancel()
        with pytest.raises(ashore.CancelledError):
            io.remove_checkpoint(old)
        assert not new.exists()
        assert io.load_checkpoint(old)["state_dict"]["weight"].tolist() == [1.0] * 8
