"""Brings packages to a GPU machine that has no network.

    python -m bench.gpu.wheels collect [--peers]    where there is a network (`make gpu-wheels`)
    python -m bench.gpu.wheels install              on the GPU machine; `suite.sh` does it

`collect` downloads, as wheels for Python 3.12 on x86-64, what jaxserve and its tests need and the
machine lacks (`present.txt` lists what it has), and what those need in turn. `--peers` adds
FlashInfer, an older and far smaller release than the newest; its kernels are compiled there.
`install` unpacks what is not there already. Both are quick to repeat.
"""

import argparse
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.gpu.report import ROOT, about_machine

FOLDER = ROOT / "bench" / "gpu" / ".wheels"
PRESENT = ROOT / "bench" / "gpu" / "present.txt"
PEERS = ("flashinfer-python==0.6.4", "apache-tvm-ffi>=0.1.6,<0.2")
TEST_PACKAGES = ("pytest", "pytest-xdist", "hypothesis")
MAX_BYTES = 48 << 20
"""Of all wheels together: they travel with the tree, which is small."""

PYTHON = "3.12"
PLATFORMS = tuple(
    f"manylinux{name}_x86_64"
    for name in ("2014", "1", "_2_17", "_2_24", "_2_27", "_2_28", "_2_31", "_2_34", "_2_35")
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verb", choices=("collect", "install"))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--site", type=Path, default=ROOT / ".cache" / "gpu-suite" / "site")
    parser.add_argument("--peers", action="store_true", help="FlashInfer, too")
    args = parser.parse_args()
    if args.verb == "collect":
        return collect(args.folder, with_peers=args.peers)
    install(args.folder, args.site)
    return 0


def collect(folder: Path, *, with_peers: bool) -> int:
    """Download what is missing; 1 if it is more than may travel."""
    folder.mkdir(parents=True, exist_ok=True)
    present = {_normal(name) for name in PRESENT.read_text().split() if not name.startswith("#")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *TEST_PACKAGES, *(PEERS if with_peers else ())]
    done: set[str] = set()
    while wanted:
        requirement = wanted.pop()
        name = _name_of(requirement)
        if name in present or name in done:
            continue
        done.add(name)
        wanted += _needs(_download(requirement, folder))
    for path in folder.glob("*.whl"):
        if _normal(path.name.split("-")[0]) not in done:
            path.unlink()
    (folder / "commit").write_text(about_machine("")["commit"])
    size = sum(path.stat().st_size for path in folder.glob("*.whl"))
    print(f"{len(done)} packages in {folder}, {size / 1e6:.1f} MB: {', '.join(sorted(done))}")
    if size > MAX_BYTES:
        print(f"more than {MAX_BYTES >> 20} MiB: leave some out", file=sys.stderr)
    return int(size > MAX_BYTES)


def _download(requirement: str, folder: Path) -> Path:
    """The wheel of a requirement, in the folder.

    Raises:
        SystemExit: there is none for the GPU machine.
    """
    name = _name_of(requirement)
    for path in folder.glob("*.whl"):
        if _normal(path.name.split("-")[0]) == name:
            return path
    options = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON]
    options += ["--implementation", "cp", "-d", str(folder), "-q", "--disable-pip-version-check"]
    for platform in PLATFORMS:
        options += ["--platform", platform]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for path in folder.glob("*.whl"):
        if _normal(path.name.split("-")[0]) == name:
            return path
    raise SystemExit(f"no wheel of {requirement} for Python {PYTHON}:\n{done.stderr[-800:]}")


def _needs(wheel: Path) -> "Iterator[str]":
    """What a wheel requires on the GPU machine, without extras."""
    from packaging.requirements import Requirement

    for text in _metadata(wheel).get_all("Requires-Dist") or ():
        requirement = Requirement(text)
        environment = {
            "python_version": PYTHON,
            "python_full_version": f"{PYTHON}.3",
            "sys_platform": "linux",
            "platform_system": "Linux",
            "platform_machine": "x86_64",
            "extra": "",
        }
        if requirement.marker is None or requirement.marker.evaluate(environment):
            # torch and CUDA's compilers come with the machine; the rest only some kernels want.
            if not _normal(requirement.name).startswith(("nvidia-", "torch", "cuda-")):
                yield f"{requirement.name}{requirement.specifier}"


def _metadata(wheel: Path) -> Any:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (x for x in archive.namelist() if x.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode())


def _name_of(requirement: str) -> str:
    name = requirement
    for separator in " <>=!~;[":
        name = name.split(separator)[0]
    return _normal(name)


def _normal(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(".", "-")


def install(folder: Path, site: Path) -> None:
    """Unpack the wheels of packages that this interpreter lacks into `site`."""
    site.mkdir(parents=True, exist_ok=True)
    missing = list(_missing(sorted(folder.glob("*.whl")), site))
    if missing:
        options = ["-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"]
        options += ["--disable-pip-version-check", "--target", str(site)]
        paths = [str(path) for path in missing]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, *paths], check=True)
    print(f"{len(missing)} brought packages unpacked into {site}", file=sys.stderr)


def _missing(wheels: "Iterable[Path]", site: Path) -> "Iterator[Path]":
    there = {_normal(x.metadata["Name"]) for x in metadata.distributions(path=[str(site)])}
    for path in wheels:
        name = _normal(path.name.split("-")[0])
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            if name not in there:
                yield path


if __name__ == "__main__":
    sys.exit(main())
