# The checks of this project. `.ci/install` installs what the recipes need beyond a Rust toolchain.

set shell := ["bash", "-euo", "pipefail", "-c"]

tools := env("CI_TOOLS", env("HOME") / ".cache/ashore-tools")
nightly := env("CI_NIGHTLY", "nightly")
export PATH := tools / "bin:" + env("PATH") + ":/usr/sbin:/sbin"

[private]
default:
    @just --list --unsorted

# Runs the README's test command: needs only a Rust toolchain.
test:
    cargo test --workspace

# Formatting, circles of imports, clippy, documentation, licences.
lint:
    checks/circles.py src fakecuda/src cli/src capi/src
    cargo fmt --all --check
    cargo fmt --check --manifest-path burn/Cargo.toml
    cargo fmt --check --manifest-path candle/Cargo.toml
    cargo fmt --check --manifest-path checks/stock/cudarc/Cargo.toml
    cargo fmt --check --manifest-path checks/stock/cognis/Cargo.toml
    cargo fmt --check --manifest-path benches/compression/Cargo.toml
    cargo clippy --workspace --all-targets --all-features -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --quiet --workspace --all-features --no-deps
    cargo deny --log-level error --workspace --all-features check licenses bans sources
    # burn depends on a crate under the MPL-2.0, `colored`, which a program that uses burn has anyway.
    cargo deny --log-level error --manifest-path burn/Cargo.toml --config "$PWD/deny.toml" check sources
    cargo deny --log-level error --manifest-path candle/Cargo.toml --config "$PWD/deny.toml" check licenses sources
    # burn's dependencies are built beside ours and never linked into anything, so their licences are not
    # checked.
    cargo deny --log-level error --manifest-path checks/stock/cudarc/Cargo.toml --config "$PWD/deny.toml" check sources
    cargo deny --log-level error --manifest-path checks/stock/cognis/Cargo.toml --config "$PWD/deny.toml" check licenses sources
    cargo deny --log-level error --manifest-path benches/compression/Cargo.toml --config "$PWD/deny.toml" check licenses sources

# A saved step directory, read by Python's safetensors, numpy, torch's HuggingFaceStorageReader, and the reader of docs/format.md;
# the last one reads the samples of every version, too.
stock: (stock_reader tools / "stock/bin/python -W ignore::UserWarning checks/stock/check.py") stock_ranks
    "{{ tools }}/stock/bin/python" checks/stock/reader.py tests/all/format/golden/*/step-*

# A step that three processes save, read by Python's safetensors and numpy, and put together by torch, under torchrun, too; and what
# `ashore convert` makes of it: whole tensors, read by all readers, and shards of other numbers of ranks.
stock_ranks:
    #!/usr/bin/env bash
    set -euo pipefail
    root=$(mktemp -d)
    trap 'rm -rf "$root"' EXIT
    cargo build --quiet --example stock_ranks
    cargo build --quiet -p ashore-cli
    check=("{{ tools }}/stock/bin/python" -W ignore::UserWarning checks/stock/check_ranks.py)
    "${check[@]}" --save target/debug/examples/stock_ranks "$root"
    step="$root/step-7"
    for ranks in 1 2 5; do
        target/debug/ashore convert "$step" --to ranks "$ranks" "$root/for-$ranks"
    done
    target/debug/ashore convert "$step" --to hf "$root/one-file"
    target/debug/ashore convert "$step" --to hf --shard-size 100 "$root/files"
    target/debug/ashore convert "$root/for-5" --to hf --shard-size 1kB "$root/and-back"
    "${check[@]}" "$root"/for-*
    "${check[@]}" --whole "$root/one-file" "$root/files" "$root/and-back"

# The wheel of the Python package: its tests, the examples in its docstrings, docs/python.md and docs/jax.md, and its types.
python *arguments:
    python/check.sh "{{ tools }}" python3 dev {{ arguments }}

# The same with a release wheel, and with the tests that take minutes, under every Python that pyenv has from 3.10 on.
python-all:
    #!/usr/bin/env bash
    set -euo pipefail
    for version in 3.10 3.11 3.12 3.13; do
        python=$(compgen -G "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version.*/bin/python$version" | tail -1)
        python/check.sh "{{ tools }}" "${python:-python$version}" release --nightly
    done

