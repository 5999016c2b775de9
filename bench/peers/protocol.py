"""A worker's side of the pipe: one JSON object a line, a command in, its result out.

Standard library only, since peers' own interpreters import it. What a library prints goes to
stderr, so that standard output carries answers and nothing else.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

Command = Callable[..., Any]


def serve(start: Callable[..., "dict[str, Command]"]) -> None:
    """Obey commands until standard input ends; the first one's arguments are those of `start`.

    `start` loads the engine and returns what it can do, by name.
    """
    _end_with_parent()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    commands: dict[str, Command] = {"peak_rss_bytes": peak_rss_bytes}

    def first(**arguments: Any) -> None:
        commands.update(start(**arguments))

    commands["start"] = first
    for line in sys.stdin:
        call = json.loads(line)
        try:
            reply = {"result": commands[call["command"]](**call["arguments"])}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def _end_with_parent() -> None:
    """Ask Linux to kill this process when the bench is gone, since it may be stopped then."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def peak_rss_bytes() -> int:
    """The most memory this process ever had resident."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
