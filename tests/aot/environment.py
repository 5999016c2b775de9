"""The environment that holds the device compilers: ptxas and XLA for CUDA, and libtpu.

A virtual environment of its own under `.cache/`, so that a jax that believes in a GPU never gets
into the one that serves or tests. Pinned, made once, reused. Only the standard library is needed.
"""

import hashlib
import os
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]

# ptxas and libdevice; newer ones than the plugin was built with are fine, older ones are not.
_CUDA_COMPILERS = ("nvidia-cuda-nvcc==13.5.37", "nvidia-nvvm==13.5.37")


class Release(NamedTuple):
    """What goes with one release of jax."""

    python: tuple[int, int]  # at least
    libtpu: str


RELEASES = {
    "0.10.2": Release((3, 11), "libtpu==0.0.42.1"),
    "0.11.2": Release((3, 12), "libtpu==0.0.48.1"),
}


def ensure(jax_version: str) -> Path:
    """The environment's interpreter; installs what is missing (about 450 MB and the project's own).

    Raises:
        SystemExit: this Python is too old for that jax, or pip failed.
    """
    release = RELEASES[jax_version]
    if sys.version_info[:2] < release.python:
        wanted = ".".join(map(str, release.python))
        raise SystemExit(
            f"jax {jax_version} needs Python {wanted} or newer, this is {sys.version.split()[0]}: "
            f"make kernels-aot AOT_JAX={jax_version} AOT_PYTHON=python{wanted}"
        )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ours = [f"jax=={jax_version}", *(x for x in project if not x.startswith("jax>"))]
    # Without what these depend on: gigabytes of CUDA libraries that no compiler calls.
    compilers = [
        f"jax-cuda13-plugin=={jax_version}",
        f"jax-cuda13-pjrt=={jax_version}",
        *_CUDA_COMPILERS,
        release.libtpu,
    ]
    folder = ROOT / ".cache" / f"aot-jax-{jax_version}"
    python = folder / "bin" / "python"
    stamp = folder / ".installed"
    digest = hashlib.sha256("\n".join([sys.version, *ours, *compilers]).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return python
    print(f"Installing the device compilers into {folder.relative_to(ROOT)} (once)", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=on"]
    try:
        subprocess.run([*pip, "-q", *ours], check=True)
        subprocess.run([*pip, "--no-deps", *compilers], check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"the device compilers cannot be installed: pip exits with {error}"
        ) from None
    stamp.write_text(digest)
    return python


def variables(python: Path) -> "dict[str, str]":
    """The environment variables under which that interpreter compiles for what is not there.

    Raises:
        SystemExit: it has no CUDA compiler.
    """
    found = sorted(python.parents[1].glob("lib/python3*/site-packages/nvidia/cu13"))
    if not found:
        raise SystemExit(
            f"{python} has no ptxas; expected the wheels nvidia-cuda-nvcc, nvidia-nvvm"
        )
    flags = [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_gpu_autotune_level=0",  # there is no device to try on
        f"--xla_gpu_cuda_data_dir={found[0]}",
    ]
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "CUDA_ROOT": str(found[0]),
        "PATH": f"{found[0] / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "XLA_FLAGS": " ".join(flags),
        "MOSAIC_GPU_DUMP_PTXAS": "1",  # `compilers` reads it
        "TPU_SKIP_MDS_QUERY": "1",  # do not ask a cloud machine for its metadata
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # the machine's, if it had one
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no device to fight over
        "TF_CPP_MIN_LOG_LEVEL": "3",  # complaints that there is no cuDNN and no nvdisasm
    }
