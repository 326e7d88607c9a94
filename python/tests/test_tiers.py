"""Tiers: roots behind the executor's own, with a future for each."""

import asyncio
import concurrent.futures
import shutil
import threading
import time

import pytest
import torch
from conftest import SMALL

import ashore


def tiered(root, tier, **more):
    return ashore.CheckpointExecutor(root, **SMALL, tiers=[ashore.Tier(tier, name="shared", **more)])


def test_a_step_is_durable_here_first_and_there_second(root, tmp_path):
    tier = tmp_path / "tier"
    with tiered(root, tier, keep_last=2) as executor:
        save = executor.save(1, {"a": torch.arange(4.0)})
        far = save.durable_in("shared")
        assert isinstance(far, concurrent.futures.Future) and "promoted" in repr(far)
        promoted = far.result(60)
        near = save.wait()
        assert far.done() and far.exception() is None
        assert (promoted.tier, promoted.root, promoted.step) == ("shared", tier, 1)
        assert (promoted.attempt, promoted.path) == (near.attempt, tier / "step-00000001")
        assert ashore.latest(tier).tree()["a"].tolist() == [0, 1, 2, 3]
        for step in (2, 3):
            executor.save(step, {"a": torch.arange(4.0)}).durable_in("shared").result(60)
        (report,) = executor.tiers()
        assert (report.tier, report.state, report.newest, report.lacks) == ("shared", "ours", 3, ()), report
        assert executor.latest().tier is None
    assert [entry.step for entry in ashore.Catalog(tier).entries()] == [2, 3]


def test_another_machine_goes_on_from_the_tier(root, tmp_path):
    with ashore.CheckpointExecutor(root, **SMALL, tiers=[tmp_path / "tier"]) as executor:
        executor.save(1, {"a": torch.full((4,), 7.0)})
    with ashore.CheckpointExecutor(tmp_path / "new", **SMALL, tiers=[str(tmp_path / "tier")]) as executor:
        newest = executor.latest()
        assert (newest.step, newest.tier) == (1, str(tmp_path / "tier"))
        assert newest.tree()["a"].tolist() == [7.0] * 4


def test_the_notifier_completes_it(root, tmp_path):
    seen, gate = [], threading.Event()

    def callback(future):
        seen.append((future.result().step, threading.current_thread().name))
        gate.set()

    async def both(save):
        return await save, await asyncio.wrap_future(save.durable_in("shared"))

    with tiered(root, tmp_path / "tier") as executor:
        save = executor.save(1, {"a": torch.ones(4)})
        save.durable_in("shared").add_done_callback(callback)
        near, far = asyncio.run(both(save))
        assert near.attempt == far.attempt
        assert gate.wait(60) and seen[0][0] == 1
        futures = [executor.save(step, {"a": torch.ones(4)}).durable_in("shared") for step in (2, 3)]
        done, left = concurrent.futures.wait(futures, timeout=60)
        assert len(done) == 2 and not left


def test_a_tier_that_is_away_is_waited_for(root, tmp_path):
    tier = tmp_path / "tier"
    executor = tiered(root, tier)
    # Not moved: the executor has it open, and would go on there.
    shutil.rmtree(tier)
    tier.write_text("no directory")
    save = executor.save(1, {"a": torch.ones(4)})
    save.wait()
    far = save.durable_in("shared")
    with pytest.raises(ashore.DeadlineError, match="not durable in the tier"):
        far.result(0.05)
    assert not far.done()
    # The thread that promotes may not have tried yet.
    end = time.monotonic() + 60
    while (report := executor.tiers()[0]).state != "away":
        assert time.monotonic() < end, report
        time.sleep(0.01)
    assert report.error, report
    tier.unlink()
    assert far.result(60).step == 1
    executor.shutdown()


def test_what_is_wrong_is_named(root, tmp_path):
    with tiered(root, tmp_path / "tier") as executor:
        save = executor.save(1, {"a": torch.ones(4)})
        with pytest.raises(ashore.InvalidError, match="other"):
            save.durable_in("other").result(60)
        save.wait()
        again = executor.save(1, {"a": torch.ones(4)})
        with pytest.raises(ashore.ConflictError):
            again.durable_in("shared").result(60)
    with pytest.raises(ashore.InvalidError, match="tiers are a list"):
        ashore.CheckpointExecutor(root, **SMALL, tiers=str(tmp_path))
    with pytest.raises(ashore.InvalidError, match="unpromoted|variant"):
        tiered(root, tmp_path / "tier", unpromoted="never")
    with pytest.raises(ashore.InvalidError, match="keep_last"):
        tiered(root, tmp_path / "tier", keep_last=0)
