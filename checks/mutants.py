#!/usr/bin/env python3
"""Breaks each promise of src/mutant.rs once and requires that the test suite fails.

    checks/mutants.py [--by FILTER] [NAME...]

The tests are built once, with the switches in; ASHORE_MUTANT then names the promise to break. A comment above
a mutant may name the tests that detect it: `// seen by: FILTER`. These tests run first, and the whole suite
runs only if they pass. With `--by`, only the tests that it names count. A failed test counts when it passes
without the mutant and fails with it once more, so that a flaky test does not count. Exits 1 when a mutant is
not caught, or is not built into the library at all.
"""
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIMIT_S = 300


def mutants():
    """Name to filter, in the order of the source; the filter may be empty."""
    text = (ROOT / "src/mutant.rs").read_text()
    body = re.search(r"enum Mutant \{(.*?)\n\}", text, re.S)[1]
    found, seen_by = {}, ""
    for line in map(str.strip, body.splitlines()):
        if comment := re.fullmatch(r"// seen by: (\S+)", line):
            seen_by = comment[1]
        elif name := re.fullmatch(r"(\w+),", line):
            found[name[1]], seen_by = seen_by, ""
    return found


def wired():
    """The mutants that the library has a switch for."""
    files = [path for path in (ROOT / "src").rglob("*.rs") if path.name != "mutant.rs"]
    return {name for path in files for name in re.findall(r"Mutant::(\w+)", path.read_text())}


def build():
    """The test programs, each with the folder that it runs in."""
    # A folder beside the other builds, which these flags would replace.
    command = ["cargo", "test", "--workspace", "--target-dir", "target/mutants", "--no-run", "--message-format", "json"]
    flags = {"RUSTFLAGS": f"{os.environ.get('RUSTFLAGS', '')} --cfg mutants"}
    built = subprocess.run(command, cwd=ROOT, env=os.environ | flags, check=True, stdout=subprocess.PIPE, text=True)
    messages = [json.loads(line) for line in built.stdout.splitlines()]
    artifacts = [m for m in messages if m["reason"] == "compiler-artifact" and m["executable"] and m["profile"]["test"]]
    # tidy reads the source, which a switch does not change.
    artifacts = [m for m in artifacts if m["target"]["name"] != "tidy"]
    return [(m["executable"], pathlib.Path(m["manifest_path"]).parent) for m in artifacts]


def run(programs, mutant, *arguments):
    """How many tests ran until one of the programs failed, and which tests failed in it."""
    environment = {k: v for k, v in os.environ.items() if k != "ASHORE_MUTANT"}
    if mutant:
        environment["ASHORE_MUTANT"] = mutant
    ran = 0
    for program, folder in programs:
        process = subprocess.Popen(
            [program, *arguments], cwd=folder, env=environment, text=True, errors="replace", start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return ran, [f"no end within {LIMIT_S} s"]
        ran += sum(map(int, re.findall(r"^running (\d+) tests?$", output, re.M)))
        if process.returncode:
            failed = re.findall(r"^    (\S+)$", output.rpartition("\nfailures:\n")[2], re.M)
            return ran, failed or [f"{pathlib.Path(program).name} ended with {process.returncode}"]
    return ran, []


def examine(programs, mutant, filters):
    """Whether a mutant is caught, and by what."""
    for chosen in filters:
        ran, failed = run(programs, mutant, *chosen)
        if chosen and not ran:
            return False, f"{chosen[0]}: no such test"
        for test in failed:
            # A name with a space is not a test's: the program died, or did not end.
            exact = chosen if " " in test else ["--exact", test]
            if not run(programs, None, *exact)[1] and run(programs, mutant, *exact)[1]:
                return True, test
    return False, "the suite passes"


def main(arguments):
    by = arguments[1] if arguments[:1] == ["--by"] else None
    names = arguments[2:] if by else arguments
    known, switches = mutants(), wired()
    if unknown := set(names) - set(known):
        sys.exit(f"no such mutant: {' '.join(sorted(unknown))}")
    programs = build()
    missed = 0
    for mutant in names or known:
        start = time.monotonic()
        caught, why = False, "the library has no switch for it"
        if mutant in switches:
            filters = [[by]] if by else [[seen_by] for seen_by in [known[mutant]] if seen_by] + [[]]
            caught, why = examine(programs, mutant, filters)
        missed += not caught
        print(f"{mutant:16} {'caught' if caught else 'MISSED'} {time.monotonic() - start:6.1f} s  {why}", flush=True)
    print(f"{len(names or known) - missed} passed, {missed} failed")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main(sys.argv[1:])
