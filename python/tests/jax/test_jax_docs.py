"""The examples in docs/jax.md and in the docstrings run."""

import doctest
import pathlib
import re

import devices  # noqa: F401
import pytest

import ashore.jax
import ashore.jax.orbax

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "jax.md"


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 4
    names = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)


@pytest.mark.parametrize(("module", "examples"), [(ashore.jax, 20), (ashore.jax.orbax, 5)])
def test_the_docstrings_are_true(module, examples):
    found = doctest.testmod(module)
    assert found.attempted > examples and found.failed == 0
