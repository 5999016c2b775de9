"""What start-up takes for free host memory, on machines and in containers of several kinds."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.engine.host_memory import available_bytes, give_back_freed

GIB = 1 << 30


def write(root: Path, files: dict[str, str]) -> Path:
    files = {"proc/meminfo": f"MemFree: 1024 kB\nMemAvailable: {8 * GIB >> 10} kB\n"} | files
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_file_cache_counts_as_available(tmp_path: Path):
    assert available_bytes(write(tmp_path, {})) == 8 * GIB


def test_a_container_of_either_cgroup_version_is_the_limit(tmp_path: Path):
    stat = f"anon 5\ninactive_file {GIB // 2}\ntotal_inactive_file {GIB // 4}\n"
    new = write(
        tmp_path / "new",
        {
            "sys/fs/cgroup/memory.max": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory.current": f"{GIB}\n",
            "sys/fs/cgroup/memory.stat": stat,
        },
    )
    assert available_bytes(new) == GIB + GIB // 2
    old = write(
        tmp_path / "old",
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/memory.stat": stat,
        },
    )
    assert available_bytes(old) == GIB + GIB // 4


def test_an_enclosing_group_counts_and_no_limit_is_none(tmp_path: Path):
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/jobs/mine\n",
            "sys/fs/cgroup/jobs/mine/memory.max": "max\n",
            "sys/fs/cgroup/jobs/mine/memory.current": "5\n",
            "sys/fs/cgroup/jobs/memory.max": f"{3 * GIB}\n",
            "sys/fs/cgroup/jobs/memory.current": f"{GIB}\n",
        },
    )
    assert available_bytes(root) == 2 * GIB


def test_this_machine_has_some():
    assert available_bytes() > 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed")
def test_freed_memory_goes_back_to_the_system():
    def resident_bytes() -> int:
        num_pages = int(Path("/proc/self/statm").read_text().split()[1])
        return num_pages * os.sysconf("SC_PAGE_SIZE")

    pieces = [bytes([1]) * 50_000 for _ in range(2_000)]
    full = resident_bytes()
    del pieces[:-1]  # the last one keeps those before it in the heap
    give_back_freed()
    assert full - resident_bytes() > 90e6
    assert pieces


NUM_ARENAS = """
import ctypes, os, sys, threading
from jaxserve.engine.host_memory import share_arenas
if "share" in sys.argv:
    share_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fdopen.restype = ctypes.c_void_p
together = threading.Barrier(6)
def allocate():
    together.wait()
    for _ in range(1000):
        libc.malloc(ctypes.c_size_t(5000))
threads = [threading.Thread(target=allocate) for _ in range(6)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.malloc_info(0, ctypes.c_void_p(libc.fdopen(1, b"w")))
libc.fflush(None)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="arenas are those of glibc")
@pytest.mark.parametrize(
    ("arguments", "set_by_user", "expected"),
    [([], "", 3), (["share"], "", 2), (["share"], "1", 1)],
    ids=["as it is", "shared", "the user decides"],
)
def test_threads_share_arenas(arguments: list[str], set_by_user: str, expected: int):
    env = {**os.environ, "MALLOC_ARENA_MAX": set_by_user}
    if not set_by_user:
        del env["MALLOC_ARENA_MAX"]
    command = [sys.executable, "-c", NUM_ARENAS, *arguments]
    told = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    found = told.count("<heap nr=")
    assert found >= expected if not arguments else found == expected