# The wheel for other machines, in target/wheels: it runs with every glibc from 2.28 on. Zig links it.
wheel:
    #!/usr/bin/env bash
    set -euo pipefail
    zig="{{ tools }}/zig"
    [ -x "$zig/bin/maturin" ] || { python3 -m venv "$zig"; "$zig/bin/pip" -q --disable-pip-version-check install maturin==1.16.0 ziglang==0.15.2; }
    cd python
    PATH="$zig/bin:$PATH" maturin build --release --zig --compatibility manylinux_2_28

# The crate for candle, whose tests kill a training. Then the steps of `stock`, read by candle alone.
candle: (crate "candle" "test") (stock_reader "just crate candle run --example read_stock --")

# The crate for burn, whose tests kill a training. Minutes when burn is not built yet.
burn: (crate "burn" "test --features learner")

[private]
crate name command *arguments:
    cargo {{ command }} --quiet --locked --manifest-path "{{ name }}/Cargo.toml" --target-dir "{{ tools }}/{{ name }}" {{ arguments }}

# Lints the crates for candle and burn. The half of candle that needs nvcc to build is checked with a script in its place.
adapters-lint:
    #!/usr/bin/env bash
    set -euo pipefail
    export RUSTDOCFLAGS="-D warnings"
    just crate burn clippy --features learner --all-targets -- -D warnings
    just crate burn doc --features learner --no-deps
    just crate candle clippy --all-targets -- -D warnings
    just crate candle doc --no-deps
    PATH="$PWD/candle/check:$PATH" CUDA_COMPUTE_CAP=80 just crate candle clippy --features cuda --all-targets -- -D warnings

# Graphs of cognis, whose engine owns the checkpointer trait, over stores of ours.
cognis:
    cargo run --quiet --locked --manifest-path checks/stock/cognis/Cargo.toml --target-dir "{{ tools }}/cognis"

# Checks the header of the C interface, and runs its programs, examples and page with gcc and clang, under ASan and UBSan, too.
capi:
    #!/usr/bin/env bash
    set -euo pipefail
    (cd capi && cbindgen --quiet --config cbindgen.toml --verify --output include/ashore.h) || {
        echo "capi: the header is another one: just capi-header writes it" >&2
        exit 1
    }
    cargo build --quiet -p ashore-capi
    capi/tests/run.py target/debug --torch "$(echo "{{ tools }}"/stock/lib/python3*/site-packages/torch)" --require-torch

# Writes `capi/include/ashore.h` from the source.
capi-header:
    cd capi && cbindgen --quiet --config cbindgen.toml --output include/ashore.h

# Installs the C interface as its users do, by cargo-c, and builds programs with pkg-config and CMake. Minutes.
capi-install:
    #!/usr/bin/env bash
    set -euo pipefail
    # Newer ones need a newer compiler.
    version=0.10.24+cargo-0.98.0
    if ! cargo install --root "{{ tools }}" --list | grep -qxF "cargo-c v$version:"; then
        CARGO_PROFILE_DEV_DEBUG=false cargo install --quiet --locked --debug --root "{{ tools }}" cargo-c --version "$version"
    fi
    root=$(mktemp -d)
    trap 'rm -rf "$root"' EXIT
    cargo cinstall --quiet --locked --release -p ashore-capi --prefix "$root" --libdir "$root/lib" --target-dir target/capi
    capi/tests/installed.py "$root"

# Builds a program with cudarc as candle links it, or with cubecl-cuda (burn) beside ours, and with our sources over its types.
cudarc-check:
    #!/usr/bin/env bash
    set -euo pipefail
    for peer in candle cubecl; do
        cargo check --quiet --manifest-path checks/stock/cudarc/Cargo.toml --target-dir "{{ tools }}/cudarc" --features "$peer"
    done

[private]
stock_reader command:
    #!/usr/bin/env bash
    set -euo pipefail
    root=$(mktemp -d)
    trap 'rm -rf "$root"' EXIT
    cargo run --quiet --example stock_writer -- "$root"
    {{ command }} "$root"

