"""The machine around the device: memory, limits, the port, and folders that serving writes to."""

import mmap
import os
import resource
import shutil
import socket
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

from jaxserve.config import Config
from jaxserve.doctor.finding import Finding, size
from jaxserve.folders import user_cache_folder

AREA = "host"
LEAST_FILES = 4096
PROBE_BYTES = 64 << 20
FULL_SHARE = 0.05


def host_findings(config: Config) -> list[Finding]:
    """Writes a file of 64 MiB, and removes it, in each folder it looks at."""
    return [
        _cpus(),
        _memory(config),
        _files(),
        _memlock(config),
        _port(config),
        *_folders(config),
    ]


def _cpus() -> Finding:
    can_use = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return Finding(AREA, "cpus", "ok", f"{can_use} of {os.cpu_count()}{load}")


def _memory(config: Config) -> Finding:
    from jaxserve.engine.host_memory import available_bytes

    free, wanted = available_bytes(), config.cache.kv_host_bytes
    if wanted > free:
        advice = "lower --kv-host-bytes"
        text = f"{size(free)} free, and kv_host_bytes is {size(wanted)}"
        return Finding(AREA, "memory", "bad", text, advice)
    return Finding(AREA, "memory", "ok", f"{size(free)} free")


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < LEAST_FILES:
        advice = f"ulimit -n {min(hard, 65_536) if hard > 0 else 65_536} before serving"
        text = f"{soft} open files: each connection takes one"
        return Finding(AREA, "ulimit -n", "note", text, advice)
    return Finding(AREA, "ulimit -n", "ok", f"{soft} open files")


def _memlock(config: Config) -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding(AREA, "memlock", "ok", "unlimited")
    text = size(soft)
    if config.cache.kv_host_bytes > soft:
        advice = (
            "ulimit -l unlimited, or LimitMEMLOCK=infinity in the service, to pin the host tier"
        )
        return Finding(AREA, "memlock", "note", f"{text}, less than kv_host_bytes", advice)
    return Finding(AREA, "memlock", "ok", text)


def _port(config: Config) -> Finding:
    host, port = config.server.host, config.server.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        advice = "another server may be running; choose another with --port"
        return Finding(AREA, "port", "note", f"{host}:{port} is not free: {error}", advice)
    return Finding(AREA, "port", "ok", f"{host}:{port} is free")


def _folders(config: Config) -> list[Finding]:
    """The caches, the hub's folder, and stores on local disks."""
    findings = []
    root = user_cache_folder()
    if root is None:
        advice = "set HOME or XDG_CACHE_HOME, else everything is compiled again at every start"
        findings.append(Finding(AREA, "cache folder", "note", "there is no home", advice))
    else:
        findings.append(_folder("cache folder", root))
    given = config.runtime.compile_cache_dir
    if given:
        findings.append(_folder("compile cache", Path(given)))
    from huggingface_hub import constants

    findings.append(_folder("hub cache", Path(constants.HF_HUB_CACHE)))
    for url in (config.cache.kv_store or "").split():
        parts = urlsplit(url)
        if parts.scheme == "file":
            findings.append(_folder("KV store", Path(unquote(parts.path))))
    return findings


def _folder(name: str, folder: Path) -> Finding:
    """Space, whether it can be written, O_DIRECT, and the speed of writing and reading."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent  # it is made when it is needed
    if not os.access(place, os.W_OK):
        advice = "make it writable, or name another"
        return Finding(AREA, name, "bad", f"{folder} cannot be written", advice)
    usage = shutil.disk_usage(place)
    text = f"{folder}: {size(usage.free)} of {size(usage.total)} free"
    if usage.free < max(4 * PROBE_BYTES, FULL_SHARE * usage.total):
        return Finding(AREA, name, "note", f"{text}, nearly full", "make room, or name another")
    try:
        speed = _probe(place)
    except OSError as error:
        return Finding(AREA, name, "bad", f"{text}; writing fails: {error.strerror}")
    text += f"; {speed}"
    return Finding(AREA, name, "ok", text)


def _probe(folder: Path) -> str:
    """Write, sync and read a file, past the page cache where the file system allows it."""
    path = folder / f".jaxserve-doctor-{os.getpid()}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    is_direct = hasattr(os, "O_DIRECT")
    buffer = mmap.mmap(-1, 4 << 20)  # page-aligned, as O_DIRECT wants
    buffer.write(os.urandom(1 << 20) * 4)
    try:
        try:
            fd = os.open(path, flags | (os.O_DIRECT if is_direct else 0), 0o600)
        except OSError:
            path.unlink(missing_ok=True)  # some file systems make the file and then refuse
            is_direct = False
            fd = os.open(path, flags, 0o600)
        try:
            start_s = time.perf_counter()
            for offset in range(0, PROBE_BYTES, len(buffer)):
                os.pwrite(fd, buffer, offset)
            os.fsync(fd)
            write_s = time.perf_counter() - start_s
            start_s = time.perf_counter()
            for offset in range(0, PROBE_BYTES, len(buffer)):
                os.preadv(fd, [buffer], offset)
            read_s = time.perf_counter() - start_s
        finally:
            os.close(fd)
    finally:
        path.unlink(missing_ok=True)
        buffer.close()
    how = "O_DIRECT" if is_direct else "no O_DIRECT (reads come from the page cache)"
    return (
        f"writes {PROBE_BYTES / write_s / 1e9:.2f} GB/s, reads {PROBE_BYTES / read_s / 1e9:.2f} "
        f"GB/s, {how}"
    )
