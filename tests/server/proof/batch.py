"""`run-batch` killed again and again over a real server: no line is lost, none is doubled."""

import tempfile
from pathlib import Path
from typing import Any

from jaxserve.embedded import EMBEDDED_MODEL_NAME
from tests.cli.batch_kills import LINES_A_KILL, kill_and_resume, write_batch
from tests.server.proof.served import API_KEY, served, wait_until


def prove(num_kills: int, seed: int) -> dict[str, Any]:
    """Kill runs of one batch so many times, then let it end."""
    with tempfile.TemporaryDirectory() as name, served() as server:
        source, target = Path(name) / "in.jsonl", Path(name) / "out.jsonl"
        num_lines = LINES_A_KILL * num_kills
        write_batch(source, num_lines, EMBEDDED_MODEL_NAME)
        before = server.uses()
        flags = ("--api-key", API_KEY)
        killed = kill_and_resume(source, target, server.url, num_kills, seed, flags)
        free_s = wait_until(server.is_idle, 10)
        after = server.settled(before)
        lost = {f"r-{index}" for index in range(num_lines)} - set(killed.ids)
        doubled = sum(count - 1 for count in killed.ids.values())
        is_right = not lost and not doubled and not killed.bad and killed.exit_status == 0
        return {
            "proof": "run-batch killed",
            "kills": num_kills,
            "lines": num_lines,
            "answered_at_the_last_kill": killed.num_before,
            "lost": len(lost),
            "doubled": doubled,
            "failed": killed.bad,
            "logged_failures": server.num_errors_logged(),
            "pages_in_use": server.pages_in_use(),
            "seconds_until_free": free_s and round(free_s, 3),
            "before": before.told(),
            "after": after.told(),
            "holds": is_right and after.is_back_at(before) and server.is_idle(),
        }
