"""What torch's own tests ask of a storage writer and reader, a stager and an executor, asked of ours, in one process.

docs/torch.md lists those of torch's tests that have no counterpart here, and why.
"""

import concurrent.futures
import gc
import weakref

import ashore
import ashore.torch
import ashore.torch.private
import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import bits, executor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner, _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict, _load_state_dict_from_keys


def save(saves, step, state, **options):
    dcp.save(state, storage_writer=ashore.torch.StorageWriter(saves, step), no_dist=True, **options)


def load(saves, step, state, **options):
    dcp.load(state, storage_reader=ashore.torch.StorageReader(saves.checkpoint(step)), no_dist=True, **options)
    return state


class Blob:
    """An object with a state of its own."""

    def __init__(self, data):
        self.data, self.loads = data, 0

    def state_dict(self):
        return {"blob": self.data}

    def load_state_dict(self, state):
        self.data, self.loads = state["blob"], self.loads + 1


@pytest.mark.parametrize("writers", [1, 2])
def test_a_module_is_loaded_into_another_in_place(tmp_path, writers):
    module = lambda: torch.nn.ModuleDict({"a": torch.nn.Linear(5, 5), "b": torch.nn.EmbeddingBag(5, 10)})  # noqa: E731
    saved, target = module().state_dict(), module().state_dict()
    before = {name: tensor.data_ptr() for name, tensor in target.items()}
    assert bits(dict(saved)) != bits(dict(target))
    with executor(tmp_path, writers=writers) as saves:
        save(saves, 1, saved)
        load(saves, 1, target)
    assert bits(dict(saved)) == bits(dict(target))
    assert before == {name: tensor.data_ptr() for name, tensor in target.items()}


def test_without_a_process_group_nothing_need_be_said(tmp_path):
    """Neither `no_dist` nor a group: torch warns and saves for one rank."""
    with executor(tmp_path) as saves:
        dcp.save({"a": torch.ones(3)}, storage_writer=ashore.torch.StorageWriter(saves, 1))
        state = {"a": torch.zeros(3)}
        dcp.load(state, storage_reader=ashore.torch.StorageReader(saves.checkpoint(1)))
        assert torch.equal(state["a"], torch.ones(3))


def test_objects_with_a_state_are_loaded_in_place_and_others_are_replaced(tmp_path):
    class State(dict):
        set = ()

        def __setitem__(self, key, value):
            self.set = (*self.set, key)
            super().__setitem__(key, value)

    blob = Blob(b"saved")
    with executor(tmp_path) as saves:
        save(saves, 1, {"blob": blob, "plain": {"replicated": torch.ones(4), "bytes": [1, 2, 3]}})
        other = Blob(b"")
        state = State(blob=other, plain={"replicated": torch.zeros(4), "bytes": [0]})
        load(saves, 1, state)
    assert state["blob"] is other and (other.data, other.loads) == (b"saved", 1)
    assert "blob" not in state.set and state["plain"]["bytes"] == [1, 2, 3]
    assert torch.equal(state["plain"]["replicated"], torch.ones(4))


def test_a_saved_tensor_is_not_loaded_as_an_object(tmp_path):
    with executor(tmp_path) as saves:
        save(saves, 1, {"a": torch.ones(3)})
        with pytest.raises(CheckpointException):
            load(saves, 1, {"a": [1]})


