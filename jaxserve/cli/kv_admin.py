"""`jaxserve kv stat | ls | verify | clear | pin | erase`: look after the tiers of a KV cache.

Each works on a running server (`--server`, with its admin key) and on a store that no server uses
(`--kv-store`). Prints for people, or with `--json` what the API answers. Exit code 1: something was
damaged, or a store did not do what it was asked to.
"""

import functools
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from jaxserve.cli.app import Run, expand, flag, option
from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from jaxserve.cli.kv_offline import StoreTiers
    from jaxserve.cli.kv_remote import ServerTiers

SERVER = "http://127.0.0.1:8000"
EXIT_DAMAGED = 1
WHICH = "Which cache"
Tiers: TypeAlias = "ServerTiers | StoreTiers"


@dataclass(frozen=True, slots=True)
class Where:
    """Whose tiers a command is about, and how it answers."""

    server: str | None = None
    admin_key: str | None = None
    kv_store: str | None = None
    kv_key_file: str | None = None
    kv_key_folder: str | None = None
    as_json: bool = False


def with_where(function: Run) -> Run:
    """Replace a command's `where` by the flags that say which cache it is about.

    What stores log is told after a command that did what it was asked to. After another one it is
    not: its error says the same.
    """

    def text(name: str, metavar: str, help: str) -> Any:
        spelt = "--" + name.replace("_", "-")
        shown = option(spelt, metavar=metavar, help=help, section=WHICH)
        return flag(name, str | None, shown)

    flags = [
        text("server", "URL", f"a running server; default: {SERVER}"),
        text("admin_key", "KEY", "of the server (env JAXSERVE_ADMIN_KEY)"),
        text("kv_store", "URL", "a store that no server uses, instead"),
        text(
            "kv_key_file",
            "FILE",
            "master key of that store, if it is encrypted; default: the environment's "
            "JAXSERVE_KV_KEY",
        ),
        text(
            "kv_key_folder",
            "FOLDER",
            "wrapped keys of that store; default: under the user's cache folder",
        ),
        flag("as_json", bool, option("--json", help="print JSON"), default=False),
    ]

    @functools.wraps(function)
    def run(**given: Any) -> int:
        kept, logger = _KeptWarnings(), logging.getLogger("jaxserve")
        logger.addHandler(kept)
        try:
            code = function(**given)
        finally:
            logger.removeHandler(kept)
        for line in kept.lines if code == 0 else ():
            print(f"jaxserve: warning: {line}", file=sys.stderr)
        return code

    return expand(run, "where", flags, lambda values: Where(**values))