# Runs the example of every interface that comes from another system; each fails when what it shows is not true.
examples:
    #!/usr/bin/env bash
    set -euo pipefail
    cargo build --quiet --examples
    for example in examples/from_*.rs; do
        cargo run --quiet --example "$(basename "$example" .rs)"
    done
    cargo run --quiet --features cudarc --example 05_gpu_memory -- --simulated
    # Interrupted, and started again.
    cargo run --quiet --features tokio --example 06_tokio -- --interrupt
    cargo run --quiet --features tokio --example 06_tokio

# Rebuilds the committed PTX of `kernels/` with a compiler of a fixed version. Installs 60 MB; needs no GPU.
ptx: (kernels "")

# Checks that the kernels compile to the committed PTX, byte for byte, and what ptxas makes of it: no spills, at most 64 registers.
ptx-check: (kernels "--check") (ptxas "python3 kernels/build.py --assemble")

# Runs COMMAND with the path of ptxas as its last argument.
[private]
ptxas command:
    #!/usr/bin/env bash
    set -euo pipefail
    want=nvidia-cuda-nvcc==13.0.88 venv="{{ tools }}/ptxas"
    if ! "$venv/bin/pip" --disable-pip-version-check freeze 2>/dev/null | grep -qx "$want"; then
        python3 -m venv --clear "$venv"
        "$venv/bin/pip" -q --disable-pip-version-check install --no-deps "$want"
    fi
    {{ command }} "$venv"/lib/python3*/site-packages/nvidia/cu13/bin/ptxas

[private]
kernels arguments:
    #!/usr/bin/env bash
    set -euo pipefail
    want=nvidia-cuda-nvrtc-cu12==12.4.127 venv="{{ tools }}/nvrtc"
    if ! "$venv/bin/pip" --disable-pip-version-check freeze 2>/dev/null | grep -qx "$want"; then
        python3 -m venv --clear "$venv"
        "$venv/bin/pip" -q --disable-pip-version-check install --no-deps "$want"
    fi
    "$venv/bin/python" kernels/build.py {{ arguments }}

# `gpu-kit/`: programs and `run.sh` for a machine with a GPU but without Rust or a network.
gpu-kit:
    checks/gpu/kit.sh

# Runs the kit's brief list on the simulated driver, with little state and no figures. A stage that hangs is killed.
gpu-brief:
    #!/usr/bin/env bash
    set -euo pipefail
    checks/gpu/kit.sh --debug >/dev/null
    root=$(mktemp -d)
    trap 'rm -rf "$root"' EXIT
    mkdir "$root/lib"
    ln -s "$PWD/gpu-kit/libfakecuda.so" "$root/lib/libcuda.so.1"
    export KIT_SIMULATED=1 KIT_PYTHON="{{ tools }}/stock/bin/python" LD_LIBRARY_PATH="$root/lib" TMPDIR="$root"
    gpu-kit/run.sh brief "$root/out"
    checks/gpu/check_stages.py

# Runs the scenarios of `checks/gpu/drive.py` on the simulated driver: wrong restored bytes fail it.
gpu-drive *arguments="--saves 8 --seconds 25":
    #!/usr/bin/env bash
    set -euo pipefail
    cargo build --quiet -p ashore-capi -p fakecuda
    root=$(mktemp -d)
    trap 'rm -rf "$root"' EXIT
    # ashore looks for the driver by this name first.
    mkdir "$root/lib"
    ln -s "$PWD/target/debug/libfakecuda.so" "$root/lib/libcuda.so.1"
    export LD_LIBRARY_PATH="$root/lib"
    checks/gpu/drive.py --backend driver --library libcuda.so.1 --face target/debug/libashore.so --dir "$root/steps" {{ arguments }}

# Explores every interleaving of the fence on a GPU, for small sizes, and what breaks without each rule. Minutes; `--deep` an hour.
model *arguments: (commit-model arguments)
    checks/model/fence.py {{ arguments }}

# Explores every interleaving of a commit, by several ranks and in an object store, for small sizes, and what breaks without each
# rule. `--deep` takes minutes.
commit-model *arguments:
    checks/model/commit.py {{ arguments }}
    checks/model/store.py {{ arguments }}

