#!/usr/bin/env bash
# Makes an environment of PYTHON in DIR with what the tests of the wheel need: torch and JAX for the CPU, the
# frameworks of `ashore.torch`, NumPy, pytest. About 2 GB, 2 to 3 minutes. Does nothing where that was done before.
set -euo pipefail
dir=${1:?usage: setup.sh DIR PYTHON} python=${2:?usage: setup.sh DIR PYTHON}
here=$(cd "$(dirname "$0")" && pwd)
stubs=$here/../checks/stock/cuda_stubs.py
done_mark=$dir/complete

want=$(cat "$0" "$here/requirements-test.txt" "$here/requirements-jax.txt" "$stubs" | sha256sum)
[ -f "$done_mark" ] && [ "$(cat "$done_mark")" = "$want" ] && exit 0
rm -rf "$dir"
"$python" -m venv "$dir"
pip=("$dir/bin/pip" --quiet --disable-pip-version-check --no-input)
"${pip[@]}" install -r "$here/requirements-test.txt" -r "$here/requirements-jax.txt"
# As in checks/stock/setup.sh: the libraries of CUDA are stubs.
"${pip[@]}" install --no-deps torch==2.11.0 nvidia-cuda-runtime==13.0.96
# Their dependencies would install a torch with CUDA.
"${pip[@]}" install transformers==5.24.0 psutil
"${pip[@]}" install --no-deps lightning==2.6.6 pytorch-lightning==2.6.6 torchmetrics==1.9.0 lightning-utilities==0.15.3 accelerate==1.15.0
python3 "$stubs" "$(echo "$dir"/lib/python3.*/site-packages)" >/dev/null
"$dir/bin/python" -c 'import numpy, torch; print(f"torch {torch.__version__}, numpy {numpy.__version__}")'
echo "$want" >"$done_mark"
