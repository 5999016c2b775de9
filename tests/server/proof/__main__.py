"""What the server promises about bad input, clients that leave, slow ones and kills, in full.

    python -m tests.server.proof [--only bad,cancel] [--percent 100] [--seed 0] [--out FILE]

Each proof has a `jaxserve serve` of the embedded model to itself and prints a JSON line. Exits with
1 if one does not hold. The test suite runs the same clients in small numbers.
"""

import argparse
import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers.machine import environment
from tests.server.proof import bad, batch, cancel, slow

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True, slots=True)
class Proof:
    """A proof and its full count."""

    prove: Callable[[int, int], dict[str, Any]]
    count: int


PROOFS = {
    "bad": Proof(bad.prove, 10_000),
    "cancel": Proof(cancel.prove, 1_000),
    "slow": Proof(slow.prove, 64),
    "batch": Proof(batch.prove, 100),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(PROOFS), help="names, separated by commas")
    parser.add_argument("--percent", type=float, default=100.0, help="of the full counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON lines file to add the results to")
    args = parser.parse_args()
    chosen = args.only.split(",")
    if unknown := set(chosen) - set(PROOFS):
        parser.error(f"there is no proof {', '.join(unknown)}; expected {', '.join(PROOFS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the server, too
    hold = True
    for name in chosen:
        count = max(2, round(PROOFS[name].count * args.percent / 100))
        start_s = time.monotonic()
        line = PROOFS[name].prove(count, args.seed)
        elapsed_s = round(time.monotonic() - start_s, 1)
        line |= {"seed": args.seed, "elapsed_s": elapsed_s, **environment(ROOT)}
        print(json.dumps(line), flush=True)
        if args.out is not None:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        hold = hold and line["holds"]
    raise SystemExit(not hold)


if __name__ == "__main__":
    main()
