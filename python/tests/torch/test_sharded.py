"""DTensors in a state of `ashore.torch`, on several gloo ranks: restored by other numbers of ranks, bit for bit."""

import ast
import pathlib
import subprocess
import sys

import ashore
import pytest
import torch


def run(tmp_path, world, begin, end):
    """Trains with so many ranks, 0 for a process without any; returns what they ended with, and their random numbers."""
    script = pathlib.Path(__file__).with_name("sharded.py")
    meet = tmp_path / f"meet-{world}-{begin}"
    started = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, (tmp_path / "root", rank, world, meet, begin, end))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(max(world, 1))
    ]
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(said)
    ended = [next(line for line in text.splitlines() if line.startswith("ended ")).split(" ", 2) for text in said]
    assert len({digest for _, digest, _ in ended}) == 1
    return ended[0][1], [ast.literal_eval(random) for *_, random in ended]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), 0, 0, 5)


@pytest.mark.parametrize("first, then", [(2, 4), (4, 2), (2, 0), (4, 0), (0, 2), (2, 3)])
def test_training_goes_on_with_another_number_of_ranks(tmp_path, uninterrupted, first, then):
    _, before = run(tmp_path, first, 0, 3)
    checkpoint = ashore.Catalog(tmp_path / "root").checkpoint(3)
    assert checkpoint.ranks == max(first, 1)
    assert len(checkpoint.boxes("model.rows")) == max(first, 1)
    assert checkpoint.info("optimizer.state.model.rows.exp_avg").shape == (7, 6)
    ended, after = run(tmp_path, then, 3, 5)
    assert ended == uninterrupted[0]
    # Each rank has random numbers of its own, and those that saved some go on with them.
    alone = [torch.Generator().manual_seed(7 + rank) for rank in range(max(first, then, 1))]
    expected = [[torch.rand(1, generator=generator).item() for _ in range(5)] for generator in alone]
    assert before == [random[:3] for random in expected[: max(first, 1)]]
    both = min(max(first, 1), max(then, 1))
    assert after[:both] == [random[3:] for random in expected[:both]]


def test_what_is_no_box_is_refused_by_name(python, root):
    done = python(
        """
        import sys, ashore, ashore.torch, torch
        from torch.distributed import HashStore, destroy_process_group, init_process_group
        from torch.distributed.tensor import DTensor, Partial, init_device_mesh
        init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        tensor = DTensor.from_local(torch.ones(4), init_device_mesh("cpu", (1,)), [Partial()])
        with ashore.CheckpointExecutor(sys.argv[1], **SMALL) as executor:
            for save in (executor.save, lambda step, tree: ashore.torch.save(executor, step, ashore.torch.state(a=tree))):
                try:
                    save(1, {"b": tensor})
                except ashore.InvalidError as error:
                    print(error.tensor, error)
        destroy_process_group()
        """,
        root,
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("b a DTensor whose placement is partial") and second.startswith("a.b a DTensor whose")
