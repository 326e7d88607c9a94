#!/usr/bin/env bash
# run.sh STAGE OUT    runs a stage, or `all`, beside the programs of the kit; OUT/STAGE.json says what came out
#
# A stage takes 8 minutes at most. Its result is on disk before the next one begins, and a stage that has passed is not run
# again: to go on after a loss, run `all` with the same OUT. The most telling stages come first. A stage that measures several
# things has each on disk as soon as it ends, in OUT/STAGE.WHAT.json.
#
# KIT_SIMULATED=1 tries the kit where there is no GPU, on a simulated driver that LD_LIBRARY_PATH leads to: little state, no figures.
set -uo pipefail
stages=(machine kernels suite limits torch demo staging loops dcp seldom large speeds)
kit=$(cd "$(dirname "$0")" && pwd)
stage=${1:?usage: run.sh STAGE OUT} out=${2:?usage: run.sh STAGE OUT}
mkdir -p "$out"
export RUST_BACKTRACE=1
tiny=${KIT_SIMULATED:+1}
if [ -z "$tiny" ]; then export ASHORE_REQUIRE_GPU=1; fi

machine() {
    cat "$kit/commit"
    uname -a
    nproc
    free -g || true
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
suite() {
    # One by one: while one test captures a graph, no other thread may do what a capture does not bear.
    "$kit/suite" cuda --test-threads 1
}
# measure NAME VERB ...: a run of the program, on disk when it ends. One that has ended well is not made again; one that fails
# does not keep the others from being made.
measure() {
    local to="$out/$1.json" small=()
    shift
    if [ -n "$tiny" ] && [ "$1" = bench ]; then
        # Of a flag that is given twice the last counts.
        small=(--rounds 1 --arena 1MiB --chunk 64KiB --scale 0.00002)
        if [ "$2" = staging ]; then small+=(--step-ms 1 --scratch 256KiB); fi
    elif [ -n "$tiny" ]; then
        small=(--steps 20 --model tiny)
    fi
    if [ ! -s "$to" ]; then
        if ! "$kit/ashore" "$@" "${small[@]}" --device cuda:0 --dir "$out/scratch" --json >"$to.new"; then
            rm -f "$to.new"
            failed=1
            return
        fi
        sync "$to.new"
        mv "$to.new" "$to"
    fi
    cat "$to"
}
# The bus, at two sizes of a chunk; then the disk, which takes longer.
limits() {
    measure limits.8MiB bench limits --arena 1GiB --no-limit
    measure limits.16MiB bench limits --arena 1GiB --chunk 16MiB --no-limit
    measure limits.disk bench limits --arena 1GiB
}
demo() { measure demo.live demo; }
# How fast state leaves the device, alone and while it computes: large tensors, then small ones; and which way is faster.
staging() {
    local here=(bench staging --arena 1GiB --writers 8)
    measure staging.w2 "${here[@]}" --workload w2 --rounds 8
    measure staging.w1 "${here[@]}" --workload w1 --rounds 8
    # Gathered, in batches, both, or one by one: many small tensors, a model's, large ones.
    measure staging.ways.w1 "${here[@]}" --ways --workload w1 --rounds 20
    measure staging.ways.w3 "${here[@]}" --ways --workload w3 --rounds 8
    measure staging.ways.w2 "${here[@]}" --ways --workload w2 --rounds 8
    measure staging.w2.16MiB "${here[@]}" --workload w2 --rounds 4 --chunk 16MiB
}
# What a loop loses to a save every 10 steps: eager and replayed, with late copies and without; then with steps so short that much
# has not left when the fence comes.
loops() {
    local here=(bench staging --arena 1GiB --writers 8 --workload w3 --every 10 --rounds 4 --no-limit)
    measure loops.eager "${here[@]}"
    measure loops.graph.scratch "${here[@]}" --graph --scratch 4GiB
    measure loops.eager.scratch "${here[@]}" --scratch 4GiB
    measure loops.graph "${here[@]}" --graph
    measure loops.short.scratch "${here[@]}" --step-ms 100 --scratch 9GiB
    measure loops.short "${here[@]}" --step-ms 100
}
# The same every 50 steps.
seldom() {
    local here=(bench staging --arena 1GiB --writers 8 --workload w3 --every 50 --rounds 3 --no-limit)
    measure seldom.eager "${here[@]}"
    measure seldom.graph.scratch "${here[@]}" --graph --scratch 4GiB
}
# States that the disk could not hold; the last need 100 GB of the device.
large() {
    local here=(bench staging --arena 1GiB --writers 8 --every 10 --rounds 3)
    measure large.w4.scratch "${here[@]}" --workload w4 --scratch 16GiB
    measure large.w5 "${here[@]}" --workload w5
    measure large.w5.scratch "${here[@]}" --workload w5 --scratch 16GiB --no-limit
}
# State of torch and of the driver alone, through the C face. `python3` is the machine's own, and must have torch.
torch() {
    local common=(--face "$kit/libashore_face.so" --dir "$out/scratch" --out "$out/torch.jsonl") rc=0
    python3 "$kit/drive.py" --backend driver --saves 30 --seconds 90 "${common[@]}" || rc=1
    [ -n "$tiny" ] || python3 "$kit/drive.py" --backend torch --saves 100 --seconds 320 "${common[@]}" || rc=1
    return "$rc"
}
# Beside torch's own saves, on the same tensors. The same `python3`.
dcp() {
    local common=(--face "$kit/libashore_face.so" --dir "$out/scratch" --out "$out/dcp.jsonl")
    if [ -n "$tiny" ]; then
        echo "left out: torch does not run on a simulated driver"
        return
    fi
    python3 "$kit/dcp.py" --scale W3=0.25 --seconds 440 "${common[@]}"
}
# The kernels beside the device's own copies. Needs Python 3, and nothing else.
speeds() { python3 "$kit/kernels.py" "$kit"; }

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
    timeout --kill-after 10 480 bash -euo pipefail -c "$(declare -f "$1" measure); kit='$kit' out='$out' tiny='$tiny' failed=0; $1; exit \$failed" >"$log" 2>&1 </dev/null || rc=$?
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
