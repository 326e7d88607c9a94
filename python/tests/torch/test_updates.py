"""What updates of a model of a realistic size cost: 16.9 million parameters, a transformer on Python's own source."""

import pathlib
import re
import statistics
import sysconfig
from collections import Counter

import numpy
import pytest
import torch
from torch import nn

from ashore.chain import Follow, Publisher

WORDS, WIDTH, LAYERS, LENGTH, BATCH = 8192, 512, 4, 64, 8


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        make = lambda: nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, 0.0, nn.functional.gelu, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(make() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, text):
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1])
        x = self.words(text) + self.places.weight[: text.shape[1]]
        for layer in self.layers:
            x = layer(x, mask, is_causal=True)
        return self.norm(x) @ self.words.weight.T


def source():
    """The words of some modules of Python, as numbers."""
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    words = [word for file in files for word in re.findall(r"\w+|\s+|[^\w\s]", file.read_text(errors="ignore"))]
    # The most frequent ones: some rows of the embedding never have a gradient.
    numbers = {word: number for number, (word, _) in enumerate(Counter(words).most_common(int(WORDS * 0.88)))}
    return torch.tensor([numbers[word] for word in words if word in numbers])


def rounded(model):
    return {name: tensor.detach().bfloat16() for name, tensor in model.state_dict().items()}


def entropy(old, new):
    """The fewest bytes by which a coder that knows shares alone can say what changed: where, and by how much."""
    bits = lambda counts: -float((counts * numpy.log2(counts / counts.sum())).sum())
    word = lambda state, name: state[name].view(torch.int16).numpy().view("uint16").astype("int32").ravel()
    order = lambda w: numpy.where(w >> 15, 0xFFFF - w, w | 0x8000)
    distances = numpy.concatenate([order(word(new, name)) - order(word(old, name)) for name in old])
    changed = distances[distances != 0]
    shares = numpy.array([changed.size, distances.size - changed.size], "float64")
    return (bits(shares) + bits(numpy.unique(changed, return_counts=True)[1].astype("float64"))) / 8, changed.size


@pytest.mark.nightly
def test_a_delta_of_a_step_costs_about_its_entropy(tmp_path, capsys):
    torch.manual_seed(1)
    text, model = source(), Net()
    assert 16.5e6 < sum(p.numel() for p in model.parameters()) < 17.5e6
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(advantage):
        at = torch.randint(0, len(text) - LENGTH - 1, (BATCH,))
        rows = torch.stack([text[begin : begin + LENGTH + 1] for begin in at])
        loss = nn.functional.cross_entropy(model(rows[:, :-1]).transpose(1, 2), rows[:, 1:], reduction="none").mean(1)
        optimizer.zero_grad()
        (loss * advantage).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.mean().detach())

    losses = [step(torch.ones(BATCH)) for _ in range(40)]
    assert statistics.mean(losses[-5:]) < losses[0] - 1.0, losses
    for group in optimizer.param_groups:
        group["lr"] = 1e-6
    # Reinforcement: each sequence is made likelier or less likely.
    sign = lambda: torch.randint(0, 2, (BATCH,)) * 2.0 - 1.0
    for _ in range(12):
        step(sign())
    forms = ("packed", "zstd", "indices")
    publishers = {form: Publisher(tmp_path / form, form=form, arena=16 << 20) for form in forms}
    follows = {}
    old = rounded(model)
    for form, publisher in publishers.items():
        publisher.publish(old).wait(300)
        follows[form] = Follow(tmp_path / form)
        follows[form].advance(300)
    for _ in range(3):
        step(sign())
        new = rounded(model)
        fewest, changed = entropy(old, new)
        said = []
        for form, publisher in publishers.items():
            published = publisher.publish(new).wait(300)
            assert published.changed == changed
            follows[form].advance(300)
            assert follows[form].read("words.weight").tobytes() == new["words.weight"].view(torch.int16).numpy().tobytes()
            header = 8 + int.from_bytes((published.path / "delta.safetensors").open("rb").read(8), "little")
            columns = (published.path / "delta.safetensors").stat().st_size - header
            full = published.full_bytes
            said.append(f"{form}: {columns / full:.4%} of full ({published.bytes / full:.4%} with header and manifest)")
            if form == "zstd":
                assert published.bytes <= 0.007 * full and columns <= 1.1 * fewest, said
            if form == "packed":
                assert published.bytes <= 0.011 * full, said
        elements = sum(tensor.numel() for tensor in new.values())
        with capsys.disabled():
            print(f"\nchanged {changed / elements:.3%}, entropy {fewest / (2 * elements):.4%} of full; {'; '.join(said)}", end="")
        old = new
