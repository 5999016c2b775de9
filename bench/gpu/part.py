"""One part of the suite in a process of its own: `python -m bench.gpu.part NAME --out FILE`."""

import argparse
import os
import sys
import time
from importlib import import_module
from pathlib import Path

from bench.gpu.parts import BACKGROUND, PARTS
from bench.gpu.report import Context, about_machine, device_name, read_limits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[part.name for part in (*PARTS, BACKGROUND) if part.module])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    (part,) = (part for part in (*PARTS, BACKGROUND) if part.name == args.name)
    context = Context(
        part=part.name,
        is_tiny=args.tiny,
        out=args.out,
        folder=args.out.parent,
        deadline_s=time.monotonic() + args.seconds,
        common={"tiny": True} | about_machine(device_name())
        if args.tiny
        else about_machine(device_name()),
        limits=read_limits(args.out),
    )
    getattr(import_module(f"bench.gpu.{part.module}"), part.function)(context)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Threads and destructors of a framework that hang at the end shall not cost the part its name.
    os._exit(code)
