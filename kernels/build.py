#!/usr/bin/env python3
"""Compiles every .cu in this folder to PTX for compute_80, and writes the sums that a unit test compares.

  build.py [--check]    --check writes nothing, and fails when anything would change
  build.py --assemble PTXAS    assembles the PTX for each of ARCHS, and fails where a kernel spills or takes too many registers

Runs under a Python that has nvidia-cuda-nvrtc-cu12 of exactly the version below: an older compiler writes PTX that older drivers
take. Needs neither a GPU nor a driver.
"""
import ctypes, hashlib, re, subprocess, sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE, VERSION = "nvidia-cuda-nvrtc-cu12", "12.4.127"
OPTIONS = [b"--gpu-architecture=compute_80", b"--fmad=false", b"--device-as-default-execution-space"]
SUMS = "SHA256SUMS"
ARCHS = "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"
REGISTERS = 64  # of a thread: more, and a block of 1,024 threads cannot be launched


def library():
    if metadata.version(PACKAGE) != VERSION:
        sys.exit(f"{PACKAGE} must be {VERSION}, it is {metadata.version(PACKAGE)}")
    files = [f for f in metadata.files(PACKAGE) if re.fullmatch(r"libnvrtc\.so\.\d+", f.name)]
    return ctypes.CDLL(str(files[0].locate()))


def compile_to_ptx(nvrtc, source, headers):
    def must(code):
        if code:
            size = ctypes.c_size_t()
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value + 1)
            nvrtc.nvrtcGetProgramLog(program, log)
            sys.exit(f"{source.name}: nvrtc error {code}\n{log.value.decode()}")

    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    texts = (ctypes.c_char_p * len(headers))(*[h.read_bytes() for h in headers])
    names = (ctypes.c_char_p * len(headers))(*[h.name.encode() for h in headers])
    must(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), source.name.encode(), len(headers), texts, names))
    must(nvrtc.nvrtcCompileProgram(program, len(OPTIONS), (ctypes.c_char_p * len(OPTIONS))(*OPTIONS)))
    must(nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size)))
    ptx = ctypes.create_string_buffer(size.value)
    must(nvrtc.nvrtcGetPTX(program, ptx))
    must(nvrtc.nvrtcDestroyProgram(ctypes.byref(program)))
    return ptx.value


def assemble(ptxas):
    """What ptxas says of each kernel on each architecture."""
    wrong = []
    for arch in ARCHS:
        most = {}
        for path in sorted(HERE.glob("*.ptx")):
            command = [ptxas, f"-arch={arch}", "-v", path, "-o", "/dev/null"]
            ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            told = re.findall(r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
                              ended.stdout, re.S)
            if ended.returncode or len(told) != path.read_text().count(".entry"):
                sys.exit(f"{path.name} for {arch}: ptxas ended with {ended.returncode}\n{ended.stdout}")
            for name, stores, loads, registers in told:
                most[name] = int(registers)
                if int(registers) > REGISTERS or int(stores) or int(loads):
                    wrong.append(f"{name} for {arch}: {registers} registers, {stores} bytes of spill stores, {loads} of loads")
        print(f"{arch}: registers: {', '.join(f'{name} {count}' for name, count in sorted(most.items()))}")
    if wrong:
        sys.exit("\n".join(wrong))


def main():
    if sys.argv[1:2] == ["--assemble"] and len(sys.argv) == 3:
        return assemble(sys.argv[2])
    check = sys.argv[1:] == ["--check"]
    if sys.argv[1:] and not check:
        sys.exit(__doc__)
    nvrtc, headers, sources = library(), sorted(HERE.glob("*.h")), sorted(HERE.glob("*.cu"))
    made = {s.with_suffix(".ptx").name: compile_to_ptx(nvrtc, s, headers) for s in sources}
    known = {p.name: p.read_bytes() for p in headers + sources} | made
    made[SUMS] = "".join(f"{hashlib.sha256(b).hexdigest()}  {n}\n" for n, b in sorted(known.items())).encode()
    changed = [n for n, b in made.items() if not (HERE / n).exists() or (HERE / n).read_bytes() != b]
    changed += [p.name for p in HERE.glob("*.ptx") if p.name not in made]
    if check and changed:
        sys.exit("not what this source compiles to: " + ", ".join(changed))
    for name in changed:
        (HERE / name).write_bytes(made[name]) if name in made else (HERE / name).unlink()
    for name, ptx in made.items():
        print(f"{len(ptx):7}  {name}{' (new)' if name in changed else ''}")


if __name__ == "__main__":
    main()
