#!/usr/bin/env bash
# Makes a Python environment with the stock readers in DIR: safetensors, numpy, and torch for the CPU. About 1.4 GB, 1 to 2
# minutes. Does nothing where that was done before.
set -euo pipefail
dir=${1:?usage: setup.sh DIR}
here=$(cd "$(dirname "$0")" && pwd)
done_mark=$dir/complete
packages=(numpy==2.4.6 safetensors==0.8.0 filelock fsspec jinja2 networkx setuptools sympy typing-extensions)

want=$(cat "$0" "$here/cuda_stubs.py" | sha256sum)
[ -f "$done_mark" ] && [ "$(cat "$done_mark")" = "$want" ] && exit 0
rm -rf "$dir"
python3 -m venv "$dir"
pip=("$dir/bin/pip" --quiet --disable-pip-version-check --no-input)
# The usual torch wheel needs 2 GB of CUDA libraries. Only one of them is really used on the CPU; the others
# are stubs.
"${pip[@]}" install "${packages[@]}"
"${pip[@]}" install --no-deps torch==2.11.0 nvidia-cuda-runtime==13.0.96
python3 "$here/cuda_stubs.py" "$(echo "$dir"/lib/python3.*/site-packages)" >/dev/null
"$dir/bin/python" -c 'import numpy, safetensors, torch; print(f"torch {torch.__version__}, numpy {numpy.__version__}")'
echo "$want" >"$done_mark"