def test_part_of_a_step_is_loaded_by_keys(tmp_path):
    moments = {"state": {"w": {"exp_avg": torch.rand(4, 3)}}, "lr": 0.5}
    saved = {"model": {"w": torch.rand(4, 3), "b": torch.rand(3)}, "optimizer": moments}
    with executor(tmp_path) as saves:
        save(saves, 1, saved)
        part = load(saves, 1, {"model": {"w": torch.zeros(4, 3)}})
        assert bits(part["model"]["w"]) == bits(saved["model"]["w"])
        # Without a state to load into: from what the reader says of the step.
        reader = lambda: ashore.torch.StorageReader(saves.checkpoint(1))  # noqa: E731
        model = _load_state_dict_from_keys("model", storage_reader=reader())
        assert bits(model) == bits({"model": saved["model"]})
        moments = _load_state_dict_from_keys("optimizer.state", storage_reader=reader())
        assert bits(moments) == bits({"optimizer": {"state": saved["optimizer"]["state"]}})
        everything = {}
        _load_state_dict(everything, storage_reader=reader(), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
        assert bits(everything) == bits(saved)


def test_a_partial_load_leaves_what_the_step_lacks(tmp_path):
    with executor(tmp_path) as saves:
        save(saves, 1, {"a": torch.ones(3)})
        with pytest.raises(CheckpointException):
            load(saves, 1, {"a": torch.zeros(3), "b": torch.full((2,), 7.0)})
        planner = DefaultLoadPlanner(allow_partial_load=True)
        state = load(saves, 1, {"a": torch.zeros(3), "b": torch.full((2,), 7.0)}, planner=planner)
        assert state["a"].tolist() == [1.0] * 3 and state["b"].tolist() == [7.0] * 2


@pytest.mark.parametrize("flat", [True, False])
def test_planners_that_do_not_flatten_keep_trees_as_objects(tmp_path, flat):
    saved = {"a": torch.rand(3), "tree": {"b": [1, {"c": 2}]}}
    with executor(tmp_path) as saves:
        save(saves, 1, saved, planner=DefaultSavePlanner(flatten_state_dict=flat))
        state = {"a": torch.zeros(3), "tree": {"b": [0, {"c": 0}]}}
        load(saves, 1, state, planner=DefaultLoadPlanner(flatten_state_dict=flat, flatten_sharded_tensors=False))
        assert bits(state) == bits(saved)


def test_planners_that_rename_and_convert_are_asked(tmp_path):
    class Renames(DefaultSavePlanner):
        def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False):
            super().set_up_planner({f"new.{key}": value for key, value in state_dict.items()}, storage_meta, is_coordinator)

    class Halves(DefaultSavePlanner):
        def lookup_object(self, index):
            return super().lookup_object(index).half()

        def create_local_plan(self):
            self.state_dict = {name: tensor.half() for name, tensor in self.state_dict.items()}
            return super().create_local_plan()

    class Adds(DefaultLoadPlanner):
        def commit_tensor(self, read_item, tensor):
            tensor.add_(1)

    with executor(tmp_path) as saves:
        save(saves, 1, {"a": torch.ones(3)}, planner=Renames())
        assert saves.checkpoint(1).names() == ["new.a"]
        save(saves, 2, {"a": torch.full((3,), 1.5)}, planner=Halves())
        assert saves.checkpoint(2).info("a").dtype == "F16"
        state = load(saves, 2, {"a": torch.zeros(3, dtype=torch.float16)}, planner=Adds())
        assert state["a"].tolist() == [2.5] * 3


CALLS = ["reset", "set_up_storage_writer", "prepare_local_plan", "prepare_global_plan", "write_data", "finish"]


@pytest.mark.parametrize("call", CALLS)
def test_a_writer_that_fails_in_any_call_fails_the_save(tmp_path, call):
    def fails(*_, **__):
        raise ValueError(f"failed in {call}")

    with executor(tmp_path) as saves:
        writer = ashore.torch.StorageWriter(saves, 1)
        setattr(writer, call, fails)
        with pytest.raises((CheckpointException, ValueError), match=f"failed in {call}") as failed:
            dcp.save({"a": torch.ones(3), "b": [1, 2]}, storage_writer=writer, checkpoint_id="step-1", no_dist=True)
        if isinstance(failed.value, CheckpointException):
            assert list(failed.value.failures) == [0]
        # `write_data` returns when the step is durable: only what comes after it finds one.
        assert saves.catalog.steps() == ([1] if call == "finish" else [])
        save(saves, 2, {"a": torch.ones(3)})
        assert saves.latest().step == 2


