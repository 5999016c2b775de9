"""Python and the packages that matter, and whether they fit each other."""

import importlib.metadata
import platform
import sys

import jaxserve
from jaxserve.doctor.finding import Finding

AREA = "software"
NEEDED = ("numpy", "tensorstore", "orbax-checkpoint", "tokenizers", "fastapi", "uvicorn")
OPTIONAL = {
    "matplotlib": ("plots", "pip install 'jaxserve[plot]'"),
    "uvloop": ("a faster event loop for the server", "pip install uvloop"),
}
BROKEN_JAX = "0.11.1"


def package_findings() -> list[Finding]:
    """Versions, and packages that are missing."""
    python = platform.python_version()
    findings = [
        Finding(AREA, "jaxserve", "ok", jaxserve.__version__),
        Finding(AREA, "python", "ok", f"{python} at {sys.executable}"),
        _jax(),
    ]
    missing = [name for name in NEEDED if _version(name) is None]
    if missing:
        findings.append(
            Finding(
                AREA,
                "packages",
                "bad",
                f"missing: {', '.join(missing)}",
                "pip install --force-reinstall jaxserve",
            )
        )
    else:
        versions = ", ".join(f"{name} {_version(name)}" for name in NEEDED)
        findings.append(Finding(AREA, "packages", "ok", versions))
    for name, (what, how) in OPTIONAL.items():
        version = _version(name)
        if version is None:
            findings.append(Finding(AREA, name, "note", f"not installed: no {what}", how))
        else:
            findings.append(Finding(AREA, name, "ok", version))
    return findings


def _jax() -> Finding:
    jax, jaxlib = _version("jax"), _version("jaxlib")
    plugins = {
        name: version
        for name in ("jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu", "jax-rocm7-plugin")
        if (version := _version(name)) is not None
    }
    text = f"jax {jax}, jaxlib {jaxlib}"
    text += "".join(f", {name} {version}" for name, version in plugins.items())
    if jax is None or jaxlib is None:
        return Finding(AREA, "jax", "bad", text, "pip install 'jax>=0.10.2,<0.13,!=0.11.1'")
    if jax == BROKEN_JAX:
        advice = "this release copies arrays in loops on CPU: pip install -U 'jax!=0.11.1'"
        return Finding(AREA, "jax", "note", text, advice)
    others = [n for n, v in plugins.items() if "plugin" in n and _minor(v) != _minor(jax)]
    if _minor(jax) != _minor(jaxlib) or others:
        advice = f"jax, jaxlib and plugins must be of one release: pip install -U 'jax=={jax}'"
        return Finding(AREA, "jax", "bad", text, advice)
    return Finding(AREA, "jax", "ok", text)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:3])


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
