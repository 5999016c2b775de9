"""The `jaxserve` command.

Knows which commands there are and how failures are told; each command is imported when it is used,
so that `--help` is quick. A failure is one line on stderr: exit status 2 for wrong options, 130 for
Ctrl-C, 1 for anything else.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxserve.errors import ConfigError, JaxserveError

if TYPE_CHECKING:
    from jaxserve.cli.app import Group

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    import typer

    from jaxserve.cli.app import usage_of

    try:
        args = sys.argv[1:] if argv is None else list(argv)
        code = root().main(args, prog_name="jaxserve", standalone_mode=False) or 0
        if code == EXIT_INTERRUPTED:  # typer's answer to KeyboardInterrupt
            raise KeyboardInterrupt
        return code
    except typer.TyperException as error:
        return _fail(usage_of(error), EXIT_USAGE)
    except ConfigError as error:
        return _fail(str(error), EXIT_USAGE)
    except JaxserveError as error:
        return _fail(str(error), EXIT_FAILED)
    except (KeyboardInterrupt, typer.Abort):
        print("jaxserve: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as in `jaxserve ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def root() -> "Group":
    """The command with all others below it."""
    from jaxserve.cli.commands import root_group

    return root_group()


def _fail(message: str, code: int) -> int:
    print(f"jaxserve: error: {' '.join(message.split())}", file=sys.stderr)
    return code