READS = ["read_metadata", "set_up_storage_reader", "prepare_local_plan", "prepare_global_plan", "read_data"]


@pytest.mark.parametrize("call", READS)
def test_a_reader_that_fails_in_any_call_fails_the_load(tmp_path, call):
    def fails(*_, **__):
        raise ValueError(f"failed in {call}")

    with executor(tmp_path) as saves:
        save(saves, 1, {"a": torch.ones(3)})
        reader, state = ashore.torch.StorageReader(saves.latest()), {"a": torch.zeros(3)}
        setattr(reader, call, fails)
        # torch goes on without metadata where it cannot be read.
        said = "metadata is None" if call == "read_metadata" else f"failed in {call}"
        with pytest.raises(CheckpointException, match=said) as failed:
            dcp.load(state, storage_reader=reader, no_dist=True)
        assert list(failed.value.failures) == [0] and state["a"].tolist() == [0.0] * 3
        assert load(saves, 1, state)["a"].tolist() == [1.0] * 3


def test_damaged_bytes_fail_the_load(tmp_path):
    with executor(tmp_path) as saves:
        save(saves, 1, {"a": torch.ones(1000)})
        [shard] = saves.latest().path.glob("*.safetensors")
        data = bytearray(shard.read_bytes())
        data[-5] ^= 1
        shard.write_bytes(data)
        with pytest.raises(CheckpointException) as failed:
            load(saves, 1, {"a": torch.zeros(1000)})
        [(error, _)] = failed.value.failures.values()
        assert isinstance(error, ashore.DamagedError)


def test_a_step_that_exists_is_not_written_again(tmp_path):
    with executor(tmp_path) as saves:
        save(saves, 1, {"a": torch.ones(3)})
        with pytest.raises(CheckpointException) as failed:
            save(saves, 1, {"a": torch.zeros(3)})
        [(error, _)] = failed.value.failures.values()
        assert isinstance(error, ashore.ConflictError) and error.step == 1
        assert load(saves, 1, {"a": torch.zeros(3)})["a"].tolist() == [1.0] * 3


def test_no_writer_or_reader_of_ours_claims_an_id(tmp_path):
    """torch finds the writer for a bare path by asking: ours need an executor, and leave paths to torch's own."""
    assert not ashore.torch.StorageWriter.validate_checkpoint_id(str(tmp_path))
    assert not ashore.torch.StorageReader.validate_checkpoint_id(str(tmp_path))
    dcp.save({"a": torch.ones(3)}, checkpoint_id=str(tmp_path / "own"), no_dist=True)
    assert (tmp_path / "own" / ".metadata").exists()


def test_the_interface_is_the_one_that_torch_declares():
    """A method that torch adds to an interface is found here before a program finds it."""
    from torch.distributed.checkpoint.staging import AsyncStager
    from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

    for ours, of_torch in (
        (ashore.torch.StorageWriter, StorageWriter),
        (ashore.torch.StorageReader, StorageReader),
        (ashore.torch.StorageWriter, AsyncStager),
        (ashore.torch.Stager, AsyncStager),
    ):
        declared = {name for name in vars(of_torch) if callable(getattr(of_torch, name)) and not name.startswith("_")}
        assert all(getattr(ours, name) is not getattr(of_torch, name) for name in declared), (ours, declared)
        assert not getattr(ours, "__abstractmethods__", None)


def test_a_stager_returns_the_state_and_waits_when_it_is_asked(tmp_path):
    # Larger than the arena.
    state = {"a": torch.ones(3 << 20), "b": [1]}
    with executor(tmp_path) as saves:
        stager = ashore.torch.Stager(saves, 1)
        stager.synchronize_staging()  # of nothing
        assert stager.stage(state) is state and not stager.should_synchronize_after_execute
        stager.synchronize_staging()
        state["a"].zero_()
        dcp.save(state, storage_writer=ashore.torch.StorageWriter(saves, 1), no_dist=True)
        stager.close()
        stager.close()
        assert load(saves, 1, {"a": torch.zeros(3 << 20)})["a"].min() == 1


