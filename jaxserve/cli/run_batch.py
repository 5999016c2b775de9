"""`jaxserve run-batch`: OpenAI batch files in and out."""

import asyncio
import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jaxserve.cli.app import option
from jaxserve.cli.flags import with_model_argument, with_settings
from jaxserve.errors import ConfigError
from jaxserve.settings import Settings

if TYPE_CHECKING:
    from jaxserve.batch_files.lines import BatchLine
    from jaxserve.batch_files.runner import Endpoint

MAX_CONCURRENCY = 4096
NUM_SHOWN = 5


@with_model_argument
@with_settings()
def run_batch(
    *,
    input_file: Annotated[
        str, option("--input-file", "-i", metavar="FILE", help="requests, as JSON lines")
    ],
    output_file: Annotated[
        str,
        option(
            "--output-file",
            "-o",
            metavar="FILE",
            help="answers; what is there already is not done again",
        ),
    ],
    url: Annotated[
        str | None,
        option(
            "--url",
            metavar="URL",
            help="ask a running server instead, such as http://host:8000/v1 (with --api-key)",
        ),
    ] = None,
    max_concurrency: Annotated[
        int,
        option("--max-concurrency", metavar="N", help="requests at once; default: 128"),
    ] = 128,
    timeout: Annotated[
        float, option("--timeout", metavar="S", help="seconds per request; default: 3600")
    ] = 3600.0,
    skip_invalid: Annotated[
        bool,
        option("--skip-invalid", help="answer lines that are no requests with an error, and go on"),
    ] = False,
    retry_failed: Annotated[
        bool, option("--retry-failed", help="do lines again whose answer is an error")
    ] = False,
    settings: Settings,
) -> int:
    """Answer the requests of an OpenAI batch file.

    Each line of the input is {"custom_id": ..., "method": "POST", "url": "/v1/chat/completions",
    "body": {...}}. Every answer is on disk as soon as it is there, in any order; run the same
    command again after a kill, and it goes on with what is missing. Exit status 1 if a line failed.
    """
    if not 1 <= max_concurrency <= MAX_CONCURRENCY:
        raise ConfigError(
            f"--max-concurrency is {max_concurrency}; expected 1 to {MAX_CONCURRENCY}"
        )
    if not 0 < timeout < 1e9:
        raise ConfigError(f"--timeout is {timeout:g}; expected seconds, more than 0")
    if url and settings.config.model.model:
        raise ConfigError("give either a model or --url")
    if _same_file(input_file, output_file):
        raise ConfigError(f"input and output are the same file, {input_file}")

    from jaxserve.batch_files.lines import read_lines
    from jaxserve.batch_files.output import BatchOutput

    num_lines = _check(input_file, skip_invalid)
    with contextlib.closing(BatchOutput(output_file, retry_failed=retry_failed)) as output:
        done = set(output.done)
        left = [line.key for line in read_lines(input_file) if line.key not in done]
        if done:
            print(f"{num_lines - len(left):,} of {num_lines:,} lines are done", file=sys.stderr)
        counts = Counter[str]()
        if left:
            with _endpoint(url, settings, timeout) as endpoint:
                _run(endpoint, input_file, done, len(left), max_concurrency, output, counts)
    failed = counts["failed"] + output.num_failed
    answered = num_lines - failed
    print(f"{answered:,} answered, {failed:,} failed, of {num_lines:,}: {output_file}")
    return 1 if failed else 0


def _run(
    endpoint: "Endpoint",
    input_file: str,
    done: set[str],
    num_left: int,
    max_concurrency: int,
    output: Any,
    counts: Counter[str],
) -> None:
    from jaxserve.batch_files import runner
    from jaxserve.batch_files.lines import read_lines
    from jaxserve.batch_files.output import is_failed
    from jaxserve.progress import Progress

    with Progress() as report:
        report("requests", 0, num_left)

        def write(records: list[dict[str, Any]]) -> None:
            output.append(records)
            for record in records:
                counts["failed" if is_failed(record) else "answered"] += 1
            report("requests", counts.total(), num_left)

        todo: Iterator[BatchLine] = (
            line for line in read_lines(input_file) if line.key not in done
        )
        asyncio.run(runner.run(endpoint, todo, min(max_concurrency, num_left), write))


def _check(input_file: str, skip_invalid: bool) -> int:
    """Number of lines; refuses a file with lines that are no requests, before anything runs."""
    from jaxserve.batch_files.lines import read_lines

    num_lines, problems = 0, list["BatchLine"]()
    for line in read_lines(input_file):
        num_lines += 1
        if line.problem:
            problems.append(line)
    if not num_lines:
        raise ConfigError(f"{input_file} is empty; expected requests, one a line")
    if not problems:
        return num_lines
    shown = "; ".join(
        f"line {p.number}: {p.problem}" for p in itertools.islice(problems, NUM_SHOWN)
    )
    more = f"; and {len(problems) - NUM_SHOWN:,} more" if len(problems) > NUM_SHOWN else ""
    text = (
        f"{len(problems):,} of {num_lines:,} lines of {input_file} are no requests: {shown}{more}"
    )
    if not skip_invalid:
        raise ConfigError(f"{text}. Nothing was run; --skip-invalid goes on without them")
    print(f"jaxserve: {text}", file=sys.stderr)
    return num_lines


@contextlib.contextmanager
def _endpoint(url: str | None, settings: Settings, timeout_s: float) -> "Iterator[Endpoint]":
    from jaxserve.batch_files.runner import Endpoint

    if url is not None:
        base = url.rstrip("/").removesuffix("/v1")
        yield Endpoint(base, settings.config.server.api_key, timeout_s=timeout_s)
        return
    from jaxserve.cli.local_server import local_server

    with local_server(settings.config) as server:
        yield Endpoint("http://localhost", socket=server.socket, timeout_s=timeout_s)


def _same_file(one: str, other: str) -> bool:
    try:
        return Path(one).samefile(other)
    except OSError:
        return False
