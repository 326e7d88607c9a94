"""States: what is saved under which names, and what a restore puts back."""

import sys

import ashore
import ashore.torch
import pytest
import torch
from helpers import Net, bits, executor, train
from torch import nn


def made(seed, **options):
    torch.manual_seed(seed)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, **options)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=50)
    progress = {"epoch": seed, "seen": [1, 2, (3, b"4")], "ema": torch.full((3,), float(seed))}
    state = ashore.torch.state(model=net, optimizer=optimizer, scheduler=scheduler, progress=progress, rng=ashore.torch.Rng())
    return net, optimizer, scheduler, progress, state


def test_names_are_those_of_modules(tmp_path):
    net, optimizer, scheduler, _, state = made(1)
    train(net, optimizer, scheduler=scheduler)
    with executor(tmp_path) as saves:
        ashore.torch.save(saves, 1, state).wait()
        step = saves.latest()
    names = set(step.names())
    assert {f"model.{name}" for name in net.state_dict()} == {name for name in names if name.startswith("model.")}
    assert "optimizer.state.model.conv.weight.exp_avg" in names
    # One of the two names of tied weights has the state, as one of them has the parameter.
    assert "optimizer.state.model.embed.weight.exp_avg" in names
    assert "optimizer.state.model.head.weight.exp_avg" not in names
    assert "progress.ema" in names and step.value("progress.epoch") == 1
    assert [group["params"][0] for group in step.value("optimizer.param_groups")] == ["model.scale"]


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh objects", "used objects"])
def test_a_restored_program_goes_on_bit_for_bit(tmp_path, fresh):
    net, optimizer, scheduler, progress, state = made(1)
    train(net, optimizer, 3, scheduler=scheduler)
    with executor(tmp_path) as saves:
        save = ashore.torch.save(saves, 3, state)
        saves.fence()
        train(net, optimizer, 3, scheduler=scheduler)
        save.wait()
        expected = bits([net.state_dict(), optimizer.state_dict(), scheduler.state_dict()])

        other, other_optimizer, other_scheduler, other_progress, other_state = made(2)
        if not fresh:
            train(other, other_optimizer, 2, scheduler=other_scheduler)
        held = other.head.weight, other.norm.running_mean, other_progress
        keys = ashore.torch.restore(saves.checkpoint(3), other_state)
        assert keys == ashore.torch.IncompatibleKeys([], [])
        assert held[0] is other.embed.weight and held[1] is other.norm.running_mean
        assert held[2] == {"epoch": 1, "seen": [1, 2, (3, b"4")], "ema": other_progress["ema"]}
        assert other_progress["ema"].tolist() == [1.0] * 3
        train(other, other_optimizer, 3, scheduler=other_scheduler)
    assert bits([other.state_dict(), other_optimizer.state_dict(), other_scheduler.state_dict()]) == expected
    assert progress["epoch"] == 1


def test_wrappers_do_not_change_names():
    net = nn.Linear(2, 2)
    plain = ashore.torch.state(m=net).tree()
    assert ashore.torch.state(m=torch.compile(net, backend="eager")).tree().keys() == plain.keys()
    assert list(ashore.torch.state(m=nn.DataParallel(net)).tree()["m"]) == ["weight", "bias"]


def test_the_structure_is_looked_at_again_when_it_changes():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    state = ashore.torch.state(m=net)
    names = lambda: sorted(state.tree()["m"])  # noqa: E731
    before = names()
    net[0].weight = nn.Parameter(torch.ones(2, 2))
    assert names() == before and state.tree()["m"]["0.weight"] is net[0].weight
    net[0] = nn.Linear(2, 2, bias=False)
    assert names() == [name for name in before if name != "0.bias"] and state.tree()["m"]["0.weight"] is net[0].weight
    net[0].bias = nn.Parameter(torch.ones(2))
    assert names() == before
    net[1].running_mean = None
    assert names() == [name for name in before if name != "1.running_mean"]
    net.append(nn.PReLU())
    assert "2.weight" in names()


