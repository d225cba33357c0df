"""One command under engines/child.py: it ends with whoever started us, and is first asked to end when we are."""

import signal
import subprocess
import sys


def main() -> int:
    """Run the command on our command line, pass SIGTERM on, and return its status."""
    running = subprocess.Popen(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: running.send_signal(signal.SIGINT))  # what Ctrl-C is to all of them
    return running.wait()


if __name__ == "__main__":
    sys.exit(main())
