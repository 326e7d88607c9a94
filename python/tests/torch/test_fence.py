"""The fence before the optimizer: in the hook of one, of several, of all."""

import gc
import os
import warnings

import ashore
import ashore.torch
import pytest
import torch
from helpers import bits, executor
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks


def large():
    """More than the arena: only a part of it can be staged before writers have written."""
    net = nn.Linear(1024, 8192)
    net.weight.grad, net.bias.grad = torch.ones_like(net.weight), torch.ones_like(net.bias)
    return net


def saved_as(tmp_path, step, net):
    read = torch.empty_like(net.weight)
    ashore.Catalog(tmp_path).checkpoint(step).read_into({"net.weight": read}, strict=False)
    return bits(read[::512])


@pytest.mark.parametrize("of", ["SGD", "AdamW", "Adafactor", "RMSprop"])
@pytest.mark.parametrize("given", [True, False], ids=["this optimizer", "all optimizers"])
def test_a_step_waits_until_the_save_has_read(tmp_path, of, given):
    net = large()
    with executor(tmp_path, detect="all") as saves:
        optimizer = getattr(torch.optim, of)(net.parameters(), lr=0.1)
        state = ashore.torch.state(net=net, optimizer=optimizer)
        with ashore.torch.fence_before(saves, *([optimizer] if given else [])):
            for step in (1, 2, 3):
                expected = bits(net.weight[::512])
                save = ashore.torch.save(saves, step, state)
                optimizer.step()
                # The engine compares digests itself: a step that did not wait fails the save.
                save.wait()
                assert saved_as(tmp_path, step, net) == expected != bits(net.weight[::512])


class Counts:
    """An executor that counts fences."""

    fences = 0

    def fence(self):
        self.fences += 1


def stepped(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def sgd():
    return torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)


def test_only_the_given_optimizers_fence():
    counts, one, two, other = Counts(), sgd(), sgd(), sgd()
    handle = ashore.torch.fence_before(counts, one, two)
    for optimizer in (one, two, other):
        stepped(optimizer)
    assert counts.fences == 2
    handle.remove()
    handle.remove()
    stepped(one)
    assert counts.fences == 2


def test_without_optimizers_all_fence_later_ones_too():
    counts, early = Counts(), sgd()
    with ashore.torch.fence_before(counts):
        stepped(early)
        stepped(sgd())
        assert counts.fences == 2
    stepped(early)
    assert counts.fences == 2


@pytest.mark.parametrize("given", [True, False], ids=["this optimizer", "all optimizers"])
def test_the_hook_of_an_executor_that_is_gone_does_nothing_and_is_removed_by_the_next(given):
    """A program makes a second executor, drops the first, and steps: torch iterates over both hooks."""
    optimizer = sgd()
    optimizers = [optimizer] if given else []
    hooks = optimizer._optimizer_step_pre_hooks if given else _global_optimizer_pre_hooks
    before = len(hooks)
    first, second, third = Counts(), Counts(), Counts()
    ashore.torch.fence_before(first, *optimizers)
    with ashore.torch.fence_before(second, *optimizers):
        del first
        gc.collect()
        stepped(optimizer)
        assert second.fences == 1
        with ashore.torch.fence_before(third, *optimizers):
            assert len(hooks) == before + 2
            stepped(optimizer)
            assert (second.fences, third.fences) == (2, 1)
    assert len(hooks) == before


def test_an_executor_may_end_within_another_hook():
    counts, optimizer = Counts(), sgd()
    held = [Counts()]
    optimizer.register_step_pre_hook(lambda *_: held.clear())
    ashore.torch.fence_before(held[0], optimizer)
    with ashore.torch.fence_before(counts, optimizer):
        stepped(optimizer)
    assert not held and counts.fences == 1


@pytest.mark.parametrize("given", [True, False], ids=["this optimizer", "all optimizers"])
def test_training_goes_on_after_the_executor_was_shut_down(tmp_path, given):
    """The last epochs of a program that keeps no more checkpoints, and still holds its executor."""
    optimizer = sgd()
    optimizers = [optimizer] if given else []
    hooks = optimizer._optimizer_step_pre_hooks if given else _global_optimizer_pre_hooks
    with executor(tmp_path) as saves:
        handle = ashore.torch.fence_before(saves, *optimizers)
        stepped(optimizer)
    for _ in range(2):
        stepped(optimizer)
    assert optimizer.param_groups[0]["params"][0].tolist() == pytest.approx([-0.3, -0.3])
    number = len(hooks)
    ashore.torch.fence_before(Counts(), *optimizers).remove()
    assert len(hooks) == number - 1
    handle.remove()


@pytest.mark.parametrize("ends_first", [False, True], ids=["open at the fork", "shut down before"])
def test_in_a_forked_child_the_step_raises(tmp_path, ends_first):
    optimizer = sgd()
    with executor(tmp_path) as saves, ashore.torch.fence_before(saves, optimizer):
        if ends_first:
            saves.shutdown()
        child = os.fork()
        if child == 0:
            try:
                stepped(optimizer)
            except ashore.ClosedError as error:
                os._exit(3 if "in a forked child: make a new one there" in str(error) else 4)
            finally:
                os._exit(5)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


class Wrapper(torch.optim.Optimizer):
    """As accelerate's: an optimizer that never ran the constructor."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


def test_wrappers_are_unwrapped_and_others_refused():
    counts, optimizer = Counts(), sgd()
    ashore.torch.fence_before(counts, Wrapper(optimizer))
    stepped(optimizer)
    assert counts.fences == 1
    with pytest.raises(TypeError, match="type=Linear"):
        ashore.torch.fence_before(counts, nn.Linear(1, 1))


def test_an_error_of_the_fence_stops_the_step():
    class Fails:
        def fence(self):
            raise ashore.DeadlineError("late", "deadline")

    fails, optimizer = Fails(), sgd()
    with ashore.torch.fence_before(fails, optimizer), pytest.raises(ashore.DeadlineError):
        stepped(optimizer)
    assert optimizer.param_groups[0]["params"][0].tolist() == [0.0, 0.0]


def test_a_step_that_the_scaler_skips_does_not_fence():
    counts, optimizer = Counts(), sgd()
    scaler = torch.amp.GradScaler("cpu")
    parameter = optimizer.param_groups[0]["params"][0]
    with ashore.torch.fence_before(counts, optimizer):
        for factor in (float("inf"), 1.0):
            optimizer.zero_grad()
            (scaler.scale(parameter.sum()) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            assert counts.fences == (factor == 1.0)


def test_a_capture_is_seen_and_told_once(monkeypatch):
    counts, optimizer = Counts(), sgd()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with ashore.torch.fence_before(counts, optimizer):
        with pytest.warns(RuntimeWarning, match="before graph.replay"):
            stepped(optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            stepped(optimizer)
    assert counts.fences == 0
