"""The `jaxserve` command.

Knows which commands there are and how failures are told; each command imports what it needs when
it runs, so that `--help` is quick. A failure is one line on stderr: exit code 2 for wrong options,
1 for anything else.
"""

import os
import sys
from collections.abc import Sequence

import jaxserve
from jaxserve.cli.flags import Parser, add_command, add_settings
from jaxserve.errors import ConfigError, JaxserveError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    try:
        args = make_parser().parse(sys.argv[1:] if argv is None else list(argv))
        return args.run(args)
    except ConfigError as error:
        return _fail(error, EXIT_USAGE)
    except JaxserveError as error:
        return _fail(error, EXIT_FAILED)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as in `jaxserve ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def make_parser() -> Parser:
    parser = Parser(prog="jaxserve", description="Serve large language models on JAX/XLA.")
    parser.add_argument("--version", action="version", version=jaxserve.__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_generate(commands)
    _add_convert(commands)
    _add_eval(commands)
    _add_kv(commands)
    _add_version(commands)
    return parser


def _add_serve(commands: "Parser.Commands") -> None:
    command = add_command(
        commands,
        "serve",
        "[options] [MODEL]",
        "serve a model over HTTP, with the OpenAI API",
        _serve,
    )
    command.add_argument(
        "model_argument", nargs="?", metavar="MODEL", help="the same as --model MODEL"
    )
    add_settings(command)


def _add_generate(commands: "Parser.Commands") -> None:
    from jaxserve.cli.flags import add_sampling

    command = add_command(
        commands, "generate", "[options] PROMPT", "answer one prompt on the terminal", _generate
    )
    command.add_argument("prompt", metavar="PROMPT", help="the prompt; '-' reads standard input")
    command.add_argument(
        "--raw", action="store_true", help="continue the prompt as it is, without chat template"
    )
    command.add_argument("--system", metavar="TEXT", help="system message before the prompt")
    add_sampling(command)
    add_settings(command)


def _add_convert(commands: "Parser.Commands") -> None:
    command = add_command(
        commands,
        "convert",
        "[options] SRC DST",
        "rewrite a checkpoint as Orbax, which loads faster",
        _convert,
    )
    command.add_argument("src", metavar="SRC", help="checkpoint folder or hub name")
    command.add_argument("dst", metavar="DST", help="new folder")
    command.add_argument("--revision", help="hub revision (branch, tag or commit)")


def _add_eval(commands: "Parser.Commands") -> None:
    command = add_command(
        commands, "eval", "[options] TASK [MODEL]", "measure how well a model answers", _eval
    )
    command.add_argument("task", choices=("retrieval",), help="what to measure")
    command.add_argument(
        "model_argument", nargs="?", metavar="MODEL", help="the same as --model MODEL"
    )
    command.add_argument("--num", type=int, default=1000, help="prompts (default: 1000)")
    command.add_argument("--url", help="ask a running server instead, e.g. http://host:8000/v1")
    add_settings(command)


def _add_kv(commands: "Parser.Commands") -> None:
    from jaxserve.cli.kv import add_kv_commands

    add_kv_commands(commands)


def _add_version(commands: "Parser.Commands") -> None:
    add_command(commands, "version", "", "show the version", _version)


def _serve(args: "Parser.Args") -> int:
    from jaxserve.cli.serve import serve

    return serve(args)


def _generate(args: "Parser.Args") -> int:
    from jaxserve.cli.generate import generate

    return generate(args)


def _convert(args: "Parser.Args") -> int:
    from jaxserve.weights import convert_checkpoint

    print(convert_checkpoint(args.src, args.dst, revision=args.revision))
    return 0


def _eval(args: "Parser.Args") -> int:
    from jaxserve.cli.evaluate import evaluate

    return evaluate(args)


def _version(args: "Parser.Args") -> int:
    print(jaxserve.__version__)
    return 0


def _fail(error: JaxserveError, code: int) -> int:
    print(f"jaxserve: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code
