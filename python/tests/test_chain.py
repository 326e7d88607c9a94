"""Published versions: what a publisher writes is what followers have, bit for bit, and what they refuse."""

import os
import pathlib
import signal
import threading
import time

import ml_dtypes
import numpy
import pytest
import torch
from test_process import start

import ashore
from ashore.chain import Follow, Publisher


@pytest.fixture
def publisher(root):
    with Publisher(root, arena=4 << 20) as publisher:
        yield publisher


def put(publisher, state, **values):
    return publisher.publish(state, values=values).wait(60)


def bits(state):
    """The bytes of each tensor."""
    flat = lambda tensor: torch.as_tensor(tensor).detach().contiguous().reshape(-1).view(torch.uint8)
    return {name: flat(tensor).numpy().tobytes() for name, tensor in state.items()}


def all_dtypes():
    """Tensors of every width, with NaNs whose payloads differ, both zeros, and infinities."""
    chance = numpy.random.default_rng(1)
    raw = chance.integers(0, 256, 8000, dtype=numpy.uint8)
    names = ["uint8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "float8_e4m3fn"]
    return {name: torch.from_numpy(raw.copy()).view(getattr(torch, name)).reshape(10, -1) for name in names}


@pytest.mark.parametrize("form", ["packed", "indices", "zstd"])
def test_every_bit_of_every_dtype_arrives(root, form):
    state = all_dtypes()
    state["head"] = state["bfloat16"]
    chance = numpy.random.default_rng(2)
    with Publisher(root, arena=4 << 20, form=form) as publisher:
        assert put(publisher, state, step=10).kind == "full"
        follows = {switch: Follow(root, switch=switch) for switch in ("in_place", "double")}
        for follow in follows.values():
            assert follow.advance(60) == 1
        for turn in range(2, 6):
            before = {name: tensor.clone() for name, tensor in state.items()}
            for name, tensor in state.items():
                # One tensor does not change.
                if name not in ("head", "int64"):
                    flat = tensor.reshape(-1).view(torch.uint8).numpy()
                    flat[chance.integers(0, flat.size, 20)] ^= 0x81
            # And one does as a whole.
            state["int16"].copy_(torch.from_numpy(chance.integers(-9, 9, state["int16"].shape)))
            published = put(publisher, state, step=10 * turn, name="name\u00e9")
            assert (published.version, published.kind, published.base) == (turn, "delta", turn - 1)
            for switch, follow in follows.items():
                update = follow.next(60)
                assert (update.version, update.is_full) == (turn, False)
                assert update.values() == {"step": 10 * turn, "name": "name\u00e9"}
                served = {name: tensor.clone() for name, tensor in before.items()}
                for change in update.changes():
                    indices, values = change.arrays()
                    at = served[change.name].view(-1).view(torch.uint8).numpy().view(values.dtype)
                    assert change.is_whole is (indices is None)
                    at[slice(None) if indices is None else indices] = values
                served["head"] = served["bfloat16"]
                assert bits(served) == bits(state)
                assert follow.apply(update) == turn == follow.version
                read = {name: torch.empty_like(tensor) for name, tensor in state.items() if name != "head"}
                follow.read_into({**read, "head": read["bfloat16"]})
                assert bits(read) == bits({name: state[name] for name in read})
                follow.verify()
                assert follow.read("bfloat16").dtype == ml_dtypes.bfloat16
        weights = follows["double"].weights()
        assert {name: array.tobytes() for name, array in weights.items()} == bits(state)


def test_readers_keep_their_version_and_copy_nothing(root, publisher):
    array = numpy.arange(100_000, dtype="float32")
    put(publisher, {"w": array})
    follow = Follow(root, switch="double")
    assert len(follow.weights()) == 0 and follow.weights().version is None
    follow.advance(60)
    first = follow.weights()
    view = first["w"]
    del first
    assert not view.flags.writeable and not view.flags.owndata
    assert numpy.shares_memory(view, follow.weights()["w"])
    for turn in range(2, 8):
        array[turn] = -1.0
        put(publisher, {"w": array})
        assert follow.advance(60) == turn == follow.weights().version
        # The array alone keeps the version.
        assert (view == numpy.arange(100_000)).all()
        assert follow.weights()["w"].tobytes() == array.tobytes()
    with pytest.raises(ashore.NotFoundError, match="tensor='v'"):
        follow.weights()["v"]


def test_readers_in_threads_never_see_a_part_of_a_version(root, publisher):
    array = numpy.zeros(20_000, dtype="float32")
    put(publisher, {"w": array})
    follow = Follow(root, switch="double", poll_every=0.01)
    follow.advance(60)
    ended, looks = threading.Event(), []

    def look():
        while not ended.is_set():
            weights = follow.weights()
            looks.append((weights.version, set(numpy.unique(weights["w"]).tolist())))

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    for turn in range(2, 30):
        array[:] = turn
        put(publisher, {"w": array})
        assert follow.advance(60) == turn
    ended.set()
    for reader in readers:
        reader.join()
    assert all(found == {float(version) if version > 1 else 0.0} for version, found in looks) and looks


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = torch.nn.Embedding(50, 16, dtype=torch.bfloat16)
        self.head = torch.nn.Linear(16, 50, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.wte.weight
        self.register_buffer("empty", torch.empty(0, 4))


def test_a_module_with_tied_weights_is_followed_in_place(root, publisher):
    trained, served = Tied(), Tied()
    put(publisher, trained.state_dict())
    follow = Follow(root, targets=served.state_dict())
    where = served.wte.weight.data_ptr()
    for turn in range(1, 4):
        assert follow.advance(60) == turn
        assert bits(served.state_dict()) == bits(trained.state_dict())
        assert served.wte.weight.data_ptr() == where == served.head.weight.data_ptr()
        with torch.no_grad():
            trained.head.weight[turn] += 1.0
        put(publisher, trained.state_dict())


def test_targets_that_do_not_fit_are_refused_and_not_touched(root, publisher):
    state = {"a": torch.ones(4, 6), "b": torch.ones(3)}
    put(publisher, state)
    read_only = numpy.zeros(3, "float32")
    read_only.flags.writeable = False
    whole = torch.zeros(30)
    refused_at_once = {
        "packed": {"a": torch.zeros(6, 4).T},
        "read-only": {"b": read_only},
        "share memory": {"a": whole[:24].view(4, 6), "b": whole[22:25]},
        "not a tensor|neither a tensor": {"b": object()},
    }
    for text, targets in refused_at_once.items():
        with pytest.raises(ashore.InvalidError, match=text) as caught:
            Follow(root, targets=targets)
        assert caught.value.tensor in ("a", "b"), caught.value
    one = torch.zeros(4, 6)
    refused_by_the_version = {
        "no memory is lent": {"a": torch.zeros(4, 6)},
        "another dtype or shape": {"a": torch.zeros(6, 4), "b": torch.zeros(3)},
        "does not have a tensor": {"a": torch.zeros(4, 6), "b": torch.zeros(3), "c": torch.zeros(1)},
    }
    for text, targets in refused_by_the_version.items():
        follow = Follow(root, targets=targets)
        with pytest.raises(ashore.InvalidError, match=text) as caught:
            follow.advance(60)
        assert caught.value.step == 1 and caught.value.tensor, caught.value
        assert follow.version is None and all(not tensor.any() for tensor in targets.values())
    assert Follow(root, targets={"a": one}, strict=False).advance(60) == 1 and one.all()


def test_memory_lent_for_two_tensors_that_the_chain_has_apart_is_refused(root, publisher):
    put(publisher, {"a": torch.ones(6), "b": torch.full((6,), 2.0)})
    memory = torch.zeros(6)
    follow = Follow(root, targets={"a": memory, "b": memory})
    with pytest.raises(ashore.InvalidError, match="apart"):
        follow.advance(60)
    assert not memory.any()


def test_a_damaged_version_is_refused_and_a_later_full_is_taken(root):
    array, served = numpy.ones(1000, "float32"), numpy.zeros(1000, "float32")
    with Publisher(root, arena=4 << 20, full_every=2, grace=9) as publisher:
        put(publisher, {"w": array})
        follow = Follow(root, targets={"w": served})
        follow.advance(60)
        array[3] = 5.0
        path = pathlib.Path(put(publisher, {"w": array}).path)
        file = path / "delta.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        with pytest.raises(ashore.DamagedError) as caught:
            follow.advance(60)
        assert (caught.value.step, caught.value.tensor) == (2, "w") and str(path) in caught.value.path
        assert (served == 1.0).all() and follow.version == 1
        array[4] = 6.0
        put(publisher, {"w": array})
        put(publisher, {"w": array})
    assert follow.advance(60) >= 3
    assert served.tobytes() == array.tobytes()


def test_an_executor_publishes_beside_its_saves(root, executor, tmp_path):
    chain, weights = tmp_path / "chain", torch.ones(1000)
    saves = []
    with Publisher(chain) as publisher:
        for turn in range(1, 4):
            executor.fence()
            weights += 1.0
            saves.append(executor.save(turn, {"w": weights}))
            publish = executor.publish_delta(publisher, {"w": weights}, values={"turn": turn})
        assert publish.wait(60).version == 3 == publish.version == publisher.newest
    assert [save.wait(60).step for save in saves] == executor.catalog.steps() == [1, 2, 3]
    follow = Follow(f"file://{chain}", copy_to=tmp_path / "own")
    assert follow.advance(60) == 3 and (follow.read("w") == 4.0).all()
    # The own copy is enough to start again.
    again = Follow(chain, copy_to=tmp_path / "own")
    assert again.version == 3 and again.names() == ["w"]


def test_a_second_publisher_ends_the_first(root, publisher):
    put(publisher, {"w": torch.ones(8)})
    with Publisher(root, arena=4 << 20) as second:
        assert second.newest == 1
        put(second, {"w": torch.zeros(8)})
        with pytest.raises(ashore.ConflictError):
            put(publisher, {"w": torch.ones(8)})


def test_a_publish_can_be_awaited_and_calls_back(root, publisher):
    import asyncio

    async def main():
        publish = publisher.publish({"w": torch.ones(1000)})
        called = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()
        publish.durable.add_done_callback(lambda done: loop.call_soon_threadsafe(called.set_result, done.result()))
        await asyncio.wrap_future(publish.staged)
        return await publish, await called

    one, other = asyncio.run(main())
    assert one == other and one.kind == "full" and one.path == root / "v-00000001"
    with pytest.raises(ashore.InvalidError) as caught:
        publisher.publish({"w": torch.ones(8).to_sparse()})
    assert caught.value.tensor == "w"
    publisher.close()
    publisher.close()
    with pytest.raises(ashore.ClosedError):
        publisher.publish({"w": torch.ones(8)})


def test_a_program_that_ends_publishes_what_it_began(python, root):
    python(
        """
        import sys, torch, ashore.chain
        publisher = ashore.chain.Publisher(sys.argv[1])
        publisher.publish({"w": torch.ones(1 << 22)})
        """,
        root,
    )
    follow = Follow(root)
    assert follow.advance(60) == 1 and follow.read("w").sum() == 1 << 22


def test_versions_travel_while_a_thread_holds_the_gil(tmp_path, root):
    """A thread in C holds the GIL for 6 seconds, in which a publish becomes durable and a follower has it."""
    process = start(
        tmp_path,
        """
        import ctypes, sys, time, torch, ashore.chain
        publisher = ashore.chain.Publisher(sys.argv[1])
        publisher.publish({"w": torch.zeros(1 << 20)}).wait()
        begin = time.monotonic()
        publisher.publish({"w": torch.ones(1 << 20)})
        print(begin, flush=True)
        ctypes.PyDLL(None).usleep(6_000_000)  # a PyDLL keeps the GIL during a call
        print(time.monotonic(), flush=True)
        """,
        root,
    )
    begin = float(process.stdout.readline())
    follow = Follow(root, poll_every=0.01)
    while follow.advance(60) != 2:
        pass
    reached = time.monotonic()
    end = float(process.stdout.readline())
    assert process.wait(60) == 0, process.stderr.read()
    assert end - begin >= 5.9 and reached < end - 0.2, (begin, reached, end)


def interrupt(sent):
    time.sleep(0.02)
    sent.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)


def test_signals_interrupt_a_wait_for_a_version_within_50_ms(root, publisher):
    array = numpy.zeros(1000, "float32")
    put(publisher, {"w": array})
    follow = Follow(root, targets={"w": numpy.zeros(1000, "float32")})
    follow.advance(60)
    took = []
    for turn in range(7):
        sent = []
        thread = threading.Thread(target=interrupt, args=[sent])
        with pytest.raises(KeyboardInterrupt):
            thread.start()
            follow.next()
        took.append(time.monotonic() - sent[0])
        thread.join()
        # The next call waits for the one that was left.
        assert follow.next(0.0) is None
    # The median: a machine with other work delays single ones.
    assert sorted(took)[3] < 0.05, took
    array[0] = 1.0
    put(publisher, {"w": array})
    assert follow.advance(60) == 2


def test_a_follower_is_used_by_one_thread_and_one_process(root, publisher):
    put(publisher, {"w": numpy.zeros(10)})
    follow = Follow(root, switch="double")
    follow.advance(60)

    def wait():
        while True:
            try:
                return follow.next(60)
            except ashore.BusyError:
                pass

    waiting = threading.Thread(target=wait)
    waiting.start()
    with pytest.raises(ashore.BusyError):
        while True:
            follow.verify()
    assert follow.version == 1 == follow.weights().version
    put(publisher, {"w": numpy.ones(10)})
    waiting.join()
    child = os.fork()
    if child == 0:
        kinds = []
        for call in (lambda: follow.next(0.0), lambda: publisher.publish({"w": numpy.zeros(10)})):
            try:
                call()
            except ashore.ClosedError as error:
                kinds.append(error.kind)
        os._exit(0 if kinds == ["closed", "closed"] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert follow.advance(60) == 2


def test_an_update_is_applied_once_and_to_its_own_weights(root, publisher):
    put(publisher, {"w": numpy.zeros(10)})
    one, other = Follow(root), Follow(root)
    one.advance(60)
    array = numpy.ones(10)
    put(publisher, {"w": array})
    update = one.next(60)
    with pytest.raises(ashore.InvalidError, match="other weights"):
        other.apply(update)
    update = one.next(60)
    assert one.apply(update) == 2
    for call in (one.apply, lambda update: update.values(), lambda update: update.changes()):
        with pytest.raises(ashore.InvalidError, match="once"):
            call(update)
