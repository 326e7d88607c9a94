#!/usr/bin/env bash
# Makes `gpu-kit`: stripped programs and `run.sh`, for a machine with a GPU but without Rust, a toolkit or a network.
set -euo pipefail
cd "$(dirname "$0")/../.."
kit=gpu-kit
rm -rf "$kit"
mkdir -p "$kit"

# The newest test program called NAME of PACKAGE.
test_program() {
    cargo test --release --quiet --no-run --message-format=json -p "$1" --test "$2" |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -1
}

cargo build --release --quiet -p ashore-cli -p ashore-face
suite=$(test_program ashore all)
kernels=$(test_program fakecuda all)
strip -o "$kit/ashore" target/release/ashore
strip -o "$kit/libashore_face.so" target/release/libashore_face.so
strip -o "$kit/suite" "$suite"
strip -o "$kit/kernels" "$kernels"
cp tests/gpu/run.sh tests/gpu/*.py benches/peers/{tree,workload}.py kernels/*.ptx "$kit"
git rev-parse HEAD >"$kit/commit"
size=$(du -sm "$kit" | cut -f1)
ls -l "$kit"
[ "$size" -lt 40 ] || { echo "gpu-kit: $size MiB, at most 40 are allowed"; exit 1; }