# Explores every interleaving of a chain of published versions, for small sizes, and what breaks without each rule.
chain-model *arguments:
    checks/model/chain.py {{ arguments }}

# Simulates commits by several ranks with faults of every kind: 100,000 seeds of up to 64 ranks, 1,000 of 1,000, 20 of 10,000. Minutes.
simulate:
    ASHORE_SIMULATION_SEEDS=100000 cargo test --release --lib -- several::simulation::ranks_that_die --nocapture
    cargo test --release --lib -- several::simulation::a_thousand several::simulation::ten_thousand --ignored --nocapture --test-threads 1

# Prints the tables of docs/scale.md: messages, bytes and memory of a save by the number of ranks.
scale:
    cargo test --release --lib -- several::simulation::scale --ignored --nocapture --test-threads 1

# Writes the public API, one item a line, to `docs/api.txt`: a change of it shows in the diff.
api: (listing "docs/api.txt")

# Checks that `docs/api.txt` matches the source.
api-check:
    #!/usr/bin/env bash
    set -euo pipefail
    now=$(mktemp)
    trap 'rm -f "$now"' EXIT
    just listing "$now"
    diff -u docs/api.txt "$now" || { echo "api-check: the public API has changed: \`just api\` writes it down" >&2; exit 1; }

# Lists the API from rustdoc's JSON, in a format that the compiler and cargo-public-api 0.52.0 agree on: that of this nightly.
[private]
listing file:
    #!/usr/bin/env bash
    set -euo pipefail
    toolchain={{ nightly }}
    if [[ "$(rustc "+$toolchain" --version)" != *2026-05-19* ]]; then
        toolchain=nightly-2026-05-20
        rustup toolchain list | grep -q "^$toolchain" || rustup -q toolchain install "$toolchain" --profile minimal
    fi
    RUSTDOCFLAGS="--cap-lints allow" cargo "+$toolchain" public-api --package ashore --all-features --target-dir target/api \
        --color=never -sss >"{{ file }}"

# Looks for undefined behaviour in the code that owns or hands out memory.
miri *filters="state:: memory:: completion:: staging::":
    MIRIFLAGS="-Zmiri-disable-isolation" PROPTEST_CASES=4 RUSTFLAGS="--cfg rustix_use_libc" \
        .ci/strict cargo +{{ nightly }} miri test --lib -- {{ filters }}

# Explores every interleaving of completions, slabs, late copies, and a prune beside a publish, up to three preemptions. Nearly all of the
# time is the build.
loom:
    RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=3 CARGO_PROFILE_TEST_OPT_LEVEL=0 .ci/strict \
        cargo test --config 'profile.dev.package."*".opt-level=0' --lib --target-dir target/loom -- models

# Looks for data races in code that passes memory between threads. 9 minutes of one core, nearly all of them for the build.
tsan:
    #!/usr/bin/env bash
    set -euo pipefail
    # The standard library and the simulated driver are instrumented; the driver's kernels, which a C compiler
    # builds, are not. The driver finds the sanitizer in the program, which exports no other symbols: the
    # driver must find its own.
    export RUSTFLAGS="-Zsanitizer=thread -Clink-arg=-Wl,--export-dynamic-symbol=__tsan_*"
    export TSAN_OPTIONS="exitcode=66" FAKECUDA_SPAN_GB=1 CARGO_INCREMENTAL=0
    test=(cargo +{{ nightly }} test --config 'profile.dev.package."*".opt-level=1' -Zbuild-std --target x86_64-unknown-linux-gnu)
    test+=(--target-dir target/tsan)
    # In these tests the program's streams race on purpose: with each other, or with copies that no fence made
    # them wait for. So do those of `cuda::torn`, which is left out for that: its only report is of two fills.
    skip=(cuda_streams_that_write_after_a_fence_wait_on_the_gpu cuda_streams_go_on_before_anything_has_left_the_gpu
        cuda_tensors_written_before_the_fence_are_found_out_by_the_first_saves)
    .ci/strict "${test[@]}" --lib -- memory:: staging:: completion::
    .ci/strict "${test[@]}" --test all -- fence:: cuda::{staging,gather,late_copies,batch,waits,borrowed,handed_in,restoring,cudarc} "${skip[@]/#/--skip=}"

