"""Reinforcement learning experiments: thin modules with absl flags, run from a clone."""

import signal
import sys

# While `python -m experiments.x` imports what it needs, Ctrl-C ends it: some libraries take the exception that Python
# would raise for an error of theirs, and go on. `process.interruptible` has a handler afterwards.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
