"""Compile a function for an H200 or a TPU that is not there, and say what came out.

Needs the environment that `environment` makes. XLA and ptxas (or libtpu) do all they would do on
the machine itself, short of autotuning and loading. Knows nothing of attention.
"""

import inspect
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

from tests.aot.gpu_kernels import GpuKernel, MosaicKernels, count_launches, read_triton

TARGETS = ("h200", "v5e", "v6e")

# The figures of an H200 SXM (NVIDIA's data sheet and the CUDA programming guide, compute
# capability 9.0), in the form in which XLA describes a device.
_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 150754820096
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 28 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H200"
"""


@dataclass(frozen=True)
class Program:
    """A compiled function.

    Attributes:
        hlo: optimised.
        kernels: the Pallas kernels, each once; empty on TPU, whose compiler says nothing of them.
        num_launches: on GPU, of anything; the body of a loop counts once.
    """

    hlo: str
    kernels: tuple[GpuKernel, ...]
    num_launches: int | None
    alias_bytes: int
    temp_bytes: int
    lower_s: float
    compile_s: float


class Compiler:
    """Compiles for one kind of device.

    Args:
        name: `h200`, `v5e` or `v6e`.

    Raises:
        ValueError: another name.
    """

    def __init__(self, name: str):
        if name not in TARGETS:
            raise ValueError(f"no target named {name!r}; expected one of {TARGETS}")
        self.name = name
        self.platform = "cuda" if name == "h200" else "tpu"
        if self.platform == "cuda":
            topology = topologies.get_topology_desc(
                platform="cuda", target_config=_H200, topology="1x1x1"
            )
        else:
            topology = topologies.get_topology_desc(f"{name}:2x2", platform="tpu")
        self._device = topology.devices[0]
        self._mosaic = MosaicKernels()

    def place(self, tree: Any) -> Any:
        """Shapes and dtypes of a tree on this device; row-major, as pages have to be kept.

        Left alone, TPU puts the pages, not the head dimension, into the lanes if heads are narrow.
        """
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._row_major(x)), tree
        )

    def _row_major(self, x: Any) -> Any:
        sharding = SingleDeviceSharding(self._device)
        return Format(Layout(tuple(range(len(x.shape)))), sharding)

    def compile(
        self, function: Callable[..., Any], args: tuple[Any, ...], *, donate: tuple[int, ...] = ()
    ) -> Program:
        """Compile `function(*args)`; `args` hold arrays, or things with a shape and a dtype."""
        args = self.place(args)
        options = {}
        if donate and self.platform == "tpu":
            options["out_shardings"] = jax.tree.map(
                self._row_major, jax.eval_shape(function, *args)
            )
        jitted = jax.jit(function, donate_argnums=donate, **options)
        with tempfile.TemporaryDirectory() as folder, self._as_default_device():
            dump, printed = Path(folder, "xla"), Path(folder, "printed")
            start = time.perf_counter()
            lowered = jitted.trace(*args).lower(lowering_platforms=(self.platform,))
            lower_s = time.perf_counter() - start
            flags: dict[str, str | bool] = {}
            if self.platform == "cuda":
                flags = {"xla_dump_to": str(dump), "xla_dump_emitter_re": "ptx"}
            with _standard_output_to(printed):
                compiled = lowered.compile(compiler_options=flags)
            compile_s = time.perf_counter() - start - lower_s
            hlo, memory = compiled.as_text(), compiled.memory_analysis()
            assert hlo is not None and memory is not None
            kernels, num_launches = [], None
            if self.platform == "cuda":
                kernels = read_triton(dump, hlo) + self._mosaic.read(hlo, printed.read_text())
                num_launches = count_launches(dump)
        return Program(
            hlo=hlo,
            kernels=tuple(kernels),
            num_launches=num_launches,
            alias_bytes=memory.alias_size_in_bytes,
            temp_bytes=memory.temp_size_in_bytes,
            lower_s=lower_s,
            compile_s=compile_s,
        )

    def _as_default_device(self) -> AbstractContextManager[Any]:
        """Pallas asks the mesh in use what it lowers for."""
        facts = {"device_kind": self._device.device_kind, "num_cores": self._num_cores}
        if "platform" in inspect.signature(AbstractDevice).parameters:  # jax >= 0.11
            facts["platform"] = "gpu" if self.platform == "cuda" else "tpu"
        # Pallas-TPU cannot lower under the default, explicit, kind of axis.
        mesh = AbstractMesh(
            (1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=AbstractDevice(**facts)
        )
        return jax.sharding.use_abstract_mesh(mesh)

    @property
    def _num_cores(self) -> int:
        return 132 if self.platform == "cuda" else 1


@contextmanager
def _standard_output_to(path: Path) -> Iterator[None]:
    """What C++ code prints, too."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with path.open("wb") as file:
            os.dup2(file.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
