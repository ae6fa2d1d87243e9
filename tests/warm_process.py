"""Runs each command of its standard input (`command_line.warm_bandpo`) in a fork of its own; prints the exit statuses.

A fork is a process with fresh imports and the problems of countdown, which take three seconds: no tensor was made, no thread
started. It leaves as any command does.
"""

import atexit
import gc
import json
import os
import sys

import reasoning_gym

import bandpo.train.command
import bandpo.train.evaluate_command
from bandpo.cli import main
from bandpo.toy.tasks import TASKS, make_splits


def become(request):
    """Make this process what `python -m bandpo` would be: folder, environment, output, arguments."""
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[:0] = [request["cwd"], *filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = ["bandpo", *request["arguments"]]
    for stream, target in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        file = os.open(target, os.O_RDWR | os.O_CREAT)
        os.dup2(file, stream)
        os.close(file)


if __name__ == "__main__":
    assert bandpo.train.command.train and bandpo.train.evaluate_command and reasoning_gym
    make_splits(TASKS["countdown"])
    gc.freeze()  # no search for garbage visits the imports, and so copies their pages
    atexit.register(gc.unfreeze)  # of a fork; libraries complain of what nobody frees at the end
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            become(request)
            sys.exit(main())
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
