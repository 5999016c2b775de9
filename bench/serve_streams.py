"""What serving many streams over HTTP costs the engine, against the same load through `LLM`.

    python -m bench.serve_streams [--streams 256] [--tokens 400] [--rounds 3] [--step-ms 10]
        [--engine paced|embedded] [--ways llm,inside,apart]

`llm` is the engine in process, its answers turned into text, without HTTP. `inside` is the server
with the engine's thread in its own process, `apart` the server with the engine in another process.
The client is always a process of its own. The ways take turns; one JSON line for each turn, then
one with medians and their ratio to `llm`. `paced` is a device that takes `--step-ms` for a step and
no processor time, like an accelerator; `embedded` computes on the same cores that serve.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.peers.machine import environment

ROOT = Path(__file__).resolve().parent.parent
READY_TIMEOUT_S = 300


def main() -> None:
    parser = argparse.ArgumentParser(description="what serving streams costs the engine")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--engine", choices=("paced", "embedded"), default="paced")
    parser.add_argument("--ways", default="llm,inside,apart")
    args = parser.parse_args()
    ways = args.ways.split(",")
    rates: dict[str, list[float]] = {way: [] for way in ways}
    setting = {
        "bench": "serve_streams",
        "engine": args.engine,
        "streams": args.streams,
        "step_ms": args.step_ms if args.engine == "paced" else None,
    }
    for round_index in range(args.rounds):
        for way in ways:
            line = measure(way, args)
            rates[way].append(line["steps_per_s"])
            print(json.dumps({**setting, "way": way, "round": round_index, **line}), flush=True)
    medians = {way: statistics.median(values) for way, values in rates.items()}
    summary: dict[str, Any] = {f"{way}_steps_per_s": round(m, 2) for way, m in medians.items()}
    for way in ways:
        if way != "llm" and "llm" in ways:
            summary[f"{way}_of_llm"] = round(medians[way] / medians["llm"], 3)
    print(json.dumps({**setting, **summary, **environment(ROOT)}), flush=True)


def measure(way: str, args: argparse.Namespace) -> dict[str, Any]:
    """One turn of one way."""
    common = [args.engine, str(args.streams), str(args.step_ms)]
    if way == "llm":
        command = [sys.executable, "-m", "bench.streams.inside_llm", *common, str(args.tokens)]
        output = subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout
        return json.loads(output.splitlines()[-1])
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "bench.streams.server", way, port, *common]
    server = subprocess.Popen(command, cwd=ROOT)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(url, server)
        before = cpu_seconds(server.pid)
        client = [sys.executable, "-m", "bench.streams.client", url]
        output = subprocess.run(
            [*client, str(args.streams), str(args.tokens)], check=True, capture_output=True
        ).stdout
        line = json.loads(output.splitlines()[-1])
        used = {name: s - before.get(name, 0) for name, s in cpu_seconds(server.pid).items()}
    finally:
        server.terminate()
        server.wait(30)
    num_tokens = args.streams * args.tokens
    return {
        "steps_per_s": round(line["steps"] / line["window_s"], 2),
        **{f"{name}_cpu_us_per_token": round(1e6 * s / num_tokens, 1) for name, s in used.items()},
        **line,
    }


def cpu_seconds(pid: int) -> dict[str, float]:
    """Processor time of the server's process, and of its children."""
    used: dict[str, float] = {}
    for name, one in [("server", pid), *(("engine", child) for child in _children(pid))]:
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        used[name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


def _children(pid: int) -> list[int]:
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until_healthy(url: str, server: "subprocess.Popen[bytes]") -> None:
    import httpx

    until_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < until_s:
        assert server.poll() is None, "the server ended before it was ready"
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise TimeoutError("the server did not get ready")


if __name__ == "__main__":
    main()
