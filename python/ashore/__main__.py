"""The program ``ashore``: ``python -m ashore ls RUNS``."""

import signal
import sys

from . import _ashore


def main() -> int:
    """Runs the program with the arguments of this process, and returns its exit status."""
    # As in other command-line programs, Ctrl-C and a closed pipe end the process.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return _ashore.run(["ashore", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
