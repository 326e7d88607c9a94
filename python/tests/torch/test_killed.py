"""A training loop that is killed at random ends with the bits of one that was not."""

import os
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest

LOOP = pathlib.Path(__file__).with_name("loop.py")
FORGOTTEN = ("optimizer", "scheduler", "scaler", "rng")


@pytest.fixture(scope="module")
def loops():
    """Where the lives of each loop began, and its end. A kill loses no memory: a RAM disk is as good."""
    wanted = ["0", "12", *(f"2:{name}" for name in FORGOTTEN)]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as root:
        command = [sys.executable, str(LOOP), root, "50", *wanted]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    ends = [line.split("; ends ") for line in done.stdout.splitlines()]
    return {loop: ([int(step) for step in re.findall(r"begins at (\d+)", lives)], end) for loop, (lives, end) in zip(wanted, ends)}


def test_a_loop_killed_at_random_ends_with_the_same_bits(loops):
    begins, end = loops["12"]
    assert len(begins) >= 4 and len(set(begins)) >= 4, begins
    assert loops["0"] == ([0], end)


@pytest.mark.parametrize("forgotten", FORGOTTEN)
def test_each_object_matters(loops, forgotten):
    begins, end = loops[f"2:{forgotten}"]
    assert max(begins) > 0, "no life began from a step"
    assert end != loops["0"][1]
