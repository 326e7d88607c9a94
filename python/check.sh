#!/usr/bin/env bash
# Builds the wheel, installs it in a fresh environment of PYTHON, and runs its tests, the examples in its
# docstrings, and the checks of its types. PROFILE is one of cargo's; other arguments are for pytest.
set -euo pipefail
usage="usage: check.sh TOOLS PYTHON PROFILE [PYTEST-ARGUMENTS]"
tools=${1:?$usage} python=${2:?$usage} profile=${3:?$usage}
shift 3
cd "$(dirname "$0")"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
base=$tools/python-$version
./setup.sh "$base" "$python"

wheels=$(mktemp -d) fresh=$(mktemp -d)
trap 'rm -rf "$wheels" "$fresh"' EXIT
"$base/bin/maturin" build --quiet --profile "$profile" --out "$wheels"
"$python" -m venv "$fresh"
"$fresh/bin/pip" --quiet --disable-pip-version-check install --no-index --no-deps "$wheels"/*.whl
echo "$base"/lib/python3.*/site-packages >"$(echo "$fresh"/lib/python3.*/site-packages)/tests-need.pth"

# The driver of the tests of memory on devices.
(cd .. && cargo build --quiet -p fakecuda)
echo "python: $version, $(basename "$wheels"/*.whl), $(stat -c %s "$wheels"/*.whl) bytes"
"$fresh/bin/python" -I -m pytest -p no:cacheprovider tests --ignore=tests/jax "$@"
# In a process of their own, in which JAX has eight devices. 5: the arguments select none of them.
"$fresh/bin/python" -I -m pytest -p no:cacheprovider tests/jax "$@" || [ $? -eq 5 ]
"$fresh/bin/python" -I -m pytest -p no:cacheprovider --quiet --doctest-modules --doctest-ignore-import-errors --pyargs ashore
"$fresh/bin/python" -I -m mypy --strict --package ashore
"$fresh/bin/python" -I -m mypy.stubtest --concise ashore._ashore
