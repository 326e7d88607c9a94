#!/usr/bin/env python3
"""Builds and runs the C and C++ programs here: with gcc and clang, against the shared and the static library, plain and under
ASan and UBSan; checks the header, the exported names, the page for users, and the examples.

  run.py LIBRARIES [--saves N] [--torch SITE_PACKAGES] [--require-torch] [--only NAME]

LIBRARIES is the folder with libashore.so and libashore.a, such as target/debug.
"""
import argparse, os, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CAPI, ROOT = HERE.parent, HERE.parent.parent
STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-g", "-O1"]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
# The functions of the library are not instrumented, and what a forked child leaves is no leak of a test.
SANITIZERS = {"ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0:exitcode=86", "UBSAN_OPTIONS": "print_stacktrace=1"}
COMPILERS = {"gcc": "g++", "clang": "clang++"}


def run(*command, folder=None, limit=240, quiet=False, **settings):
    """Runs a command, which must succeed; returns what it wrote. That of a quiet one is shown only if it fails."""
    command = [str(part) for part in command]
    environment = {**os.environ, **settings}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    captured = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT if quiet else None, "text": True}
    try:
        ended = subprocess.run(command, cwd=folder, env=environment, timeout=limit, **captured)
    except subprocess.TimeoutExpired:
        sys.exit(f"run.py: no end after {limit} s: {' '.join(command)}")
    if ended.returncode:
        sys.exit(f"run.py: status {ended.returncode}: {' '.join(command)}\n{ended.stdout}")
    if not quiet:
        sys.stdout.write(ended.stdout)
    return ended.stdout


def installed(libraries, prefix):
    """An installation in `prefix`, as `cargo cinstall` makes it, but for pkg-config."""
    for name in ("include", "lib", "share/ashore/cmake"):
        (prefix / name).mkdir(parents=True)
    for header in ("ashore.h", "ashore.hpp"):
        shutil.copy(CAPI / "include" / header, prefix / "include")
    shutil.copy(libraries / "libashore.so", prefix / "lib/libashore.so.1")
    (prefix / "lib/libashore.so").symlink_to("libashore.so.1")
    shutil.copy(libraries / "libashore.a", prefix / "lib")
    for file in (CAPI / "cmake").glob("*.cmake"):
        shutil.copy(file, prefix / "share/ashore/cmake")
    return prefix


def header(prefix):
    """The header is clean in the oldest C and C++ that it is for, and exports what the library does, and nothing else."""
    text = (prefix / "include/ashore.h").read_text()
    for c, cpp in COMPILERS.items():
        for compiler, language, standard in ((c, "c", "c99"), (c, "c", "c17"), (cpp, "c++", "c++11"), (cpp, "c++", "c++20")):
            run(compiler, "-x", language, f"-std={standard}", *STRICT, "-fsyntax-only", prefix / "include/ashore.h")
    library = prefix / "lib/libashore.so.1"
    exported = {line.split()[-1] for line in run("nm", "-D", "--defined-only", library, quiet=True).splitlines()}
    declared = set(re.findall(r"^[a-z].*?\b(ashore_\w+)\(", text, re.M))
    assert exported == declared, f"exported and not declared, or declared and not exported: {exported ^ declared}"
    dynamic = run("readelf", "-d", library, quiet=True)
    abi = re.search(r"#define ASHORE_ABI (\d+)", text)[1]
    assert f"[libashore.so.{abi}]" in dynamic and "NODELETE" in dynamic, dynamic
    print(f"header: ok, {len(exported)} functions")


def flags(prefix, static):
    """What a program is linked with."""
    if static:
        return [prefix / "lib/libashore.a", "-lpthread", "-lm", "-ldl"]
    return [f"-L{prefix}/lib", "-lashore", f"-Wl,-rpath,{prefix}/lib"]


def build(compiler, source, to, prefix, static, more=()):
    standard = "-std=c++20" if source.suffix == ".cpp" else "-std=c11"
    extension = ["-Wno-gnu-zero-variadic-macro-arguments"] if "clang" in compiler else []
    link = [] if source.stem == "loaded" else flags(prefix, static)
    run(compiler, standard, *STRICT, *extension, *more, f"-I{prefix}/include", source, "-o", to, *link, "-lpthread", "-ldl")
    return to


# Each compiler with each library, and instrumented where most differs.
CELLS = [("gcc", False, False), ("gcc", True, False), ("clang", False, False), ("clang", True, False)]
CELLS += [("gcc", False, True), ("clang", True, True)]


