"""Runs commands one after the other, each in a process of its own that has everything imported already.

    python -m tests.cli.forkserver        reads {"folder": ..., "arguments": [...], "log": ...} as lines of JSON

A line of output is the exit status of a command. Nothing but imports happens here, so a command finds the process that it
would find, seconds later, if it were typed.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path

from shadow_peft.cli import main
from shadow_peft.cli.dispatch import VERBS


def serve() -> None:
    """Answers until the input ends."""
    for verb in VERBS:
        try:
            import_module(f"shadow_peft.cli.{verb}")
        except ImportError:
            print(f"{verb} is not installed", file=sys.stderr)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            run(order["folder"], order["arguments"], order["log"])
        _, ended = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(ended), flush=True)


def run(folder: str, arguments: list[str], log: str) -> None:
    """The command, in this process, which ends with it."""
    os.chdir(folder)
    with Path(log).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["shadow-peft", *arguments]
    try:
        status = main()
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
