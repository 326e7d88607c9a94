#!/usr/bin/env bash
# Runs all tests on servers of object stores, or those whose names contain an argument. `run.py` starts it.
set -euo pipefail
cd "$(dirname "$0")/../.."
.ci/strict cargo test --quiet --test servers -- --test-threads 4 "$@"
[ $# -gt 0 ] || checks/stores/ranks.py target/debug/examples/rank
