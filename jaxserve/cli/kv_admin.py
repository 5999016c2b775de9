"""`jaxserve kv stat | ls | verify | clear | pin | erase`: look after the tiers of a KV cache.

Each works on a running server (`--server`, with its admin key) and on a store that no server uses
(`--kv-store`). Prints for people, or with `--json` what the API answers. Exit code 1: something was
damaged, or a store did not do what it was asked to.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, TypeAlias

from jaxserve.cli.flags import Parser, add_command
from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from jaxserve.cli.kv_offline import StoreTiers
    from jaxserve.cli.kv_remote import ServerTiers

SERVER = "http://127.0.0.1:8000"
EXIT_DAMAGED = 1
Tiers: TypeAlias = "ServerTiers | StoreTiers"


def add_admin_commands(below: Parser.Commands) -> None:
    """Register the commands."""
    _add(below, "stat", "[options]", "what the tiers hold and have done", _stat)
    ls = _add(below, "ls", "[options]", "list blocks, and where each of them is", _ls)
    ls.add_argument("--limit", type=int, default=100, help="at most so many (default: 100)")
    ls.add_argument("--prefix", default="", metavar="HEX", help="whose names begin like this")
    verify = _add(
        below, "verify", "[options]", "read and check every record; delete damaged ones", _verify
    )
    verify.add_argument(
        "--recompute",
        type=int,
        default=0,
        metavar="N",
        help="also compute N random blocks again and compare; only blocks of known prompts: those "
        "of --prompts, else the server's recent ones",
    )
    verify.add_argument(
        "--prompts",
        metavar="FILE",
        help="JSON lines: texts, lists of token ids, or objects with prompt or prompt_token_ids "
        "and cache_salt",
    )
    clear = _add(below, "clear", "[options] TIER...", "remove all blocks of tiers", _clear)
    clear.add_argument("tiers", nargs="+", metavar="TIER", help="device, host, a store, or all")
    clear.add_argument(
        "--stale", action="store_true", help="only what other models or settings left in stores"
    )
    pin = _add(
        below, "pin", "[options] [HASH...]", "keep blocks from eviction on host and stores", _pin
    )
    pin.add_argument("hashes", nargs="*", metavar="HASH", help="64 hex digits, as ls shows them")
    pin.add_argument("--prompt", metavar="TEXT", help="all full blocks of this text")
    pin.add_argument("--cache-salt", default="", metavar="SALT", help="of the prompt")
    pin.add_argument("--undo", action="store_true", help="let them be evicted again")
    erase = _add(
        below,
        "erase",
        "[options] SALT",
        "remove everything of a tenant from all tiers, and destroy its key",
        _erase,
    )
    erase.add_argument(
        "salt", metavar="SALT", help="the tenant's cache_salt; - reads it from stdin"
    )


def _add(
    below: Parser.Commands,
    name: str,
    usage: str,
    help: str,
    run: Callable[[argparse.Namespace], int],
) -> Parser:
    command = add_command(below, name, usage, help, run)
    command.add_argument("--server", metavar="URL", help=f"a running server (default: {SERVER})")
    command.add_argument(
        "--admin-key", metavar="KEY", help="of the server; default: JAXSERVE_ADMIN_KEY"
    )
    command.add_argument("--kv-store", metavar="URL", help="a store that no server uses, instead")
    command.add_argument(
        "--kv-key-file", metavar="FILE", help="master key of that store, if it is encrypted"
    )
    command.add_argument("--kv-key-folder", metavar="FOLDER", help="wrapped keys of that store")
    command.add_argument("--json", action="store_true", help="print JSON")
    return command


def _tiers(args: argparse.Namespace) -> Tiers:
    if args.kv_store is None:
        from jaxserve.cli.kv_remote import ServerTiers

        key = args.admin_key or os.environ.get("JAXSERVE_ADMIN_KEY")
        return ServerTiers(args.server or SERVER, key)
    if args.server is not None:
        raise ConfigError("give either --server or --kv-store")
    from jaxserve.cli.kv_offline import StoreTiers

    return StoreTiers(args.kv_store, args.kv_key_file, args.kv_key_folder)


def _show(args: argparse.Namespace, body: dict[str, Any], lines: Sequence[str]) -> None:
    print(json.dumps(body) if args.json else "\n".join(lines))


def _stat(args: argparse.Namespace) -> int:
    with closing(_tiers(args)) as tiers:
        body = tiers.stat()
    from jaxserve.kv.stats import KVStats, show_bytes

    if "tiers" in body:
        _show(args, body, [str(KVStats.from_json(body))])
        return 0
    size = f"{body['num_records']:,} records, {show_bytes(body['num_bytes'])}"
    lines = [f"{body['store']}: {size}, oldest {_age(body['oldest_s'])}"]
    lines.append(f"  {body['num_tenants']:,} tenants, {body['num_expired']:,} records expired")
    for namespace, count in body["namespaces"].items():
        lines.append(f"  namespace {namespace}: {count:,} records")
    _show(args, body, lines)
    return 0


def _ls(args: argparse.Namespace) -> int:
    if args.limit < 1:
        raise ConfigError(f"--limit is {args.limit}; expected at least 1")
    with closing(_tiers(args)) as tiers:
        body = tiers.ls(args.limit, args.prefix)
    from jaxserve.kv.stats import show_bytes

    lines = []
    for block in body["blocks"]:
        notes = [_age(block["created_s"])] if block["created_s"] else []
        if block["expires_s"]:
            notes.append(f"expires in {_span(block['expires_s'] - time.time())}")
        notes += [f"tenant {block['tenant'][:8]}"] if block["tenant"] else []
        notes += ["pinned"] if block["is_pinned"] else []
        notes += [] if block["is_ours"] else ["of another model or setting"]
        where = "+".join(block["tiers"])
        lines.append(
            f"{block['name']}  {show_bytes(block['num_bytes']):>9}  {where}  {', '.join(notes)}"
        )
    if not body["is_complete"]:
        lines.append("... and more: raise --limit, or give a longer --prefix")
    _show(args, body, [line.rstrip() for line in lines] or ["no blocks"])
    return 0


def _verify(args: argparse.Namespace) -> int:
    prompts = None if args.prompts is None else _read_prompts(args.prompts)
    if prompts is not None and not args.recompute:
        raise ConfigError("--prompts says which blocks to compute again: give --recompute N, too")
    with closing(_tiers(args)) as tiers:
        body = tiers.verify(args.recompute, prompts)
    from jaxserve.kv.stats import show_bytes

    lines = []
    for check in body["stores"]:
        verdicts = ", ".join(f"{count:,} {what}" for what, count in check["verdicts"].items())
        lines.append(
            f"{check['store']}: {check['num_records']:,} records, "
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
    lines.append("damage was found" if body["is_damaged"] else "nothing is damaged")
    _show(args, body, lines)
    return EXIT_DAMAGED if body["is_damaged"] or not body["is_complete"] else 0


def _clear(args: argparse.Namespace) -> int:
    with closing(_tiers(args)) as tiers:
        body = tiers.clear(args.tiers, args.stale)
    lines = [f"device: {body['device_blocks']:,} blocks, host: {body['host_blocks']:,} blocks"]
    _show(args, body, (lines if args.kv_store is None else []) + _erasures(body))
    return 0 if body["is_complete"] else 1


def _pin(args: argparse.Namespace) -> int:
    if not args.hashes and args.prompt is None:
        raise ConfigError("nothing to pin: give hashes or --prompt")
    with closing(_tiers(args)) as tiers:
        body = tiers.pin(args.hashes, args.prompt, args.cache_salt, not args.undo)
    what = "pinned" if body["pinned"] else "unpinned"
    counts = ", ".join(f"{count:,} in {tier}" for tier, count in body["by_tier"].items())
    lines = [f"{what} of {body['num_blocks']:,} blocks: {counts}"]
    _show(args, body, lines + ([body["note"]] if body["note"] else []))
    return 1 if body["note"] else 0


def _erase(args: argparse.Namespace) -> int:
    salt = sys.stdin.readline().rstrip("\r\n") if args.salt == "-" else args.salt
    with closing(_tiers(args)) as tiers:
        body = tiers.erase(salt)
    at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(body["at_s"]))
    lines = [f"erased tenant {body['tenant']} at {at}, in {body['seconds']:.2f} s"]
    if args.kv_store is None:
        lines.append(
            f"device: {body['device_blocks']:,} blocks, host: {body['host_blocks']:,} blocks"
            + ("" if body["is_exact"] else " (of everybody: whose they were was not known)")
        )
    lines += _erasures(body)
    lines.append(f"key: {body['key']}")
    if body["live_requests"]:
        lines.append(f"{body['live_requests']:,} live requests go on; nothing is kept of them")
    _show(args, body, lines)
    return 0 if body["is_complete"] else 1


def _erasures(body: dict[str, Any]) -> list[str]:
    from jaxserve.kv.stats import show_bytes

    return [
        f"{one['store']}: {one['num_records']:,} records, {show_bytes(one['num_bytes'])}"
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


def _age(at_s: float) -> str:
    return f"{_span(time.time() - at_s)} old" if at_s else "none"


def _span(seconds: float) -> str:
    """A duration for people: one number and a unit."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
