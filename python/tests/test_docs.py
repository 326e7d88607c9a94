"""The page of the documentation runs as it is written, and so does the program."""

import pathlib
import re
import subprocess
import sys
import typing

import torch
from conftest import SMALL

import ashore
import ashore.chain

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "python.md"


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) >= 4
    names = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert "[3, 4, 5]" in capsys.readouterr().out


def test_the_program_of_the_wheel_runs(root):
    ashore.save(root, 7, {"w": torch.ones(4)}, **SMALL)

    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "ashore", *arguments], cwd=root, capture_output=True, text=True, timeout=60)

    listed = run("ls", str(root))
    assert listed.returncode == 0 and "7" in listed.stdout, listed
    assert run("verify", str(root)).returncode == 0
    (file,) = (root / "step-00000007").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    assert run("verify", str(root)).returncode == 3
    assert run("no-such-verb").returncode == 2
    version = run("--version")
    assert ashore.__version__ in version.stdout


def test_every_public_name_has_a_docstring():
    names = {name: getattr(ashore, name) for name in ashore.__all__ if not name.startswith("__")}
    for name, thing in {**names, **{name: getattr(ashore.chain, name) for name in ashore.chain.__all__}}.items():
        # Types of a few words cannot have one before Python 3.13.
        assert thing.__doc__ or typing.get_origin(thing) is typing.Literal, name
        members = vars(thing) if isinstance(thing, type) else {}
        for member, value in members.items():
            if not member.startswith("_") and callable(value):
                assert value.__doc__, f"{name}.{member}"
