"""Models of transformers, saved, converted by the program, and loaded by `from_pretrained`: the same outputs, bit for bit."""

import subprocess
import sys

import ashore
import ashore.torch
import pytest
import torch
from helpers import bits, executor

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 96, "max_position_embeddings": 32}
UNTIED = transformers.LlamaConfig(
    **SMALL, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, tie_word_embeddings=False
)
# Its two names for one tensor are `lm_head.weight` and `transformer.wte.weight`.
TIED = transformers.GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4)
# Its buffers are running averages and a counter without dimensions.
BUFFERS = transformers.ResNetConfig(embedding_sizes=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)


def trained(kind, config, inputs, dtype=torch.float32):
    """A model after some steps, and its optimizer."""
    torch.manual_seed(3)
    model = kind.from_config(config, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs).logits.square().mean().backward()
        optimizer.step()
    return model, optimizer


def convert(root, output, *arguments):
    command = [sys.executable, "-m", "ashore", "convert", str(root), "--to", "hf", "--prefix", "model.", "--strip"]
    done = subprocess.run([*command, *arguments, str(output)], capture_output=True, text=True, cwd=output.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(kind, output):
    model, info = kind.from_pretrained(output, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model


TOKENS = {"input_ids": torch.arange(24).reshape(2, 12)}
CASES = {
    "llama": (transformers.AutoModelForCausalLM, UNTIED, TOKENS, torch.float32),
    "llama of bfloat16": (transformers.AutoModelForCausalLM, UNTIED, TOKENS, torch.bfloat16),
    "gpt2, tied": (transformers.AutoModelForCausalLM, TIED, TOKENS, torch.float32),
    "resnet": (
        transformers.AutoModelForImageClassification,
        BUFFERS,
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)},
        torch.float32,
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("arguments", [[], ["--shard-size", "20kB"], ["--aliases", "copy"]], ids=" ".join)
def test_from_pretrained_loads_what_convert_wrote(tmp_path, name, arguments):
    kind, config, inputs, dtype = CASES[name]
    model, optimizer = trained(kind, config, inputs, dtype)
    with executor(tmp_path / "root") as saves:
        ashore.torch.save(saves, 7, ashore.torch.state(model=model, optimizer=optimizer)).durable.result()
    convert(tmp_path / "root", tmp_path / "out", *arguments)
    model.config.save_pretrained(tmp_path / "out")
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert (len(shards) > 1) == ("--shard-size" in arguments), shards
    assert ashore.Checkpoint(tmp_path / "out").verify().sound

    again = loaded(kind, tmp_path / "out")
    assert bits(dict(again.state_dict())) == bits(dict(model.state_dict()))
    with torch.no_grad():
        expected, found = model.eval()(**inputs).logits, again.eval()(**inputs).logits
    assert bits(found) == bits(expected) and expected.isfinite().all() and expected.dtype == dtype
