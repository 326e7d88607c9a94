#!/usr/bin/env bash
# Makes two Python environments in DIR: `stock` with torch, as the stock readers' tests use it, and `jax` with Orbax and tensorstore.
# About 2.2 GB, 2 to 4 minutes. Does nothing where that was done before.
set -euo pipefail
dir=${1:?usage: setup.sh DIR}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$dir"
"$here/../../tests/stock/setup.sh" "$dir/stock"

jax=$dir/jax
want=$(cat "$0" "$here/jax.txt" | sha256sum)
[ -f "$jax/complete" ] && [ "$(cat "$jax/complete")" = "$want" ] && exit 0
rm -rf "$jax"
python3 -m venv "$jax"
"$jax/bin/pip" --quiet --disable-pip-version-check --no-input install --no-deps -r "$here/jax.txt"
JAX_PLATFORMS=cpu "$jax/bin/python" -c 'import orbax.checkpoint as o, jax; print(f"jax {jax.__version__}, orbax {o.__version__}")'
echo "$want" >"$jax/complete"
