"""`make kernels-aot`: compile every kernel for an H200 and for TPUs, on a machine with neither.

    python -m tests.aot [--jax 0.10.2] [--out FILE] [--only REGEX] [--list]

Makes the environment with the compilers on the first run (see `environment`), then runs
`tests.aot.run` in it. Prints a JSON line for each kernel and exits with 1 if any breaks a bound.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from tests.aot import environment


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.aot", description=__doc__)
    parser.add_argument("--jax", choices=sorted(environment.RELEASES), default="0.10.2")
    parser.add_argument("--python", type=Path, help="an interpreter that has it all already")
    options, rest = parser.parse_known_args()
    python = options.python or environment.ensure(options.jax)
    command = [str(python), "-m", "tests.aot.run", *rest]
    variables = environment.variables(python)
    return subprocess.run(command, cwd=environment.ROOT, env=variables, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
