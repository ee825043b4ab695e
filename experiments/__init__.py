"""Scripts that train, compare and draw; each is a module that runs as a command."""

import sys

if sys.argv[:1] == ["-m"]:  # of `python -m experiments.NAME`, which is about to import the rest
    from experiments.common.interrupt import LeaveAtOnce

    LeaveAtOnce.install()