class _KeptWarnings(logging.Handler):
    """Keeps what is logged, each text once, and prints nothing."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.lines[" ".join(record.getMessage().split())] = None


def _tiers(where: Where) -> Tiers:
    if where.kv_store is None:
        from jaxserve.cli.kv_remote import ServerTiers

        if where.kv_key_file is not None or where.kv_key_folder is not None:
            raise ConfigError("--kv-key-file and --kv-key-folder go with --kv-store")
        key = where.admin_key or os.environ.get("JAXSERVE_ADMIN_KEY")
        return ServerTiers(where.server or SERVER, key)
    if where.server is not None:
        raise ConfigError("give either --server or --kv-store")
    from jaxserve.cli.kv_offline import StoreTiers

    return StoreTiers(where.kv_store, where.kv_key_file, where.kv_key_folder)


def _show(where: Where, body: dict[str, Any], lines: Sequence[str]) -> None:
    print(json.dumps(body) if where.as_json else "\n".join(lines))


@with_where
def stat(*, where: Where) -> int:
    """Show what the tiers hold and have done."""
    with closing(_tiers(where)) as tiers:
        body = tiers.stat()
    from jaxserve.kv.stats import KVStats, show_bytes

    if "tiers" in body:
        _show(where, body, [str(KVStats.from_json(body))])
        return 0
    size = f"{_count(body['num_records'], 'record')}, {show_bytes(body['num_bytes'])}"
    lines = [f"{body['store']}: {size}, oldest {_age(body['oldest_s'])}"]
    lines.append(f"  {_count(body['num_tenants'], 'tenant')}")
    if body["num_expired"]:
        lines[-1] += f", {_count(body['num_expired'], 'record')} expired"
    for namespace, count in body["namespaces"].items():
        lines.append(f"  namespace {namespace}: {_count(count, 'record')}")
    _show(where, body, lines)
    return 0


@with_where
def ls(
    *,
    limit: Annotated[
        int, option("--limit", metavar="N", help="at most so many; default: 100")
    ] = 100,
    prefix: Annotated[
        str, option("--prefix", metavar="HEX", help="whose names begin like this")
    ] = "",
    where: Where,
) -> int:
    """List blocks, and where each of them is."""
    if limit < 1:
        raise ConfigError(f"--limit is {limit}; expected at least 1")
    with closing(_tiers(where)) as tiers:
        body = tiers.ls(limit, prefix)
    from jaxserve.kv.stats import show_bytes

    lines = []
    for block in body["blocks"]:
        notes = [_age(block["created_s"])] if block["created_s"] else []
        if block["expires_s"]:
            notes.append(f"expires in {_span(block['expires_s'] - time.time())}")
        notes += [f"tenant {block['tenant'][:8]}"] if block["tenant"] else []
        notes += ["pinned"] if block["is_pinned"] else []
        notes += [] if block["is_ours"] else ["of another model or setting"]
        tiers_of = "+".join(block["tiers"])
        lines.append(
            f"{block['name']}  {show_bytes(block['num_bytes']):>9}  {tiers_of}  {', '.join(notes)}"
        )
    if not body["is_complete"]:
        lines.append("... and more: raise --limit, or give a longer --prefix")
    _show(where, body, [line.rstrip() for line in lines] or ["no blocks"])
    return 0


@with_where
def verify(
    *,
    recompute: Annotated[
        int,
        option(
            "--recompute",
            metavar="N",
            help="also compute N random blocks again and compare; only blocks of known prompts: "
            "those of --prompts, else the server's recent ones",
        ),
    ] = 0,
    prompts: Annotated[
        str | None,
        option(
            "--prompts",
            metavar="FILE",
            help="JSON lines: texts, lists of token ids, or objects with prompt or "
            "prompt_token_ids and cache_salt",
        ),
    ] = None,
    where: Where,
) -> int:
    """Read and check every record; delete damaged ones."""
    known = None if prompts is None else _read_prompts(prompts)
    if known is not None and not recompute:
        raise ConfigError("--prompts says which blocks to compute again: give --recompute N, too")
    with closing(_tiers(where)) as tiers:
        body = tiers.verify(recompute, known)
    from jaxserve.kv.stats import show_bytes

    lines = []
    for check in body["stores"]:
        verdicts = ", ".join(f"{count:,} {what}" for what, count in check["verdicts"].items())
        lines.append(
            f"{check['store']}: {_count(check['num_records'], 'record')}, "
            f"{show_bytes(check['num_bytes'])} in {check['seconds']:.1f} s: {verdicts or 'nothing'}"
        )
        if check["num_damaged"]:
            lines.append(f"  {check['num_damaged']:,} damaged, {check['num_deleted']:,} deleted")
        if check["error"]:
            lines.append(f"  not everything was read: {check['error']}")
    if body["index_error"]:
        lines.append(f"the books of device and host do not add up: {body['index_error']}")
    if (again := body["recompute"]) is not None:
        lines.append(
            f"recomputed: {again['num_compared']:,} copies compared, {again['num_equal']:,} equal "
            f"to the bit, {again['num_wrong']:,} wrong, {again['num_skipped']:,} skipped"
        )
        if again["num_equal"] < again["num_compared"]:
            largest = "not a number"
            if again["max_relative_error"] is not None:
                largest = f"{again['max_relative_error']:.2g} of a block's norm, "
                largest += f"{again['max_abs_difference']:.2g} in one element"
            lines.append(f"  largest difference: {largest}")
        lines += [f"  {again['note']}"] if again["note"] else []
    verdict = "damage was found" if body["is_damaged"] else "nothing is damaged"
    lines.append(verdict + ("" if body["is_complete"] else ", as far as it was read"))
    _show(where, body, lines)
    return EXIT_DAMAGED if body["is_damaged"] or not body["is_complete"] else 0


@with_where
def clear(
    tiers: Annotated[
        list[str], typer.Argument(metavar="TIER...", help="device, host, a store, or all")
    ],
    *,
    stale: Annotated[
        bool,
        option("--stale", help="only what other models or settings left in stores"),
    ] = False,
    where: Where,
) -> int:
    """Remove all blocks of tiers."""
    with closing(_tiers(where)) as opened:
        body = opened.clear(tiers, stale)
    lines = [_in_memory(body)]
    _show(where, body, (lines if where.kv_store is None else []) + _erasures(body))
    return 0 if body["is_complete"] else 1


@with_where
def pin(
    hashes: Annotated[
        list[str] | None,
        typer.Argument(metavar="HASH...", help="64 hex digits, as ls shows them"),
    ] = None,
    *,
    prompt: Annotated[
        str | None, option("--prompt", metavar="TEXT", help="all full blocks of this text")
    ] = None,
    cache_salt: Annotated[str, option("--cache-salt", metavar="SALT", help="of the prompt")] = "",
    undo: Annotated[bool, option("--undo", help="let them be evicted again")] = False,
    where: Where,
) -> int:
    """Keep blocks from eviction on host and stores."""
    if not hashes and prompt is None:
        raise ConfigError("nothing to pin: give hashes or --prompt")
    with closing(_tiers(where)) as tiers:
        body = tiers.pin(hashes or [], prompt, cache_salt, not undo)
    what = "pinned" if body["pinned"] else "no longer pinned"
    counts = ", ".join(f"{count:,} {what} in {tier}" for tier, count in body["by_tier"].items())
    lines = [f"of {_count(body['num_blocks'], 'block')}: {counts}"]
    _show(where, body, lines + ([body["note"]] if body["note"] else []))
    return 1 if body["note"] else 0


@with_where
def erase(
    salt: Annotated[
        str,
        typer.Argument(metavar="SALT", help="the tenant's cache_salt; - reads it from stdin"),
    ],
    *,
    where: Where,
) -> int:
    """Remove everything of a tenant from all tiers, and destroy its key."""
    if salt == "-":
        salt = sys.stdin.readline().rstrip("\r\n")
    with closing(_tiers(where)) as tiers:
        body = tiers.erase(salt)
    at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(body["at_s"]))
    what = "erased" if body["is_complete"] else "NOT everywhere erased:"
    lines = [f"{what} tenant {body['tenant']} at {at}, in {body['seconds']:.2f} s"]
    if where.kv_store is None:
        lines.append(
            _in_memory(body)
            + ("" if body["is_exact"] else " (of everybody: whose they were was not known)")
        )
    lines += _erasures(body)
    lines.append(f"key: {body['key']}")
    if body["live_requests"]:
        lines.append(f"{_count(body['live_requests'], 'request')} live; nothing is kept of these")
    _show(where, body, lines)
    return 0 if body["is_complete"] else 1


def _erasures(body: dict[str, Any]) -> list[str]:
    from jaxserve.kv.stats import show_bytes

    return [
        f"{one['store']}: {_count(one['num_records'], 'record')}, {show_bytes(one['num_bytes'])}"
        + (f": {one['error']}" if one["error"] else "")
        for one in body["stores"]
    ]


def _read_prompts(path: str) -> list[Any]:
    try:
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON lines: {error}") from error


def _in_memory(body: dict[str, Any]) -> str:
    device, host = _count(body["device_blocks"], "block"), _count(body["host_blocks"], "block")
    return f"device: {device}, host: {host}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _age(at_s: float) -> str:
    return f"{_span(time.time() - at_s)} old" if at_s else "none"


def _span(seconds: float) -> str:
    """A duration for people: one number and a unit."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
