"""A training with donated state that is killed resumes bit for bit."""

import pathlib
import subprocess
import sys
import time

import ashore

TRAINING = pathlib.Path(__file__).with_name("training.py")
STEPS = 40


def run(root, steps, *, kill_after=None, moment=0.0):
    """Runs the training; kills it a moment after it has begun the step `kill_after`. Returns its last line."""
    command = [sys.executable, str(TRAINING), str(root), str(steps)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        last = ""
        for line in process.stdout:
            last = line
            if kill_after is not None and line == f"step {kill_after}\n":
                time.sleep(moment)
                process.kill()
                kill_after = None
        process.wait(timeout=300)
    return process.returncode, last


def test_a_training_killed_at_several_moments_ends_with_the_same_bits(tmp_path):
    returned, whole = run(tmp_path / "whole", STEPS)
    assert returned == 0 and whole.startswith("digest ")
    for number, moment in ((9, 0.0), (16, 0.003), (31, 0.01)):
        returned, _ = run(tmp_path / "killed", STEPS, kill_after=number, moment=moment)
        assert returned == -9
        # Something was durable before the last kill, so that the next run does not begin anew.
        assert number < 10 or ashore.latest(tmp_path / "killed").step > 0
    returned, resumed = run(tmp_path / "killed", STEPS)
    assert returned == 0 and resumed == whole