def programs(prefix, work, saves, only):
    for c, static, sanitized in CELLS:
        name = f"{c}-{'static' if static else 'shared'}{'-sanitized' if sanitized else ''}"
        folder = work / name
        folder.mkdir()
        begun = time.monotonic()
        for source in sorted([*HERE.glob("*.c"), *HERE.glob("*.cpp")]):
            if (only and source.stem != only) or (source.stem == "loaded" and (static or sanitized)):
                continue
            compiler = COMPILERS[c] if source.suffix == ".cpp" else c
            program = build(compiler, source, folder / source.stem, prefix, static, SANITIZED if sanitized else ())
            state = folder / f"{source.stem}.state"
            state.mkdir()
            arguments = [state]
            if source.stem == "loaded":
                copy = shutil.copy(prefix / "lib/libashore.so.1", folder / "copy.so")
                arguments += [prefix / "lib/libashore.so.1", copy]
            if source.stem == "saves" and name == "gcc-shared":
                arguments += [saves]
            told = run(program, *arguments, quiet=True, **(SANITIZERS if sanitized else {}))
            assert f"{source.stem}: ok" in told, told
            growth = [line for line in told.splitlines() if line.startswith("growth: ")]
            if growth:
                print(*growth)
            shutil.rmtree(state)
        print(f"{name}: ok, {time.monotonic() - begun:.0f} s", flush=True)


def page(prefix, work):
    """The blocks of C in docs/c.md, put together, build and run; so does its block of C++."""
    text = (ROOT / "docs/c.md").read_text()
    for language, suffix, compiler in (("c", ".c", "gcc"), ("cpp", ".cpp", "g++")):
        blocks = re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)
        assert blocks, f"docs/c.md has no block of {language}"
        source = work / f"page{suffix}"
        source.write_text("\n".join(blocks))
        program = build(compiler, source, work / f"page-{language}", prefix, False, SANITIZED)
        folder = work / f"page-{language}.state"
        folder.mkdir()
        for _ in range(2):
            run(program, folder=folder, **SANITIZERS)
    print("docs/c.md: ok")


def resumes(program, work, name):
    """A trainer that is killed in the middle of its steps, four times, ends with the bits of one that was not."""
    steps, whole, killed = 60, work / f"{name}.whole", work / f"{name}.killed"
    expected = run(program, whole, steps, quiet=True).splitlines()[-1]
    for last in (7, 20, 33, 47):
        child = subprocess.Popen([program, killed, str(steps)], stdout=subprocess.PIPE, text=True)
        for line in child.stdout:
            if line.startswith(f"step {last} "):
                break
        child.kill()
        child.communicate()
        assert child.returncode == -9, f"{name} ended before it was killed"
    told = run(program, killed, steps, quiet=True).splitlines()
    resumed = re.fullmatch(r"resumed at step (\d+)", told[0])
    assert resumed and 40 <= int(resumed[1]) <= 50, told[0]
    assert told[-1] == expected and f"step {steps} weights " in expected, (told[-1], expected)
    print(f"{name}: ok, {told[0]}, {expected}")


def examples(prefix, work, torch, require_torch):
    made = work / "make"
    shutil.copytree(ROOT / "examples/c", made)
    run("make", f"CFLAGS=-I{prefix}/include -Wall -Wextra -Werror", f"LDLIBS={' '.join(map(str, flags(prefix, False)))}", folder=made)
    resumes(made / "trainer", work, "make")
    for language in ("c", "cpp"):
        built = work / f"cmake-{language}"
        options = ["-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_BUILD_TYPE=Release"]
        if language == "cpp" and torch:
            options += [f"-DTORCH_PACKAGE={torch}"]
        run("cmake", "-S", ROOT / "examples" / language, "-B", built, *options, quiet=True)
        run("cmake", "--build", built, quiet=True)
        resumes(built / "trainer", work, f"cmake-{language}")
        if language == "c":
            resumes(built / "trainer-static", work, "cmake-static")
    if torch:
        run(work / "cmake-cpp/torch", work / "torch.state", limit=120)
    elif require_torch:
        sys.exit("run.py: torch's headers are not at hand")
    else:
        print("left out: examples/cpp/torch.cpp, because torch's headers are not at hand", file=sys.stderr)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("libraries", type=Path)
    p.add_argument("--saves", type=int, default=2000)
    p.add_argument("--torch", type=Path, help="the folder of the package torch, with its headers and libraries")
    p.add_argument("--require-torch", action="store_true")
    p.add_argument("--only", help="one of the programs here, and nothing else")
    options = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prefix = installed(options.libraries.resolve(), work / "prefix")
        if not options.only:
            header(prefix)
        programs(prefix, work, options.saves, options.only)
        if not options.only:
            page(prefix, work)
            torch = options.torch if options.torch and (options.torch / "include").is_dir() else None
            examples(prefix, work, torch, options.require_torch)


main()