def test_a_stager_is_used_for_one_save_after_another(tmp_path):
    with executor(tmp_path, detect="all") as saves:
        state = {"a": torch.zeros(1000)}
        for step in range(1, 6):
            saves.fence()
            state["a"].fill_(step)
            stager, writer = ashore.torch.Stager(saves, step), ashore.torch.StorageWriter(saves, step)
            done = dcp.async_save(state, storage_writer=writer, async_stager=stager, no_dist=True)
        done.result(timeout=60)
        for step in range(1, 6):
            assert load(saves, step, {"a": torch.zeros(1000)})["a"].unique().tolist() == [step]


def test_views_and_tied_tensors_are_what_they_were(tmp_path):
    base = torch.rand(6, 5)
    saved = {"view": base[1:3, ::2], "turned": base.T, "tied": base, "again": base}
    saved |= {"scalar": base[0, 0], "empty": base[:0]}
    with executor(tmp_path) as saves:
        done = ashore.torch.private.Executor(saves).execute_save(saved, checkpoint_id=1, no_dist=True)
        done.result(timeout=60)
        state = load(saves, 1, {name: torch.zeros(tensor.shape) for name, tensor in saved.items()})
        assert bits(state) == bits(saved)


class TestExecutor:
    def test_a_save_that_fails_does_not_end_the_executor(self, tmp_path):
        with executor(tmp_path) as saves:
            private = ashore.torch.private.Executor(saves)
            save(saves, 1, {"a": torch.ones(3)})
            with pytest.raises(ashore.ConflictError):
                private.execute_save({"a": torch.ones(3)}, checkpoint_id=1, no_dist=True).result(timeout=60)
            private.execute_save({"a": torch.ones(3)}, checkpoint_id=2, no_dist=True).result(timeout=60)
            assert saves.catalog.steps() == [1, 2]

    def test_it_waits_for_a_state_that_is_still_staged(self, tmp_path):
        staged = concurrent.futures.Future()
        with executor(tmp_path) as saves:
            done = ashore.torch.private.Executor(saves).execute_save(staged, checkpoint_id="step-3", no_dist=True)
            assert not done.done() and saves.latest() is None
            staged.set_result({"a": torch.ones(3)})
            assert "a" in done.result(timeout=60).state_dict_metadata
            assert saves.latest().step == 3

    def test_the_state_is_free_when_the_save_has_ended(self, tmp_path):
        class Noticed:
            pass

        noticed = Noticed()
        gone, tensor = weakref.ref(noticed), torch.ones(1000)
        storage = weakref.ref(tensor.untyped_storage())
        with executor(tmp_path) as saves:
            private = ashore.torch.private.Executor(saves)
            tensor.noticed = noticed
            done = private.execute_save({"a": tensor}, checkpoint_id=1, no_dist=True)
            del tensor, noticed
            done.result(timeout=60)
            saves.fence()
            # Owners that threads of the engine dropped are given back by the next call.
            private.execute_save({"b": torch.ones(1)}, checkpoint_id=2, no_dist=True).result(timeout=60)
            gc.collect()
            assert gone() is None and storage() is None

    def test_an_exception_of_a_waiting_program_does_not_end_the_save(self, tmp_path):
        with executor(tmp_path) as saves:
            done = ashore.torch.private.Executor(saves).execute_save({"a": torch.ones(4 << 20)}, checkpoint_id=1, no_dist=True)
            try:
                done.result(timeout=0)
            except concurrent.futures.TimeoutError:
                pass
            done.result(timeout=60)
            assert saves.latest().step == 1