# Runs every fuzz target, for SECONDS together: first over the kept inputs and the seeds, then over new ones.
fuzz seconds="60":
    #!/usr/bin/env bash
    set -euo pipefail
    targets=($(cargo +{{ nightly }} fuzz list))
    each=$(( ({{ seconds }} + ${#targets[@]} - 1) / ${#targets[@]} ))
    for target in "${targets[@]}"; do
        corpus="fuzz/corpus/$target"
        mkdir -p "$corpus"
        tar -xzf "fuzz/kept/$target.tar.gz" -C "$corpus"
        cargo +{{ nightly }} fuzz run "$target" "$corpus" "fuzz/seeds/$target" -- \
            -max_total_time="$each" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1
    done

# Keeps the inputs that `just fuzz` has found, as few as reach the same code: writes `fuzz/kept/`.
fuzz-keep:
    #!/usr/bin/env bash
    set -euo pipefail
    for target in $(cargo +{{ nightly }} fuzz list); do
        least=$(mktemp -d)
        cargo +{{ nightly }} fuzz run "$target" "$least" "fuzz/corpus/$target" "fuzz/seeds/$target" -- -merge=1 -timeout=10
        tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --mode=0644 -C "$least" -cf - $(ls "$least") \
            | gzip -9n >"fuzz/kept/$target.tar.gz"
        rm -rf "$least"
    done

# Breaks each promise once: the suite must notice.
mutants *arguments:
    checks/mutants.py {{ arguments }}

# Makes the changes that cargo-mutants knows, one at a time, and lists those that no test notices: an eighth a night. The unit tests look first,
# and the integration tests at what these let pass. Exits 2 when something was missed.
cargo-mutants shard="0/8" *arguments:
    #!/usr/bin/env bash
    set -euo pipefail
    [ "$(cargo mutants --version 2>/dev/null)" = "cargo-mutants 27.1.0" ] || \
        CARGO_PROFILE_DEV_DEBUG=false cargo install --quiet --locked --debug --root "{{ tools }}" cargo-mutants@27.1.0
    mutants=(cargo mutants --package ashore --output target/cargo-mutants --shard {{ shard }} --baseline skip --timeout 600 {{ arguments }})
    export CARGO_PROFILE_DEV_DEBUG=none CARGO_INCREMENTAL=1
    CARGO_PROFILE_TEST_OPT_LEVEL=0 "${mutants[@]}" -- --lib || [ $? -lt 4 ]
    "${mutants[@]}" --iterate -- --test all

# Kills the program at every call by which it changes files, and starts it again. Needs Linux 5.5.
kill:
    checks/kill/kill.py

# Kills one process, and jobs of three ranks, at random moments over one directory each.
kill-moments kills="200": rank-programs
    checks/kill/moments.py target/debug/examples/rank --kills {{ kills }}

# Uses one root in every way at once, by two processes of four threads each.
abuse seconds="60":
    cargo build --quiet --example abuse
    d=$(mktemp -d) && trap 'rm -rf "$d"' EXIT && target/debug/examples/abuse "$d/run" {{ seconds }}

# The same while the wall clock and the times of files jump by up to ten years, forwards and back. Needs libfaketime.
jumps seconds="20":
    cargo build --quiet --example abuse
    d=$(mktemp -d) && trap 'rm -rf "$d"' EXIT && checks/abuse/jumps.py target/debug/examples/abuse "$d/run" {{ seconds }}

# Saves very many times in one process while calls fail, and looks whether anything grows.
soak saves="5000":
    cargo build --quiet --example soak
    d=$(mktemp -d -p /dev/shm) && trap 'rm -rf "$d"' EXIT && target/debug/examples/soak "$d/run" {{ saves }}

# Runs coordinators between processes: in a directory, through an etcd server, under mpirun; kills ranks at calls of a commit, and cuts
# their links (as root); and continues a sharded training under torchrun and mpirun with other numbers of ranks. A sample of the kills.
ranks: rank-programs
    checks/ranks/ranks.py target/debug/examples/rank directory etcd mpi
    checks/ranks/kills.py target/debug/examples/rank directory etcd --sample 50
    checks/ranks/links.py target/debug/examples/rank
    checks/ranks/train.py target/debug/examples/07_ranks
    checks/ranks/stages.py target/debug/examples/07_ranks --mpirun --torchrun "{{ tools }}/stock/bin/torchrun" --sample 4

# Kills ranks at every call of a commit, and a training at every stage of a save.
rank-kills: rank-programs
    checks/ranks/kills.py target/debug/examples/rank directory etcd
    checks/ranks/stages.py target/debug/examples/07_ranks --mpirun --torchrun "{{ tools }}/stock/bin/torchrun"

[private]
rank-programs:
    cargo build --quiet --example rank --features etcd,mpi
    cargo build --quiet --example 07_ranks

# Saves to servers of object stores, with faults on the way, and kills ranks: moto, Azurite, s3s-fs. At most MINUTES.
stores minutes="5" *arguments:
    cargo build --quiet -p ashore-cli
    cargo build --quiet --example rank
    cargo test --quiet --test servers --no-run
    checks/stores/run.py --minutes {{ minutes }} "{{ tools }}" checks/stores/all.sh {{ arguments }}

# Tests full and read-only file systems: ext4, xfs, btrfs. Needs root and loop devices.
mounts:
    .ci/strict unshare --mount --propagation private cargo test --test mounts -- --nocapture --test-threads 1

# Loads the pages of the program in a browser, and has Prometheus' own tool check metrics, dashboard and alerts.
pages:
    .ci/strict cargo test -p ashore-cli --test pages -- --ignored
    ASHORE_PROMTOOL="{{ tools }}/prometheus/usr/bin/promtool" .ci/strict cargo test --test telemetry metrics:: -- --ignored
    cargo run --quiet --features metrics --example 09_metrics | "{{ tools }}/prometheus/usr/bin/promtool" check metrics

# Builds the book of docs/ into target/book, and checks every link and anchor in it. `cargo test` runs its commands.
book:
    mdbook build docs/book
    checks/book.py target/book README.md

# Opens traces of real runs in Perfetto's engine: on the host, on the simulated driver, killed. Needs Chromium.
trace:
    cargo build --quiet -p ashore-cli -p fakecuda
    checks/trace/perfetto.py "{{ tools }}/perfetto/ui" target/debug/ashore target/debug/libfakecuda.so

# Takes the power from real file systems at recorded moments, of one process and of three ranks. Needs root and loop devices.
power states="300": rank-programs
    unshare --mount --propagation private checks/power/power.py target/debug/examples/rank --states {{ states }}

# Shows which broken promises the recorded disks see, and fails if one that they saw before is not seen.
power-controls states="1500":
    RUSTFLAGS="--cfg mutants" cargo build --quiet --example rank --features etcd --target-dir target/mutants
    unshare --mount --propagation private checks/power/controls.py target/mutants/debug/examples/rank --states {{ states }}

# Saves a tensor of more than 4 GiB through a small arena, and prints the peak of memory. Writes 4.5 GiB.
large:
    .ci/strict cargo test --release --test large -- --ignored --nocapture

# Checks that what `cargo package` packs builds, and what the build reports for kernels that do not match their sums.
package: (ptxas "checks/package.py")

# Checks with the oldest toolchain of Cargo.toml. Clippy's `incompatible_msrv` looks for newer functions in every `just lint`.
msrv:
    #!/usr/bin/env bash
    set -euo pipefail
    version=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    rustup -q toolchain install "$version" --profile minimal
    cargo "+$version" check --workspace --all-features --target-dir target/msrv

# Checks each feature alone, none, and the default ones. Minutes.
features:
    [ "$("{{ tools }}/bin/cargo-hack" --version 2>/dev/null)" = "cargo-hack 0.6.46" ] || \
        CARGO_PROFILE_DEV_DEBUG=false cargo install --quiet --locked --debug --root "{{ tools }}" cargo-hack@0.6.46
    cargo hack check --package ashore --package ashore-cli --each-feature --target-dir target/features

# Draws the picture in the README: one save beside the training steps of a real run of the demo. Needs a quiet machine.
picture:
    #!/usr/bin/env bash
    set -euo pipefail
    cargo build --release --quiet -p ashore-cli
    root=$(mktemp -d -p target)
    trap 'rm -rf "$root"' EXIT
    target/release/ashore demo --steps 200 --dir "$root/run" --picture docs/overlap.svg

# Saves to an object store and reads back: its URL, MiB, rounds, writers. The environment has endpoint and keys.
store-bench root mib="1024" rounds="3" writers="4":
    cargo bench --package ashore --bench store --features s3,gcs,azure -- {{ root }} {{ mib }} {{ rounds }} {{ writers }}

# Runs the benchmarks.
bench *arguments:
    cargo bench --workspace -- {{ arguments }}

# Runs what `.ci/run` runs after the tests: no check may be left out.
ci: (timed "lint api-check ptx-check commit-model gpu-drive gpu-brief examples pages trace book capi stock python candle cognis cudarc-check miri loom fuzz:60 kill kill-moments abuse jumps soak ranks stores mounts power package")

# Runs the checks that take too long for every change.
nightly: (timed "ci mutants python-all burn adapters-lint tsan model msrv features simulate capi-install kill-moments:10000 abuse:3600 jumps:600 soak:100000 power:10000 power-controls")
    just fuzz 3600
    just rank-kills
    ASHORE_STORE_ROUNDS=1000 just stores 120
    just mutants --by crash:: ShardFsync FileFsync AttemptFsync ParentFsync OwnerFsync TrashFsync ConfirmFsync NoReplace PublishFirst TruncateLate
    ASHORE_CRASH_ROUNDS=10 cargo test --release --test all crash -- --nocapture
    PROPTEST_CASES=20000 cargo test --workspace --release
    cargo test --workspace --release -- --ignored

[private]
timed recipes:
    #!/usr/bin/env bash
    set -euo pipefail
    times=()
    for recipe in {{ recipes }}; do
        echo "== $recipe"
        start=$SECONDS
        just ${recipe//:/ }
        times+=("$recipe $((SECONDS - start)) s")
    done
    printf 'just: %s\n' "${times[@]}"

# Measures saves by torch, safetensors, Orbax and tensorstore beside ours. Needs a quiet machine, and 4 GiB of space under target.
peers *arguments="--rounds 3":
    #!/usr/bin/env bash
    set -euo pipefail
    benches/peers/setup.sh "{{ tools }}"
    cargo build --release -p ashore-cli
    mkdir -p target/peers
    for workload in large small; do
        benches/peers/run.py --envs "{{ tools }}" --dir target/peers --ashore target/release/ashore \
            --workload "$workload" {{ arguments }}
    done

# Measures uploads and downloads by ashore and by clients of S3, to one server, by plain HTTP and TLS. Needs Debian's stunnel4.
store-peers *arguments="--rounds 3":
    #!/usr/bin/env bash
    set -euo pipefail
    bench=(cargo bench --quiet --package ashore --bench store --features s3 --no-run --message-format json)
    program=$("${bench[@]}" | python3 -c 'import json, sys; print(next(x["executable"] for x in map(json.loads, sys.stdin) if x.get("executable")))')
    mkdir -p target/peers
    for transport in "" --tls; do
        "{{ tools }}/stores/bin/python" benches/peers/stores.py --tools "{{ tools }}" --ashore "$program" --dir target/peers $transport {{ arguments }}
    done

# Measures the effect of lossless compression on the time to durable: `docs/decisions/0001-compression.md`. Five minutes, disk and all cores.
compression:
    #!/usr/bin/env bash
    set -euo pipefail
    cargo build --release --quiet -p ashore-cli
    study=(--release --quiet --locked --manifest-path benches/compression/Cargo.toml --target-dir target/compression)
    cargo build "${study[@]}"
    root=$(mktemp -d -p target)
    trap 'rm -rf "$root"' EXIT
    target/release/ashore demo --dir "$root" --steps 300
    cargo run "${study[@]}" -- "$root"
