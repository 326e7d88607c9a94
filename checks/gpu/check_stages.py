#!/usr/bin/env python3
"""Checks the kit's runner on stages that hang, fail and leave processes behind. Needs `gpu-kit`; takes seconds."""
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

KIT = Path(__file__).resolve().parent.parent.parent / "gpu-kit"
os.environ["TMPDIR"] = scratch = tempfile.mkdtemp()
sys.path.insert(0, str(KIT))
import stages

# A process that leaves the group and the session of its parent, which hangs.
HANGS = """
import os, subprocess, sys, time
child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(1000)
"""
# A process whose child continues when it has ended.
LEAVES = "import subprocess; print(subprocess.Popen(['sleep', '1000'], start_new_session=True).pid)"


def python(name, text, **more):
    return stages.Run(name, [sys.executable, "-c", text], **more)


def gone(pid):
    return not Path(f"/proc/{pid}").exists()


def main():
    out = Path(scratch) / "out"
    work = stages.Work(out)
    stages.ctypes.CDLL(None).prctl(stages.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    begun = time.monotonic()
    assert stages.run(work, stages.Stage("hangs", 480, [python("hangs", HANGS)]), 1) == 124
    assert time.monotonic() - begun < 5
    assert gone(int((work.results / "hangs.log").read_text())), "a child of a stage that hung is still there"

    assert stages.run(work, stages.Stage("leaves", 480, [python("leaves", LEAVES)]), 20) == 0
    assert gone(int((work.results / "leaves.log").read_text())), "a process that a stage left behind is still there"

    both = [python("slow", "import time; time.sleep(1000)"), python("fast", "raise SystemExit(7)")]
    assert stages.run(work, stages.Stage("both", 480, both, together=True), 2) in (7, 124)
    line = json.loads((work.results / "both.json").read_text())
    assert (line["rcs"], line["killed"]) == ({"slow": 124, "fast": 7}, ["slow"]), line

    none = python("none", "import json; print(json.dumps({'late_chunks': 0}))", json=True, positive=("late_chunks",))
    assert stages.run(work, stages.Stage("none", 480, [none]), 20) == 4
    assert stages.run(work, stages.Stage("zero", 480, [python("zero", "print('running 0 tests')")]), 20) == 3
    assert stages.run(work, stages.Stage("absent", 480, [stages.Run("absent", ["/absent"])]), 20) == 127

    # The archive holds results and no scratch, and a new folder resumes from it.
    (work.scratch / "large").write_bytes(bytes(1 << 20))
    work.keep()
    with tarfile.open(out / "kit.tgz") as tar:
        names = tar.getnames()
    assert "results/leaves.json" in names and not any("large" in name for name in names), names
    work.end()
    subprocess.run(["rm", "-rf", str(work.root)], check=True)
    again = stages.Work(out)
    assert again.passed(stages.Stage("leaves", 480, [])) and not again.passed(stages.Stage("hangs", 480, []))
    again.end()
    subprocess.run(["rm", "-rf", scratch], check=True)
    print("check_stages.py: passed")


if __name__ == "__main__":
    main()
