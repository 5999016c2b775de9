"""The fault tests of KV records and the disk store at full size; the suite runs them smaller.

    python -m tests.kv.faults_full [--kills 1000] [--mutations 100000] [--disk-mutations 20000]

Prints a JSON line for each; stops at the first thing that is wrong.
"""

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.kv.mutations import run_mutations
from tests.kv.stores.disk_crash import run_kills
from tests.kv.stores.disk_mutations import run_disk_mutations


def report(name: str, run: Callable[[], Any]) -> Any:
    start_s = time.monotonic()
    result = run()
    line = {"proof": name, **dict(result), "seconds": round(time.monotonic() - start_s, 1)}
    print(json.dumps(line), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1_000)
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--disk-mutations", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    seed = args.seed
    logging.disable()  # the store warns of damage
    report("every mutation of a record is found", lambda: run_mutations(seed, args.mutations))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        kills = report(
            "a killed process leaves nothing wrong",
            lambda: run_kills(path / "killed", args.kills, seed),
        )
        assert kills["found"] and not kills["lost"], "a record was found but could not be read"
        report(
            "every mutation of a store's file is found",
            lambda: run_disk_mutations(path, seed, args.disk_mutations),
        )


if __name__ == "__main__":
    main()
