#!/usr/bin/env bash
# kit.sh [--debug]: makes `gpu-kit`, stripped programs and `run.sh`, for a machine with a GPU but without Rust, a toolkit or a network.
# With --debug the programs are those of `cargo test`, to try the kit itself.
set -euo pipefail
cd "$(dirname "$0")/../.."
kit=gpu-kit release=--release folder=target/release
if [ "${1-}" = --debug ]; then
    release= folder=target/debug
fi
rm -rf "$kit"
mkdir -p "$kit"

# Prints the test program built from a file. Features are those of the whole workspace, so that nothing is
# built twice.
test_program() {
    cargo test $release --quiet --no-run --message-format=json --workspace |
        sed -n "s|.*\"src_path\":\"$PWD/$1\".*\"executable\":\"\([^\"]*\)\".*|\1|p" | tail -1
}

cargo build $release --quiet -p ashore-cli -p ashore-capi -p ashore-python
suite=$(test_program tests/all/main.rs)
kernels=$(test_program fakecuda/tests/all/main.rs)
strip -o "$kit/ashore" "$folder/ashore"
strip -o "$kit/libashore.so" "$folder/libashore.so"
strip -o "$kit/suite" "$suite"
strip -o "$kit/kernels" "$kernels"
# The package of the wheel, for torch_loop.py.
mkdir "$kit/python"
cp -r python/ashore "$kit/python"
find "$kit/python" -name __pycache__ -prune -exec rm -r {} +
strip -o "$kit/python/ashore/_ashore.abi3.so" "$folder/lib_ashore.so"
cp checks/gpu/run.sh checks/gpu/*.py benches/peers/{torch_loop,report,tree,workload}.py kernels/*.ptx kernels/SHA256SUMS "$kit"
git rev-parse HEAD >"$kit/commit"
size=$(du -sm "$kit" | cut -f1)
ls -l "$kit"
if [ -z "$release" ]; then
    cp target/debug/deps/libfakecuda.so "$kit"
    exit
fi
[ "$size" -lt 40 ] || { echo "gpu-kit: $size MiB, at most 40 are allowed"; exit 1; }
