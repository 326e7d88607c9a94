#!/usr/bin/env python3
"""Builds the crate that `cargo package` packs, and shows what build.rs reports for kernels with wrong
checksums.

  package.py [PTXAS]    with PTXAS, the packed crate is also built with machine code for two architectures
"""
import os, re, shutil, subprocess, sys, tarfile, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHANGED = "kernels/gather.ptx changed: run just ptx"
ARCHITECTURES = "sm_80", "sm_90"


def cargo(*arguments, folder=ROOT, **settings):
    command = ["cargo", *arguments]
    environment = {**os.environ, **settings, "CARGO_TERM_COLOR": "never"}
    ended = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return ended.returncode, ended.stdout


def check(folder, *arguments, **settings):
    return cargo("check", "--locked", "--target-dir", ROOT / "target", *arguments, folder=folder, **settings)


def expect(what, ended, passes, *texts):
    code, said = ended
    if (code == 0) != passes or not all(text in said for text in texts):
        sys.exit(f"{what}: status {code}, expected {'success' if passes else 'failure'} with {texts}\n{said}")
    print(f"{what}: as expected")


def pack(package, folder):
    """The files of a published package, unpacked."""
    code, said = cargo("package", "--allow-dirty", "--no-verify", "--workspace", "--exclude", "fakecuda")
    if code:
        sys.exit(said)
    version = re.search(r'^version = "(.+)"', (ROOT / "Cargo.toml").read_text(), re.M)[1]
    with tarfile.open(ROOT / f"target/package/{package}-{version}.crate") as archive:
        archive.extractall(folder, filter="data")
    # The program is packed without the profile of the workspace, with which its dependencies are built already.
    manifest = folder / f"{package}-{version}/Cargo.toml"
    if "[profile.dev.package" not in manifest.read_text():
        manifest.write_text(manifest.read_text() + '\n[profile.dev.package."*"]\nopt-level = 2\n')
    return folder / f"{package}-{version}"


def main():
    ptxas = sys.argv[1] if sys.argv[1:] else None
    with tempfile.TemporaryDirectory() as folder:
        library, program = pack("ashore", Path(folder)), pack("ashore-cli", Path(folder))
        expect("the packed library", check(library), True)
        patch = f'patch.crates-io.ashore.path="{library}"'
        # The lock of the packed program names the library that would be published.
        (program / "Cargo.lock").unlink()
        shutil.copy(ROOT / "Cargo.lock", program)
        expect("the packed program", cargo("check", "--config", patch, "--target-dir", ROOT / "target", folder=program), True)

        with open(library / "kernels/gather.ptx", "a") as kernel:
            kernel.write("\n")
        expect("a changed kernel", check(library), False, f"error: ashore@", CHANGED)
        expect("a changed kernel, stale", check(library, ASHORE_KERNELS="stale"), True, "warning: ashore@", CHANGED)
        expect("a changed kernel without CUDA", check(library, "--no-default-features"), True)
        shutil.copy(ROOT / "kernels/gather.ptx", library / "kernels")
        (library / "kernels/new.cu").write_text("")
        expect("a kernel without a sum", check(library), False, "kernels/new.cu changed: run just ptx")
        (library / "kernels/new.cu").unlink()

        expect("a wrong setting", check(library, ASHORE_KERNELS="yes"), False, "ASHORE_KERNELS=yes is unknown")
        expect("no architecture", check(library, ASHORE_KERNELS="build"), False, "needs ASHORE_CUDA_ARCHS")
        build = {"ASHORE_KERNELS": "build", "ASHORE_CUDA_ARCHS": ",".join(ARCHITECTURES)}
        expect("no ptxas", check(library, **build, PTXAS="/nowhere/ptxas"), False, "PTXAS=/nowhere/ptxas")
        if ptxas:
            expect("machine code", check(library, **build, PTXAS=ptxas), True)
            # The simulated driver takes no machine code, as a GPU of another architecture: the library falls back to PTX.
            example = ["run", "--quiet", "--features", "cudarc", "--example", "05_gpu_memory", "--", "--simulated"]
            expect("machine code, refused by the driver", cargo(*example, **build, PTXAS=ptxas), True)
            version = cargo("run", "--quiet", "-p", "ashore-cli", "--", "--version", **build, PTXAS=ptxas)
            expect("the program's version", version, True, *ARCHITECTURES)


if __name__ == "__main__":
    main()
