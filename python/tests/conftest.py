"""What tests share: a root, a small executor, and a second process."""

import subprocess
import sys
import textwrap

import pytest

import ashore

SMALL = {"arena": 8 << 20, "chunk": 1 << 20}


def pytest_addoption(parser):
    parser.addoption("--nightly", action="store_true", help="run the tests that take minutes, too")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--nightly"):
        return
    left = [item for item in items if "nightly" in item.keywords]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if "nightly" not in item.keywords]


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.fixture
def executor(root):
    with ashore.CheckpointExecutor(root, **SMALL) as executor:
        yield executor


@pytest.fixture
def python(tmp_path):
    """Runs a script in another process and returns what it wrote."""

    def run(script, *arguments, check=True, timeout=120):
        path = tmp_path / "script.py"
        path.write_text("SMALL = dict(arena=8 << 20, chunk=1 << 20)\n" + textwrap.dedent(script))
        command = [sys.executable, str(path), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run
