"""torch's distributed checkpoint over an executor, in one process."""

import concurrent.futures

import ashore
import ashore.torch
import ashore.torch.dcp
import ashore.torch.private
import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import Net, bits, executor, skips_saves, train
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict


def state_of(net, optimizer, step=0):
    model, optim = get_state_dict(net, optimizer)
    return {"model": model, "optim": optim, "loop": {"step": step, "names": ["a", "b"], "tuple": (1, 2.5)}}


def trained(seed, steps=2):
    torch.manual_seed(seed)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    train(net, optimizer, steps)
    return net, optimizer


def loaded(saves, step):
    """What `dcp.load` reads into other objects."""
    net, optimizer = trained(99, 1)
    state = state_of(net, optimizer)
    dcp.load(state, storage_reader=ashore.torch.StorageReader(saves.checkpoint(step)), no_dist=True)
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    return state, bits(get_state_dict(net, optimizer))


def test_save_and_load(tmp_path):
    net, optimizer = trained(1)
    expected = bits(get_state_dict(net, optimizer))
    with executor(tmp_path) as saves:
        dcp.save(state_of(net, optimizer, 7), storage_writer=ashore.torch.StorageWriter(saves, 7), no_dist=True)
        # Durable when dcp.save returns, and readable by its names.
        assert saves.latest().step == 7
        assert bits(torch.from_numpy(saves.latest().read("model.conv.bias"))) == bits(net.conv.bias)
        state, found = loaded(saves, 7)
    assert found == expected
    assert state["loop"] == {"step": 7, "names": ["a", "b"], "tuple": (1, 2.5)}


@pytest.mark.parametrize("how", ["writer", "stager", "private", "installed"])
def test_an_asynchronous_save_is_what_it_was_at_the_call(tmp_path, how):
    net, optimizer = trained(1)
    # Larger than the arena, so that the fence has something to wait for.
    big = {"big": torch.rand(3 << 20)}
    expected, expected_big = bits(get_state_dict(net, optimizer)), big["big"].clone()
    with executor(tmp_path, detect="all") as saves:
        state = state_of(net, optimizer, 5) | {"more": big}
        writer = ashore.torch.StorageWriter(saves, 5)
        if how == "writer":
            done = dcp.async_save(state, storage_writer=writer, no_dist=True)
        elif how == "stager":
            stager = ashore.torch.Stager(saves, 5)
            done = dcp.async_save(state, storage_writer=writer, async_stager=stager, no_dist=True)
        elif how == "private":
            done = ashore.torch.private.Executor(saves).execute_save(state, checkpoint_id="step-5", no_dist=True)
        else:
            installed = ashore.torch.private.install(saves)
            done = dcp.async_save(state, storage_writer=writer, no_dist=True)
            installed.remove()
        saves.fence()
        train(net, optimizer)
        big["big"].zero_()
        metadata = done.result(timeout=60)
        assert "model.conv.weight" in metadata.state_dict_metadata
        assert saves.latest().step == 5
        assert loaded(saves, 5)[1] == expected
        assert torch.equal(torch.from_numpy(saves.latest().read("more.big")), expected_big)


def test_many_asynchronous_saves(tmp_path):
    net, optimizer = trained(1)
    optimizer_fence = []
    with executor(tmp_path, detect="all") as saves, ashore.torch.fence_before(saves, optimizer):
        for step in range(1, 8):
            done = dcp.async_save(
                state_of(net, optimizer, step), storage_writer=ashore.torch.StorageWriter(saves, step), no_dist=True
            )
            optimizer_fence.append((step, bits(get_state_dict(net, optimizer)), done))
            train(net, optimizer)
        for step, expected, done in optimizer_fence:
            done.result(timeout=60)
            state, found = loaded(saves, step)
            assert found == expected and state["loop"]["step"] == step


def test_steps_of_other_writers_are_loaded(tmp_path):
    net, optimizer = trained(1)
    with executor(tmp_path) as saves:
        ashore.torch.save(saves, 1, ashore.torch.state(model=net)).wait()
        other = Net()
        state = {"model": other.state_dict()}
        dcp.load(state, storage_reader=ashore.torch.StorageReader(saves.latest()), no_dist=True)
    assert bits(other.state_dict()) == bits(net.state_dict())


def test_what_differs_is_refused_by_name(tmp_path):
    with executor(tmp_path) as saves:
        reader = lambda: ashore.torch.StorageReader(saves.latest())  # noqa: E731
        dcp.save({"a": torch.ones(3)}, storage_writer=ashore.torch.StorageWriter(saves, 1), no_dist=True)
        with pytest.raises(CheckpointException) as refused:
            dcp.load({"a": torch.ones(3, dtype=torch.float64)}, storage_reader=reader(), no_dist=True)
        [(error, _)] = refused.value.failures.values()
        assert isinstance(error, ashore.InvalidError) and error.tensor == "a"
        for state in ({"a": torch.ones(4)}, {"b": torch.ones(3)}):
            with pytest.raises(CheckpointException):
                dcp.load(state, storage_reader=reader(), no_dist=True)


