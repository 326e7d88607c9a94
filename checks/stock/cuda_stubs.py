#!/usr/bin/env python3
"""Lets a CUDA build of torch be imported where no CUDA library is installed, for use on the CPU.

The wheel's own libraries need some two gigabytes of CUDA libraries. The dynamic linker only requires that
each library exists and offers the symbols, under their versions, that are bound at load time. So for each
missing library this script builds a stub that offers all of these symbols and traps when one is called.
Computing on the CPU never calls one.

    cuda_stubs.py SITE_PACKAGES
"""
import pathlib
import re
import subprocess
import sys
import tempfile

# The driver is opened at run time where it is needed, so a stub of it would only mislead programs that look
# for it.
DRIVER = "libcuda.so.1"
SYSTEM = re.compile(r"^(ld-linux.*|lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)\.so\.\d+)$")
# Libraries without symbol versions: a symbol belongs to the one whose prefix is the longest that it has.
PREFIXES = {
    "libcublas": "cublas", "libcublasLt": "cublasLt", "libcudnn": "cudnn", "libcufft": "cufft", "libcufile": "cuFile",
    "libcupti": "cupti", "libcurand": "curand", "libcusolver": "cusolver", "libcusparse": "cusparse",
    "libcusparseLt": "cusparseLt", "libnccl": "nccl", "libnvJitLink": "nvJitLink", "libnvrtc": "nvrtc",
    "libnvshmem_host": "nvshmem",
}  # fmt: skip


def readelf(path, *flags):
    command = ["readelf", "-W", *flags, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def examine(libraries):
    """The needs of the libraries: names of libraries, versions per library, symbols that none of them defines."""
    needed, versions, undefined, defined = set(), {}, set(), set()
    for path in libraries:
        needed |= set(re.findall(r"\(NEEDED\).*\[(.*)\]", readelf(path, "-d")))
        library = None
        for line in readelf(path, "-V").splitlines():
            if found := re.search(r"File: (\S+)\s+Cnt", line):
                library = found[1]
            elif library and (found := re.search(r"Name: (\S+)\s+Flags", line)):
                versions.setdefault(library, set()).add(found[1])
        for line in readelf(path, "--dyn-syms").splitlines():
            fields = line.split()
            if len(fields) >= 8 and fields[0].endswith(":"):
                (undefined if fields[6] == "UND" else defined).add(fields[7])
    names = {symbol.partition("@")[0] for symbol in defined}
    return needed, versions, {symbol for symbol in undefined if symbol.partition("@")[0] not in names}


def owner(symbol):
    """The library without versions that a symbol belongs to, by the longest prefix; also for C++ names that contain it."""
    fits = [(len(prefix), library) for library, prefix in PREFIXES.items() if prefix in symbol]
    return max(fits)[1] if fits else None


def stub(library, versions, undefined, folder):
    """Builds one library; returns how many symbols it offers."""
    offers = {version: set() for version in versions}
    for symbol in undefined:
        name, _, version = symbol.partition("@")
        version = version.lstrip("@")
        if version in versions or (not version and owner(name) == library.partition(".so")[0]):
            offers.setdefault(version, set()).add(name)
    with tempfile.TemporaryDirectory() as scratch:
        code, script = pathlib.Path(scratch, "stub.c"), pathlib.Path(scratch, "versions")
        lines = ["void stub(void) { __builtin_trap(); }"]
        lines += [f'void {name}(void) __attribute__((alias("stub")));' for names in offers.values() for name in names]
        code.write_text("\n".join(lines) + "\n")
        command = ["gcc", "-shared", "-fPIC", "-nostdlib", "-o", folder / library, code, f"-Wl,-soname,{library}"]
        if any(offers):
            nodes = [f"{v} {{ global: {' '.join(n + ';' for n in sorted(offers[v]))} }};" for v in sorted(offers) if v]
            script.write_text("\n".join(nodes) + "\n")
            command.append(f"-Wl,--version-script={script}")
        subprocess.run(command, check=True)
    return sum(map(len, offers.values()))


def main(site):
    torch, folder = site / "torch", site / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True, exist_ok=True)
    libraries = [*torch.glob("lib/*.so*"), *torch.glob("*.so")]
    present = {path.name for path in [*libraries, *folder.iterdir()]} | {DRIVER}
    needed, versions, undefined = examine(libraries)
    for library in sorted(needed - present):
        if not SYSTEM.match(library):
            print(f"{library}: {stub(library, versions.get(library, set()), undefined, folder)} symbols")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