def test_what_forward_and_schedulers_write_is_captured_in_the_call(tmp_path):
    net = nn.Sequential(nn.Linear(8, 1 << 17), nn.BatchNorm1d(1 << 17))
    lr = torch.tensor(0.5)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, foreach=False)
    net(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    # Far more than the arena: most of it is read after the call.
    large = {"table": torch.zeros(16 << 20)}
    state = ashore.torch.state(net=net, optimizer=optimizer, large=large)
    with executor(tmp_path) as saves:
        averages = bits(net[1].running_mean)
        save = ashore.torch.save(saves, 1, state)
        # No fence: only the optimizer may not step yet.
        net(torch.randn(4, 8))
        lr.mul_(0.5)
        large["table"].fill_(1)
        saves.fence()
        save.wait()
        step = saves.latest()
        restored = torch.empty(1 << 17)
        step.read_into({"net.1.running_mean": restored}, strict=False)
        assert bits(restored) == averages != bits(net[1].running_mean)
        assert float(step.read("optimizer.param_groups.0.lr")) == 0.5
        assert not step.read("large.table").any()


def test_names_that_differ_are_refused_before_anything_changes(tmp_path):
    net, optimizer = nn.Linear(2, 2), None
    with executor(tmp_path) as saves:
        ashore.torch.save(saves, 1, ashore.torch.state(model=net, more={"a": 1})).wait()
        step = saves.latest()
    other = nn.Sequential(nn.Linear(2, 2))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    before = bits(other.state_dict())
    state = ashore.torch.state(model=other, optimizer=optimizer)
    with pytest.raises(ashore.InvalidError, match="strict=False.*missing=.*model.0.weight.*unexpected=.*model.weight"):
        ashore.torch.restore(step, state)
    assert bits(other.state_dict()) == before
    keys = ashore.torch.restore(step, state, strict=False)
    assert set(keys.missing_keys) == {"model.0.weight", "model.0.bias", "optimizer.param_groups"}
    assert set(keys.unexpected_keys) == {"model.weight", "model.bias", "more.a"}


class Scales(nn.Module):
    """Two scales of one element, which are one parameter where they are tied."""

    def __init__(self, values, tied):
        super().__init__()
        self.one = nn.Parameter(torch.tensor(values[0]))
        self.two = self.one if tied else nn.Parameter(torch.tensor(values[1]))


def test_tied_scalars_come_back_and_scalars_that_were_stored_apart_are_refused(tmp_path):
    """A model that came to tie its scales cannot have both values of an older step."""
    with executor(tmp_path) as saves:
        tied = Scales([3.0], tied=True)
        ashore.torch.save(saves, 1, ashore.torch.state(net=tied)).wait()
        other = Scales([0.0], tied=True)
        ashore.torch.restore(saves.checkpoint(1), ashore.torch.state(net=other))
        assert other.one is other.two and other.one.item() == 3.0

        apart = Scales([1.0, 2.0], tied=False)
        ashore.torch.save(saves, 2, ashore.torch.state(net=apart)).wait()
        with pytest.raises(ashore.InvalidError, match="stored apart") as refused:
            ashore.torch.restore(saves.checkpoint(2), ashore.torch.state(net=other))
        assert refused.value.tensor in ("net.one", "net.two") and other.one.item() == 3.0


@pytest.mark.parametrize(
    "change", [lambda: nn.Linear(3, 2), lambda: nn.Linear(2, 2).double(), lambda: nn.Linear(2, 2).to(torch.bfloat16)]
)
def test_shapes_and_dtypes_are_never_converted(tmp_path, change):
    with executor(tmp_path) as saves:
        ashore.torch.save(saves, 1, ashore.torch.state(model=nn.Linear(2, 2))).wait()
        other = change()
        before = bits(other.state_dict())
        with pytest.raises(ashore.InvalidError, match="tensor=model.weight") as refused:
            ashore.torch.restore(saves.latest(), ashore.torch.state(model=other))
    assert refused.value.tensor == "model.weight" and bits(other.state_dict()) == before


def test_state_of_another_precision_stays_so(tmp_path):
    """`load_state_dict` of an optimizer would make the averages of bfloat16 parameters bfloat16."""
    def used():
        net = nn.Linear(4, 4).to(torch.bfloat16)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        net(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
        return net, optimizer

    net, optimizer = used()
    optimizer.step()
    for entry in optimizer.state.values():
        entry["momentum_buffer"] = torch.rand(entry["momentum_buffer"].shape)
    with executor(tmp_path) as saves:
        ashore.torch.save(saves, 1, ashore.torch.state(net=net, optimizer=optimizer)).wait()
        other, other_optimizer = used()
        ashore.torch.restore(saves.latest(), ashore.torch.state(net=other, optimizer=other_optimizer))
    assert bits(list(other_optimizer.state.values())) == bits(list(optimizer.state.values()))


def test_parameters_are_found_by_name_in_any_order(tmp_path):
    net = Net()
    groups = lambda net: [  # noqa: E731
        {"params": [net.conv.weight, net.conv.bias], "lr": 0.5},
        {"params": [net.scale, net.embed.weight], "weight_decay": 0.25},
    ]
    optimizer = torch.optim.AdamW(groups(net), lr=0.125)
    train(net, optimizer)
    with executor(tmp_path) as saves:
        ashore.torch.save(saves, 1, ashore.torch.state(net=net, optimizer=optimizer)).wait()
        other = Net()
        turned = [{**group, "params": group["params"][::-1]} for group in groups(other)[::-1]]
        other_optimizer = torch.optim.AdamW(turned, lr=1.0)
        ashore.torch.restore(saves.latest(), ashore.torch.state(net=other, optimizer=other_optimizer))
        regrouped = torch.optim.AdamW(other.parameters())
        with pytest.raises(ashore.InvalidError, match="other groups of parameters"):
            ashore.torch.restore(saves.latest(), ashore.torch.state(net=other, optimizer=regrouped))
    for name in ("scale", "conv.weight", "embed.weight"):
        ours, theirs = (state[net.get_parameter(name)] for state, net in ((other_optimizer.state, other), (optimizer.state, net)))
        assert bits(ours) == bits(theirs)
    rates = [(group["lr"], group["weight_decay"], len(group["params"])) for group in other_optimizer.param_groups]
    assert rates == [(0.125, 0.25, 2), (0.5, 0.01, 2)]


@pytest.mark.parametrize("of", ["SGD", "Adam", "Adagrad", "RMSprop", "Rprop", "ASGD", "Adadelta", "Adafactor", "LBFGS"])
def test_optimizers_come_back(tmp_path, of):
    def made():
        net = nn.Linear(3, 2)
        return net, getattr(torch.optim, of)(net.parameters(), lr=0.1)

    def step(net, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = net(torch.ones(2, 3)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    net, optimizer = made()
    for _ in range(2):
        step(net, optimizer)
    with executor(tmp_path) as saves:
        ashore.torch.save(saves, 1, ashore.torch.state(net=net, optimizer=optimizer))
        saves.fence()
        other, other_optimizer = made()
        # Saves become visible when they are durable.
        saves.shutdown()
        ashore.torch.restore(ashore.latest(tmp_path), ashore.torch.state(net=other, optimizer=other_optimizer))
    step(net, optimizer)
    step(other, other_optimizer)
    assert bits([other.state_dict(), other_optimizer.state_dict()]) == bits([net.state_dict(), optimizer.state_dict()])


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"calls": self.calls, "scales": torch.tensor([self.calls])}

    def set_extra_state(self, state):
        self.calls = state["calls"] + int(state["scales"])


def test_extra_state_and_hooks_go_their_way(tmp_path):
    net = nn.Sequential(Extra(2, 2))
    net[0].calls = 20
    with executor(tmp_path) as saves:
        ashore.torch.save(saves, 1, ashore.torch.state(net=net)).wait()
        other = nn.Sequential(Extra(2, 2))
        other[0].calls = 0
        ashore.torch.restore(saves.latest(), ashore.torch.state(net=other))
    assert other[0].calls == 40 and bits(other[0].weight) == bits(net[0].weight)


def test_what_cannot_be_saved_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match="name=epoch type=int"):
        ashore.torch.state(epoch=3)
    with pytest.raises(TypeError, match="nothing"):
        ashore.torch.state()
    with executor(tmp_path) as saves:
        for tree, name in [
            ({"t": torch.empty(3, device="meta")}, "d.t"),
            ({"t": torch.ones(3, dtype=torch.complex128)}, "d.t"),
            ({"t": torch.ones(3).to_sparse()}, "d.t"),
            ({"f": lambda: 0}, "d.f"),
        ]:
            with pytest.raises(ashore.InvalidError) as refused:
                ashore.torch.save(saves, 1, ashore.torch.state(d=tree))
            assert refused.value.tensor == name


def test_random_numbers_come_back(tmp_path):
    import random

    import numpy

    rng = ashore.torch.Rng()
    with executor(tmp_path) as saves:
        ashore.torch.save(saves, 1, ashore.torch.state(rng=rng, numpy={"pcg": numpy.random.PCG64(7).state})).wait()
        draw = lambda: (random.random(), numpy.random.rand(), torch.rand(1).item())  # noqa: E731
        drawn = draw()
        assert draw() != drawn
        box = {"pcg": {}}
        ashore.torch.restore(saves.latest(), ashore.torch.state(rng=rng, numpy=box))
        assert draw() == drawn
    assert box["pcg"] == numpy.random.PCG64(7).state


def cuda_devices(monkeypatch, number):
    """Stands in for CUDA with so many devices, whose random numbers have a state of one byte; returns what is set."""
    states = {device: torch.tensor([device], dtype=torch.uint8) for device in range(number)}

    def set_one(state, device):
        if device not in states:
            raise RuntimeError("CUDA error: invalid device ordinal")
        states[device] = state

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(states.values()))
    monkeypatch.setattr(torch.cuda.random, "set_rng_state", set_one)
    return states


@pytest.mark.parametrize("saved, now", [(4, 1), (2, 0), (1, 2), (0, 2)])
def test_random_numbers_are_restored_with_another_number_of_gpus(tmp_path, monkeypatch, saved, now):
    """A run with 4 GPUs goes on with 1, and one that had not begun to use CUDA goes on where it is in use."""
    net = nn.Linear(2, 2)
    state = ashore.torch.state(net=net, rng=ashore.torch.Rng())
    with executor(tmp_path) as saves, monkeypatch.context() as patches:
        for device in (states := cuda_devices(patches, saved)):
            states[device] = torch.tensor([10 + device], dtype=torch.uint8)
        ashore.torch.save(saves, 1, state).wait()
        drawn, expected = torch.rand(1), bits(net.state_dict())
        states = cuda_devices(patches, now)
        net.weight.data.zero_()
        assert ashore.torch.restore(saves.latest(), state) == ashore.torch.IncompatibleKeys([], [])
        assert torch.equal(torch.rand(1), drawn) and bits(net.state_dict()) == expected
    assert [int(states[device]) for device in range(now)] == [10 + d if d < saved else d for d in range(now)]


def test_random_numbers_are_restored_where_only_one_side_has_numpy(tmp_path, monkeypatch):
    import numpy

    state = ashore.torch.state(rng=ashore.torch.Rng())
    with executor(tmp_path) as saves:
        with_numpy = ashore.torch.rng_state()
        with monkeypatch.context() as patches:
            patches.setitem(sys.modules, "numpy", None)
            assert "numpy" not in ashore.torch.rng_state()
            ashore.torch.set_rng_state(with_numpy)
            ashore.torch.save(saves, 1, state).wait()
        drawn, numpy_before = torch.rand(1), numpy.random.get_state()[1].tolist()
        assert ashore.torch.restore(saves.latest(), state) == ashore.torch.IncompatibleKeys([], [])
        assert torch.equal(torch.rand(1), drawn) and numpy.random.get_state()[1].tolist() == numpy_before


def fine_tuned(elements):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(elements, 64), nn.Linear(64, 8))
    net[0].requires_grad_(False)
    optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=0.01)
    return net, optimizer, ashore.torch.state(model=net, optimizer=optimizer)


