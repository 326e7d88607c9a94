#!/usr/bin/env python3
"""Checks an installation that `cargo cinstall` has made: its files, and programs built with its pkg-config and CMake files.

  installed.py PREFIX
"""
import os, re, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = [
    "include/ashore.h", "include/ashore.hpp", "lib/libashore.so", "lib/libashore.so.1", "lib/libashore.a",
    "lib/pkgconfig/ashore.pc", "share/ashore/cmake/ashore-config.cmake", "share/ashore/cmake/ashore-config-version.cmake",
]  # fmt: skip


def run(*command, folder=None, **settings):
    ended = subprocess.run([str(part) for part in command], cwd=folder, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        sys.exit(f"installed.py: status {ended.returncode}: {command}\n{ended.stdout}")
    return ended.stdout


def main():
    prefix = Path(sys.argv[1]).resolve()
    missing = [file for file in FILES if not (prefix / file).exists()]
    assert not missing, f"not installed: {missing}; there is {sorted(str(p.relative_to(prefix)) for p in prefix.rglob('*'))}"
    for header in ("ashore.h", "ashore.hpp"):
        ours, theirs = ROOT / "capi/include" / header, prefix / "include" / header
        assert ours.read_bytes() == theirs.read_bytes(), f"{theirs} is not the committed one"
    dynamic = run("readelf", "-d", prefix / "lib/libashore.so")
    abi = re.search(r"#define ASHORE_ABI (\d+)", (prefix / "include/ashore.h").read_text())[1]
    assert f"[libashore.so.{abi}]" in dynamic and "NODELETE" in dynamic, dynamic
    exported = run("nm", "-D", "--defined-only", prefix / "lib/libashore.so").split()[2::3]
    assert all(name.startswith("ashore_") for name in exported), exported

    where = {"PKG_CONFIG_PATH": str(prefix / "lib/pkgconfig"), "LD_LIBRARY_PATH": str(prefix / "lib")}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        flags = run("pkg-config", "--cflags", "--libs", "ashore", **where).split()
        run("gcc", "-std=c11", ROOT / "examples/c/trainer.c", "-o", work / "trainer", *flags, "-lm", **where)
        told = [run(work / "trainer", work / "steps", 5, **where).splitlines()[-1]]
        # The static library, with what its own file names.
        private = run("pkg-config", "--static", "--libs-only-l", "ashore", **where).split()
        libraries = [prefix / "lib/libashore.a", *(flag for flag in private if flag != "-lashore"), "-lm"]
        run("gcc", "-std=c11", ROOT / "examples/c/trainer.c", f"-I{prefix}/include", "-o", work / "static", *libraries)
        told.append(run(work / "static", work / "steps", 5).splitlines()[-1])
        for language in ("c", "cpp"):
            built = work / language
            run("cmake", "-S", ROOT / "examples" / language, "-B", built, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}")
            run("cmake", "--build", built)
            told.append(run(built / "trainer", work / f"{language}.steps", 5).splitlines()[-1])
        assert told[0] == told[1] == told[2] and "step 5 weights" in told[3], told
    print(f"installed: ok, {len(exported)} functions")


main()
