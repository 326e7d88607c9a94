#!/usr/bin/env bash
# run.sh STAGE OUT    runs a stage, or `all`, beside the programs of the kit; OUT/STAGE.json says what came out
#
# A stage takes 8 minutes at most. Its result is on disk before the next one begins, and a stage that has passed is not run
# again: to go on after a loss, run `all` with the same OUT. The most telling stages come first.
set -uo pipefail
stages=(machine kernels suite torch limits staging dcp speeds demo)
kit=$(cd "$(dirname "$0")" && pwd)
stage=${1:?usage: run.sh STAGE OUT} out=${2:?usage: run.sh STAGE OUT}
mkdir -p "$out"
export ASHORE_REQUIRE_GPU=1 RUST_BACKTRACE=1

machine() {
    cat "$kit/commit"
    uname -a
    nproc
    free -g
    df -h "$out"
    nvidia-smi
    nvidia-smi topo -m || true
    "$kit/ashore" --version
    command -v python3
    python3 -c 'import sys, torch; print(sys.version, torch.__version__, torch.cuda.is_available())' || true
}
# The kernels against plain Rust, on the device.
kernels() { "$kit/kernels" kernels:: --skip ptx:: --test-threads 4; }
# The tests of CUDA staging, the same as on the simulated driver.
suite() { "$kit/suite" cuda --test-threads 4; }
# State of torch and of the driver alone, through the C face. `python3` is the machine's own, and must have torch.
torch() {
    local common=(--face "$kit/libashore_face.so" --dir "$out/scratch" --out "$out/torch.jsonl") rc=0
    python3 "$kit/drive.py" --backend driver --saves 30 --seconds 90 "${common[@]}" || rc=1
    python3 "$kit/drive.py" --backend torch --saves 100 --seconds 320 "${common[@]}" || rc=1
    return "$rc"
}
# Beside torch's own saves, on the same tensors. The same `python3`.
dcp() {
    local common=(--face "$kit/libashore_face.so" --dir "$out/scratch" --out "$out/dcp.jsonl")
    python3 "$kit/dcp.py" --scale W3=0.25 --seconds 440 "${common[@]}"
}
limits() { "$kit/ashore" bench limits --device cuda:0 --dir "$out/scratch" --json; }
staging() { "$kit/ashore" bench staging --device cuda:0 --dir "$out/scratch" --json; }
# The kernels beside the device's own copies. Needs Python 3, and nothing else.
speeds() { python3 "$kit/kernels.py" "$kit"; }
demo() { "$kit/ashore" demo --device cuda:0 --dir "$out/scratch"; }

# Lines as a JSON array of strings.
lines() {
    tr -d '\000-\010\013-\037\177' | sed 's/\\/\\\\/g; s/"/\\"/g; s/\t/\\t/g; s/^/"/; s/$/"/' | paste -sd, | sed 's/^/[/; s/$/]/'
}

run() {
    local begin=$SECONDS rc=0 log
    if grep -qs '"rc": 0,' "$out/$1.json"; then
        echo "run: $1 has passed before"
        return 0
    fi
    log=$(mktemp)
    mkdir -p "$out/scratch"
    # A group of its own, so that what a stage left running ends with it.
    timeout --kill-after 10 480 bash -euo pipefail -c "$(declare -f "$1"); kit='$kit' out='$out'; $1" >"$log" 2>&1 </dev/null || rc=$?
    # Nothing that was run is nothing that passed.
    if [ "$rc" = 0 ] && grep -q '^running 0 tests' "$log"; then
        rc=3
    fi
    printf '{"stage": "%s", "rc": %d, "seconds": %d, "commit": "%s", "output": %s}\n' \
        "$1" "$rc" $((SECONDS - begin)) "$(cat "$kit/commit")" "$(tail -c 200000 "$log" | lines)" >"$out/$1.json.new"
    mv "$out/$1.json.new" "$out/$1.json"
    sync "$out/$1.json"
    rm -rf "$log" "$out/scratch"
    echo "run: $1 rc=$rc $((SECONDS - begin)) s"
    return "$rc"
}

if [ "$stage" != all ]; then
    [[ " ${stages[*]} " == *" $stage "* ]] || { echo "stages: ${stages[*]} all"; exit 2; }
    run "$stage"
    exit
fi
failed=0
for stage in "${stages[@]}"; do
    run "$stage" || failed=1
done
exit "$failed"
