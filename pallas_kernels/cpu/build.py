"""Compiles the CPU kernels with the system's compiler at first use, and registers them with XLA.

The library is cached in the user's cache folder under a digest of all that went into it, so it is
built once. Whatever is missing (a compiler, a folder of our own, an instruction set) is a reason
not to have native kernels, never an error: all that they do, plain XLA does too, slower.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jaxlib

from jaxserve.folders import user_cache_folder

logger = logging.getLogger(__name__)

SOURCES = (
    "native.cc",
    "instructions.cc",
    "common.inc",
    "kernels.inc",
    "blocks.inc",
    "linear.inc",
    "attention.inc",
    "rotate.inc",
)
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-w")
COMPILERS = ("c++", "g++", "clang++")
BUILD_TIMEOUT_S = 300
INSTRUCTIONS = ("none", "avx2", "avx512", "avx512_bf16")
AMX = "beside AMX"
TARGETS = (
    "jaxserve_linear",
    "jaxserve_gated",
    "jaxserve_grouped",
    "jaxserve_attention",
    "jaxserve_rotate",
)


class Native(NamedTuple):
    """Whether the kernels can be called; `detail` is the instruction set, or why they cannot.

    AMX is named behind it: they do not use it, but leave to XLA what is faster with it.
    """

    available: bool
    detail: str


class _Unavailable(Exception):
    """Why there are no native kernels here."""


@functools.cache
def load() -> Native:
    """Build if need be, load and register, once in a process; says so in the log, once."""
    try:
        library = ctypes.CDLL(str(library_path()))
        instructions = use_instructions(library)
        if instructions == "none":
            raise _Unavailable("this CPU has no AVX2")
        for target in TARGETS:
            capsule = jax.ffi.pycapsule(getattr(library, target))
            jax.ffi.register_ffi_target(target, capsule, platform="cpu")
    except (_Unavailable, OSError, subprocess.SubprocessError) as error:
        native = Native(False, " ".join(str(error).split())[:500])
        logger.info("native CPU kernels are not available, plain XLA serves: %s", native.detail)
        return native
    detail = f"{instructions} {AMX}" if _has_amx() else instructions
    logger.info("native CPU kernels: %s", detail)
    return Native(True, detail)


def _has_amx() -> bool:
    """Whether this machine multiplies tiles of bfloat16, as Linux tells it."""
    try:
        return " amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def use_instructions(library: ctypes.CDLL, most: int = 0) -> str:
    """Run on the fastest instruction set, or on INSTRUCTIONS[most] or below; returns which."""
    library.jaxserve_select.restype = ctypes.c_char_p
    library.jaxserve_select.argtypes = [ctypes.c_int]
    return library.jaxserve_select(most).decode()


def library_path() -> Path:
    """The compiled library, built now unless the cache has it."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise _Unavailable(f"there are none for {sys.platform} on {os.uname().machine}")
    compiler = _compiler()
    version = _run([*compiler, "--version"])
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for part in (
        *((here / name).read_bytes() for name in SOURCES),
        version.encode(),
        jaxlib.__version__.encode(),
        " ".join((*compiler, *FLAGS)).encode(),
    ):
        digest.update(len(part).to_bytes(8, "little") + part)
    folder = _cache_folder()
    path = folder / f"native-{digest.hexdigest()[:32]}.so"
    if path.exists():
        return path
    with open(path.with_suffix(".lock"), "w") as lock:
        with contextlib.suppress(
            OSError
        ):  # one process builds, others wait; not on every file system
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as parts:
                partial = Path(parts) / "native.so"
                _compile(compiler, here, Path(parts), partial)
                os.replace(partial, path)
    return path


def _compile(compiler: list[str], here: Path, parts: Path, library: Path) -> None:
    """The drivers, and the arithmetic for each instruction set: side by side, it takes seconds."""
    flags = [*FLAGS, f"-I{jax.ffi.include_dir()}", "-c"]
    jobs = {"native": [str(here / "native.cc")]}
    for level, name in enumerate(INSTRUCTIONS[1:], 1):
        jobs[name] = [str(here / "instructions.cc"), f"-DLEVEL={level}"]
    objects = {name: str(parts / f"{name}.o") for name in jobs}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(
            pool.map(lambda name: _run([*compiler, *flags, *jobs[name], "-o", objects[name]]), jobs)
        )
    _run([*compiler, "-shared", *objects.values(), "-o", str(library)])


def _compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CXX", ""))
    for candidate in [chosen] if chosen else [[name] for name in COMPILERS]:
        path = shutil.which(candidate[0])
        if path is not None:
            return [path, *candidate[1:]]
    raise _Unavailable(f"no C++ compiler ({chosen[0] if chosen else ', '.join(COMPILERS)})")


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=BUILD_TIMEOUT_S,
    )
    if done.returncode != 0:
        text = done.stderr.strip() or f"exit status {done.returncode}"
        raise _Unavailable(f"{Path(command[0]).name} failed: {text}")
    return done.stdout


def _cache_folder() -> Path:
    """A folder that nobody else can write to: what is in it gets executed."""
    root = user_cache_folder()
    if root is None:
        raise _Unavailable("the user has no home folder to keep them in: set XDG_CACHE_HOME")
    folder = root / "native"
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode):
        raise _Unavailable(f"{folder} is not a folder")
    if about.st_uid != os.getuid() or about.st_mode & 0o077:
        raise _Unavailable(f"{folder} must be ours alone: chmod 700")
    return folder
