#!/usr/bin/env bash
# Makes two Python environments in DIR: `stock` with torch, the one that checks/stock uses, and `jax` with Orbax and tensorstore.
# About 2.2 GB, 2 to 4 minutes. Does nothing where that was done before.
set -euo pipefail
dir=${1:?usage: setup.sh DIR}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$dir"
"$here/../../checks/stock/setup.sh" "$dir/stock"

jax=$dir/jax
want=$(cat "$0" "$here/jax.txt" | sha256sum)
[ -f "$jax/complete" ] && [ "$(cat "$jax/complete")" = "$want" ] && exit 0
rm -rf "$jax"
python3 -m venv "$jax"
"$jax/bin/pip" --quiet --disable-pip-version-check --no-input install --no-deps -r "$here/jax.txt"
show='import jax, orbax.checkpoint as orbax; print(f"jax {jax.__version__}, orbax {orbax.__version__}")'
JAX_PLATFORMS=cpu "$jax/bin/python" -c "$show"
echo "$want" >"$jax/complete"
