"""`jaxserve run-batch` killed (SIGKILL) again and again, then left to its end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LINES_A_KILL = 60
"""Lines of a batch for each kill: a run answers 1 to 40 of them before it."""


@dataclass(frozen=True, slots=True)
class Killed:
    """What a batch was like after its kills.

    Attributes:
        num_before: lines that were answered at the last kill.
        exit_status: of the run that was left alone.
        ids: how often each line is answered in the end.
        bad: how many of these answers are errors.
    """

    num_before: int
    exit_status: int
    ids: Counter[str]
    bad: int


def write_batch(path: Path, num: int, model: str = "fake", **changes: Any) -> None:
    """A batch of chats and completions; `changes` are the same for every line."""
    lines = []
    for index in range(num):
        body: dict[str, Any] = {"model": model, "max_tokens": 4}
        if index % 2:
            body["messages"] = [{"role": "user", "content": f"Hello {index}"}]
        else:
            body["prompt"] = f"Hello {index}"
        where = "/v1/chat/completions" if index % 2 else "/v1/completions"
        line = {"custom_id": f"r-{index}", "method": "POST", "url": where, "body": body}
        lines.append(json.dumps({**line, **changes}))
    path.write_text("\n".join(lines) + "\n")


def read_output(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def kill_and_resume(
    source: Path, target: Path, url: str, num_kills: int, seed: int, flags: Sequence[str] = ()
) -> Killed:
    """Kill runs of a batch, each after a random number of answers, and let the last one end.

    Raises:
        AssertionError: a kill took answers away that were there.
    """
    command = [sys.executable, "-m", "jaxserve.cli", "run-batch", "-i", str(source)]
    command += ["-o", str(target), "--url", url, "--max-concurrency", "8", *flags]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    rng = random.Random(seed)
    num_before = 0
    for _ in range(num_kills):
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env=environ) as run:
            enough = num_before + rng.randint(1, 40)
            while count_lines(target) < enough and run.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.random() * 0.01)  # anywhere between two answers
            run.send_signal(signal.SIGKILL)
        assert run.returncode == -signal.SIGKILL, "it ended before it was killed"
        assert count_lines(target) >= num_before, "answers are gone"
        num_before = count_lines(target)
    last = subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL, env=environ)
    records = read_output(target)
    ids = Counter(record["custom_id"] for record in records)
    bad = sum(
        bool(record["error"]) or record["response"]["status_code"] != 200 for record in records
    )
    return Killed(num_before, last.returncode, ids, bad)


def count_lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