def test_what_does_not_train_is_written_once(tmp_path):
    net, optimizer, state = fine_tuned(1 << 13)
    frozen = net[0].weight.nbytes
    with executor(tmp_path) as saves:
        for step in range(1, 5):
            net(torch.ones(4, 1 << 13)).sum().backward()
            optimizer.step()
            committed = ashore.torch.save(saves, step, state).wait()
            saves.fence()
            shared = committed.cloned_bytes + committed.linked_bytes
            assert shared >= frozen if step > 1 else shared == 0
            assert (committed.written_bytes >= frozen) == (step == 1)
        # A layer that thaws is written again.
        net[0].requires_grad_(True)
        assert ashore.torch.save(saves, 5, state).wait().written_bytes >= frozen
        expected = bits(net.state_dict())
        other, _, other_state = fine_tuned(1 << 13)
        with torch.no_grad():
            other[0].weight.zero_()
        ashore.torch.restore(saves.checkpoint(4), other_state)
        assert bits(other.state_dict()) == expected


def test_a_little_that_does_not_train_has_no_file_of_its_own(tmp_path):
    _, _, state = fine_tuned(16)
    with executor(tmp_path) as saves:
        path = ashore.torch.save(saves, 1, state).wait().path
    assert (path / "model.safetensors").exists()
