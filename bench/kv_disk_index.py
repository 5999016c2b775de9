"""What a disk store costs beside its bytes: memory, time to open, time to look up.

    python -m bench.kv_disk_index [--folder .] [--records 1000000] [--policy lru]

Fills a store with small records (4 KiB), opens it again in a fresh process, and prints one JSON
line. Needs a little more than 4.3 GB of disk for a million records.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jaxserve.kv.envelope import NO_TENANT, seal
from jaxserve.kv.stores.base import PutStatus
from jaxserve.kv.stores.disk import DiskStore
from jaxserve.kv.stores.disk_options import DiskOptions

PAYLOAD_BYTES = 4096
BATCH = 256


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def key(index: int) -> bytes:
    return index.to_bytes(32, "big")


def open_store(folder: str, num_records: int, policy: str) -> DiskStore:
    max_bytes = (num_records + 5000) * (PAYLOAD_BYTES + 272) + (8 << 20)
    return DiskStore(folder, DiskOptions(max_bytes=max_bytes, policy=policy, fsync="never"))


def fill(folder: str, num_records: int, policy: str) -> float:
    """Returns microseconds of CPU per record."""
    store = open_store(folder, num_records, policy)
    payload = memoryview(bytes(PAYLOAD_BYTES))
    start_s = time.process_time()
    for first in range(0, num_records, BATCH):
        records = [
            seal(key(index), bytes(16), NO_TENANT, payload, created_s=1.0)
            for index in range(first, min(first + BATCH, num_records))
        ]
        assert set(store.put(records)) == {PutStatus.STORED}
    seconds = time.process_time() - start_s
    store.close()
    return seconds / num_records * 1e6


def reopen(folder: str, num_records: int, policy: str) -> dict[str, float]:
    before = resident_bytes()
    start_s = time.perf_counter()
    store = open_store(folder, num_records, policy)
    open_s = time.perf_counter() - start_s
    memory = resident_bytes() - before
    assert store.usage().num_records == num_records
    keys = [key(index * 7919 % num_records) for index in range(20_000)]
    start_s = time.perf_counter()
    assert all(store.probe(keys))
    probe_s = time.perf_counter() - start_s
    store.close()
    return {
        "memory_bytes_per_record": round(memory / num_records, 1),
        "open_s": round(open_s, 2),
        "probe_us_per_key": round(probe_s / len(keys) * 1e6, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("."))
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--policy", default="lru")
    parser.add_argument("--reopen", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.reopen:
        print(json.dumps(reopen(args.reopen, args.records, args.policy)), flush=True)
        return
    with tempfile.TemporaryDirectory(dir=args.folder, prefix=".kv-disk-index-") as folder:
        put_us = fill(folder, args.records, args.policy)
        command = [sys.executable, "-m", "bench.kv_disk_index", "--reopen", folder]
        command += ["--records", str(args.records), "--policy", args.policy]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    line = {"bench": "kv_disk_index", "records": args.records, "policy": args.policy}
    line |= {"put_cpu_us_per_record": round(put_us, 1), **json.loads(output)}
    line |= {"commit": commit or "unknown", "python": platform.python_version()}
    print(json.dumps(line | {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}))


if __name__ == "__main__":
    main()
