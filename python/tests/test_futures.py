"""Waiting: futures, callbacks, asyncio, deadlines, signals. Threads exist only when they are needed."""

import asyncio
import concurrent.futures
import sys
import threading
import time

import pytest
import torch
from conftest import SMALL

import ashore


def notifiers():
    return [thread for thread in threading.enumerate() if thread.name == "ashore-notifier"]


def test_results_need_no_thread(python, root):
    python(
        """
        import sys, threading, ashore, torch
        with ashore.CheckpointExecutor(sys.argv[1], **SMALL) as executor:
            save = executor.save(1, {"a": torch.ones(4)})
            assert save.staged.result() is None and save.durable.result().step == 1
            assert save.staged.done() and save.durable.done() and not save.durable.running()
            assert save.durable.exception() is None and save.wait().step == 1
            assert threading.active_count() == 1, threading.enumerate()
            save.durable.add_done_callback(lambda future: None)
            assert threading.active_count() == 2
        """,
        root,
    )


def test_futures_are_real_ones(executor):
    saves = [executor.save(step, {"a": torch.ones(4)}) for step in range(1, 4)]
    futures = [future for save in saves for future in (save.staged, save.durable)]
    assert all(isinstance(future, concurrent.futures.Future) for future in futures)
    done, left = concurrent.futures.wait(futures, timeout=60)
    assert len(done) == 6 and not left
    assert [future.result().step for future in futures[1::2]] == [1, 2, 3]
    assert len(list(concurrent.futures.as_completed(futures, timeout=60))) == 6
    assert len(notifiers()) == 1
    assert not futures[0].cancel() and not futures[0].cancelled()


def test_callbacks_get_the_future_once(executor):
    seen, gate = [], threading.Event()

    def callback(future):
        seen.append((future.result().step, threading.current_thread().name))
        gate.set()

    executor.save(1, {"a": torch.ones(4)}).durable.add_done_callback(callback)
    assert gate.wait(60)
    assert seen == [(1, "ashore-notifier")]
    future = executor.save(2, {"a": torch.ones(4)}).durable
    future.result()
    concurrent.futures.wait([future], timeout=60)
    late = []
    future.add_done_callback(late.append)
    assert late == [future]


def test_an_exception_in_a_callback_is_unraisable_and_loses_nothing(executor, monkeypatch):
    seen, gate = [], threading.Event()
    monkeypatch.setattr(sys, "unraisablehook", lambda args: seen.append(args.exc_value))
    future = executor.save(1, {"a": torch.ones(4)}).durable
    future.add_done_callback(lambda _: 1 / 0)
    future.add_done_callback(lambda _: gate.set())
    assert gate.wait(60) and [type(error) for error in seen] == [ZeroDivisionError]
    assert executor.save(2, {"a": torch.ones(4)}).durable.result().step == 2


def test_a_failure_reaches_every_way_of_waiting(executor):
    executor.save(1, {"a": torch.ones(4)}).wait()
    save = executor.save(1, {"a": torch.ones(4)})
    gate = threading.Event()
    save.durable.add_done_callback(lambda _: gate.set())
    assert gate.wait(60)
    for failing in (save.wait, save.durable.result, lambda: asyncio.run(wait_for(save))):
        with pytest.raises(ashore.ConflictError):
            failing()
    assert isinstance(save.durable.exception(), ashore.ConflictError)
    executor.save(2, {"a": torch.ones(4)}).wait()


def test_a_look_at_a_future_does_not_see_its_error(executor):
    """`done`, `running` and `repr` took the error of the save, and no later call raised it."""
    executor.save(1, {"a": torch.ones(4)}).wait()
    save = executor.save(1, {"a": torch.ones(4)})
    durable, staged = save.durable, save.staged
    until = time.monotonic() + 60
    while not durable.done() and time.monotonic() < until:
        time.sleep(0.001)
    assert durable.done() and not durable.running() and staged.done()
    assert repr(durable) == "<ashore.SaveFuture of=durable step=1 phase=ended>"
    with pytest.raises(ashore.ConflictError) as error:
        executor.save(2, {"a": torch.ones(4)})
    assert error.value.step == 1
    assert "of=staged step=3" in repr(executor.save(3, {"a": torch.ones(4)}).staged)


async def wait_for(save):
    return await save


def test_asyncio_runs_on_while_a_save_is_awaited(executor):
    async def main():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        one = executor.save(1, {"a": torch.rand(1 << 20)})
        await asyncio.wrap_future(one.staged)
        found = await asyncio.gather(one, executor.save(2, {"a": torch.rand(1 << 20)}))
        ticking.cancel()
        return [committed.step for committed in found], ticks

    steps, ticks = asyncio.run(main())
    assert steps == [1, 2] and ticks > 1


def test_a_task_that_is_cancelled_leaves_the_save(executor):
    async def main():
        save = executor.save(1, {"a": torch.rand(1 << 20)})
        task = asyncio.create_task(wait_for(save))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return save

    assert asyncio.run(main()).wait().step == 1


def test_a_deadline_of_a_wait_lets_the_save_go_on(executor):
    save = executor.save(1, {"a": torch.rand(4 << 20)})
    with pytest.raises(ashore.DeadlineError) as error:
        save.wait(0.0)
    assert isinstance(error.value, TimeoutError) and error.value.step == 1
    with pytest.raises(TimeoutError):
        save.durable.result(0.0)
    assert save.wait(60.0).step == 1


def test_a_save_that_is_cancelled_says_so(executor):
    save = executor.save(1, {"a": torch.rand(4 << 20)})
    if save.cancel():
        with pytest.raises(ashore.CancelledError):
            save.wait()
    else:
        assert save.wait().step == 1
    assert not save.cancel()
    executor.fence()


def test_a_save_that_the_policy_skips_has_no_outcome(root):
    with ashore.CheckpointExecutor(root, overlap="skip", **SMALL) as executor:
        saves = [executor.save(step, {"a": torch.rand(100)}) for step in range(1, 20)]
        ended = [save.wait() for save in saves]
        assert ended[0].step == 1 and None in ended
        assert saves[ended.index(None)].durable.result() is None


def test_progress_ends_with_everything_written(executor):
    save = executor.save(1, {"a": torch.rand(1 << 20)})
    assert save.progress().bytes == 4 << 20
    save.wait()
    progress = save.progress()
    assert progress.phase == "ended" and progress.staged >= 4 << 20 and progress.written == progress.staged
    assert "step=1" in repr(save)


@pytest.mark.parametrize("wait", ["wait", "staged", "fence", "shutdown"])
def test_threads_of_python_run_while_one_waits(root, wait):
    executor = ashore.CheckpointExecutor(root, writers=1, direct=False, **SMALL)
    ticks, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    save = executor.save(1, {"a": torch.ones(64 << 20)})
    before, begin = ticks[0], time.monotonic()
    {"wait": save.wait, "staged": save.staged.result, "fence": executor.fence, "shutdown": executor.shutdown}[wait]()
    ran, waited = ticks[0] - before, time.monotonic() - begin
    stop.set()
    thread.join()
    executor.shutdown()
    # A wait that keeps the GIL lets the thread run at its beginning and at its end.
    assert ran > 5, (ran, waited)
