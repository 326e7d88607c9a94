"""DCP on several gloo ranks: DTensors in boxes, loaded by as many ranks and by one."""

import pathlib
import subprocess
import sys

import ashore
import ashore.torch
import pytest
import ranks
import torch
import torch.distributed.checkpoint as dcp


def run(script, tmp_path, world):
    """Runs a script of this directory as so many ranks."""
    script = pathlib.Path(__file__).with_name(script)
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "root"), str(rank), str(world), str(tmp_path / "meet")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * world, "\n".join(said)


def test_four_ranks_load_every_placement_into_every_other(tmp_path):
    run("reshard.py", tmp_path, 4)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_save_together_and_any_number_loads(tmp_path, world):
    run("ranks.py", tmp_path, world)
    for step in (1, 2):
        checkpoint = ashore.Catalog(tmp_path / "root").checkpoint(step)
        assert checkpoint.ranks == world
        assert len(checkpoint.boxes("deep.rows")) == world and len(checkpoint.boxes("deep.everywhere")) == 1
        shapes = {name: checkpoint.info(name).shape for name in checkpoint.names()}
        loaded = {"deep": {name.removeprefix("deep."): torch.empty(shape) for name, shape in shapes.items()}}
        loaded["deep"]["object"] = {"text": "", "set": set()}
        dcp.load(loaded, storage_reader=ashore.torch.StorageReader(checkpoint), no_dist=True)
        ranks.check(loaded)
