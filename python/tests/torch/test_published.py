"""Weights of a training that travel to modules of other programs."""

import pathlib
import re
import subprocess
import sys

import pytest
import torch
from helpers import bits

import ashore
import ashore.chain
import ashore.torch

PROGRAM = pathlib.Path(__file__).with_name("published.py")


def lines(path):
    """The words of a log: a kill can cut the last line, and the next life goes on in it."""
    return [line.split() for line in path.read_text().splitlines()]


@pytest.mark.parametrize("versions", [30, pytest.param(300, marks=pytest.mark.nightly)])
def test_killed_trainers_and_servers_never_show_anything_but_published_weights(tmp_path, versions):
    command = [sys.executable, str(PROGRAM), str(tmp_path), str(versions)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180 + 4 * versions)
    assert done.returncode == 0, done.stdout + done.stderr
    published = {line[-1] for line in lines(tmp_path / "intents")}
    assert ashore.chain.Follow(tmp_path / "chain").advance(60) == versions
    for server in ("in_place", "double"):
        looks = [look for look in lines(tmp_path / server) if len(look) == 2 and len(look[1]) == 24]
        assert looks and {bits for _, bits in looks} <= published, server
        assert int(looks[-1][0]) == versions


@pytest.fixture
def publisher(tmp_path):
    with ashore.chain.Publisher(tmp_path / "chain", arena=4 << 20) as publisher:
        yield publisher


def published(publisher, model):
    return publisher.publish(model.state_dict()).wait(60)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = torch.nn.Embedding(400, 32, dtype=torch.bfloat16)
        self.head = torch.nn.Linear(32, 400, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.wte.weight
        self.scale = torch.nn.Parameter(torch.tensor(1.5))
        self.register_buffer("counts", torch.arange(5))
        self.register_buffer("small", torch.ones(16).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("tied", [True, False])
def test_updates_go_to_tensors_that_the_engine_does_not_write(tmp_path, publisher, tied):
    trained, served = Net(), Net()
    if not tied:
        served.head.weight = torch.nn.Parameter(torch.zeros_like(served.head.weight))
    published(publisher, trained)
    follow = ashore.chain.Follow(tmp_path / "chain")
    for turn in range(1, 5):
        assert ashore.torch.apply_update(follow, follow.next(60), served.state_dict()) == turn
        assert bits(served.state_dict()) == bits(trained.state_dict())
        with torch.no_grad():
            trained.wte.weight[turn, turn] = float("nan")
            trained.scale.neg_()
            trained.counts += 1
            trained.small.view(torch.uint8)[turn] ^= 0x80
        assert published(publisher, trained).kind == "delta"


def test_tensors_that_do_not_fit_are_refused_before_an_update_is_applied(tmp_path, publisher):
    trained = Net()
    published(publisher, trained)
    follow = ashore.chain.Follow(tmp_path / "chain")
    follow.advance(60)
    with torch.no_grad():
        trained.wte.weight[3] += 1.0
    published(publisher, trained)
    update = follow.next(60)
    assert not update.is_full
    good = dict(Net().state_dict())
    wrong = {
        "wte.weight": torch.zeros(32, 400, dtype=torch.bfloat16).T,
        "counts": torch.zeros(5),
        "scale": None,
    }
    for name, tensor in wrong.items():
        given = {**good, name: tensor}
        if tensor is None:
            del given[name]
        before = bits(given)
        with pytest.raises(ashore.InvalidError) as caught:
            ashore.torch.apply_update(follow, update, given)
        assert caught.value.tensor == name and bits(given) == before and follow.version == 1
    # The tensors are not the version before, so all of them are copied.
    assert ashore.torch.apply_update(follow, update, good) == 2
    assert bits(good) == bits(trained.state_dict())


def test_tensors_that_missed_a_full_are_whole_after_the_next_delta(tmp_path, publisher):
    trained, served = Net(), Net()
    published(publisher, trained)
    follow = ashore.chain.Follow(tmp_path / "chain")
    with pytest.raises(ashore.InvalidError):
        ashore.torch.apply_update(follow, follow.next(60), {"scale": served.scale})
    for turn in range(2, 4):
        with torch.no_grad():
            trained.wte.weight[turn] += 1.0
        published(publisher, trained)
        update = follow.next(60)
        assert not update.is_full and ashore.torch.apply_update(follow, update, served.state_dict()) == turn
        assert bits(served.state_dict()) == bits(trained.state_dict())


def test_the_examples_run(tmp_path):
    examples = pathlib.Path(__file__).parents[3] / "examples" / "python"
    run = lambda name, *given: subprocess.Popen(
        [sys.executable, str(examples / name), str(tmp_path / "chain"), *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    follow, publish = run("follow.py", "5"), run("publish.py", "5")
    (served, wrong), (said, error) = follow.communicate(timeout=200), publish.communicate(timeout=200)
    assert (follow.returncode, publish.returncode) == (0, 0), wrong + error
    assert "step 5: version 5, delta" in said and "of step 5" in served.splitlines()[-1]


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    page = pathlib.Path(__file__).parents[3] / "docs" / "deltas.md"
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    assert len(blocks) == 3
    names = {}
    exec(compile("\n".join(blocks[:2]), str(page), "exec"), names)
    # What a server has before the patches.
    server = {"weight": names["model"].weight.detach().clone(), "bias": names["model"].bias.detach().clone()}
    exec(compile(blocks[2], str(page), "exec"), names)
    for name, indices, values in names["patches"]:
        assert indices.dtype == torch.int32
        server[name].view(-1).index_copy_(0, indices.long(), values)
    assert bits(server) == bits(dict(names["model"].state_dict()))
    assert "version=1" in capsys.readouterr().out and names["follow"].version == 2


def test_the_form_of_indices_has_the_patches_of_servers_in_its_file(tmp_path):
    from safetensors.torch import load_file

    weight = torch.randn(50, 40).bfloat16()
    server = weight.clone()
    with ashore.chain.Publisher(tmp_path / "chain", arena=4 << 20, form="indices") as publisher:
        publisher.publish({"w": weight}).wait(60)
        weight[7, ::3] = float("nan")
        path = publisher.publish({"w": weight}).wait(60).path
    patch = load_file(path / "delta.safetensors")
    assert patch["w.indices"].dtype == torch.int32 and patch["w.values"].dtype == torch.bfloat16
    server.view(-1).index_copy_(0, patch["w.indices"].long(), patch["w.values"])
    assert bits({"w": server}) == bits({"w": weight})