def test_ids_name_steps(tmp_path):
    step_of = ashore.torch.dcp.step_of
    assert [step_of(name) for name in (None, "step-5", "/a/10/", "007", 3)] == [None, 5, 10, 7, 3]
    with executor(tmp_path) as saves:
        writer = ashore.torch.StorageWriter(saves)
        dcp.save({"a": torch.ones(3)}, checkpoint_id="run/step-12", storage_writer=writer, no_dist=True)
        assert saves.latest().step == 12
        for wrong, why in [({"checkpoint_id": "step"}, "number of the step"), ({}, "needs its step")]:
            with pytest.raises((ashore.InvalidError, CheckpointException), match=why):
                dcp.save(
                    {"a": torch.ones(3)}, storage_writer=ashore.torch.StorageWriter(saves), no_dist=True, **wrong
                )


def test_a_save_that_fails_says_so(tmp_path):
    with executor(tmp_path) as saves:
        ashore.torch.Stager(saves, 4).stage({"a": torch.ones(3)})
        saves.latest()
        again = ashore.torch.private.Executor(saves)
        again.execute_save({"a": torch.ones(3)}, checkpoint_id=4).result(timeout=60)
        staged = concurrent.futures.Future()
        done = again.execute_save(staged, checkpoint_id=5)
        staged.set_exception(RuntimeError("staging failed"))
        with pytest.raises(RuntimeError, match="staging failed"):
            done.result(timeout=60)
        with pytest.raises(ashore.InvalidError, match="asks no planner"):
            again.execute_save({}, checkpoint_id=6, planner=dcp.DefaultSavePlanner())
    with pytest.raises(ashore.ClosedError):
        again.execute_save({"a": torch.ones(3)}, checkpoint_id=7)


@pytest.mark.parametrize("how", ["save", "async_save", "private"])
def test_a_save_that_the_policy_skips_is_an_error(tmp_path, monkeypatch, how):
    """While a large step is written, DCP saves the next: a program must not take that for durable."""
    with executor(tmp_path, overlap="skip") as saves:
        skips_saves(saves, monkeypatch)
        state, writer = {"a": torch.ones(3)}, ashore.torch.StorageWriter(saves, 2)
        with pytest.raises((ashore.InvalidError, CheckpointException), match="left out the save.*step=2"):
            if how == "save":
                dcp.save(state, storage_writer=writer, no_dist=True)
            elif how == "async_save":
                dcp.async_save(state, storage_writer=writer, no_dist=True).result(timeout=60)
            else:
                ashore.torch.private.Executor(saves).execute_save(state, checkpoint_id=2).result(timeout=60)
        saves.shutdown()
        assert saves.catalog.steps() == [1]


@pytest.fixture
def two_ranks():
    """This process as rank 0 of two, whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


def test_the_private_executor_refuses_several_ranks(tmp_path, two_ranks):
    """It asks no planner and gathers nothing, so each rank would take its own part for the checkpoint."""
    with executor(tmp_path) as saves:
        private = ashore.torch.private.Executor(saves)
        for group in ({}, {"process_group": torch.distributed.group.WORLD}):
            with pytest.raises(ashore.InvalidError, match="one rank.*StorageWriter"):
                private.execute_save({"a": torch.ones(3)}, checkpoint_id=1, **group)
        assert saves.latest() is None
        private.execute_save({"a": torch.ones(3)}, checkpoint_id=1, no_dist=True).result(timeout=60)
        assert saves.latest().step == 1


def test_installed_saves_of_several_ranks_go_their_way(tmp_path, monkeypatch, two_ranks):
    taken = []

    class Threads:
        def execute_save(self, staged, **options):
            taken.append(options["storage_writer"])

    monkeypatch.setattr(ashore.torch.private._saver, ashore.torch.private._CLASS, Threads)
    with executor(tmp_path) as saves:
        installed = ashore.torch.private.install(saves)
        writers = [ashore.torch.StorageWriter(saves, step) for step in (1, 2)]
        of_torch = getattr(ashore.torch.private._saver, ashore.torch.private._CLASS)()
        of_torch.execute_save({"a": torch.ones(3)}, storage_writer=writers[0], process_group=None)
        of_torch.execute_save({"a": torch.ones(3)}, storage_writer=writers[1], no_dist=True).result(timeout=60)
        installed.remove()
        assert taken == writers[:1] and saves.catalog.steps() == [2]


def test_other_versions_of_torch_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "__version__", "2.12.0")
    with executor(tmp_path) as saves, pytest.raises(ImportError, match="2.11 torch=2.12.0"):
        ashore.torch.private.install(saves)
