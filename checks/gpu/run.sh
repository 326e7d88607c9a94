#!/bin/sh
# run.sh brief OUT: the most valuable evidence, in 480 seconds. `run.sh` alone lists the other commands.
kit=$(cd "$(dirname "$0")" && pwd)
# A copy of the kit may have lost its run bits.
chmod +x "$kit"/ashore "$kit"/suite "$kit"/kernels "$kit"/*.py
exec "${KIT_PYTHON:-python3}" "$kit/stages.py" "$@"
