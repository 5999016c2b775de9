"""Chooses how to do paged attention: by machine, by name, and by what a backend says it cannot do.

    backend = get_backend("auto", this_machine())
    backend.ragged_paged_attention(q_tqh, pages, rows, spec)

What is chosen is a chain. Its first backend is asked first; one that raises NotImplementedError
while it is traced is passed over for that call, with the reason logged once, and the next is asked.
`reference` is the last of every chain and can do everything. Layouts are the same for all, so one
backend may read what another wrote. ValueError is the caller's mistake and is not passed over.

A backend is a module of this package with the functions of `Backend`; it is imported when it is
first asked, and one that cannot be imported is passed over, too.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax

from jaxserve.pallas_kernels.fallback import Fallback, module_of
from jaxserve.pallas_kernels.paged_attention.arguments import check_arguments
from jaxserve.pallas_kernels.paged_attention.specs import (
    Attended,
    AttentionSpec,
    KVPages,
    RaggedRows,
)

UNSTABLE_CUSTOM_CALLS = ("__gpu$xla.gpu.triton",)
"""What kernels become in a traced program, and another version of jax may not understand."""


class Backend(Protocol):
    """The operations; see `reference` and `page_moves` for what each means."""

    @property
    def ragged_paged_attention(self) -> Callable[..., Attended]: ...
    @property
    def write_kv(self) -> Callable[..., KVPages]: ...
    @property
    def gather_pages(self) -> Callable[..., jax.Array]: ...
    @property
    def scatter_pages(self) -> Callable[..., jax.Array]: ...


class Bound(NamedTuple):
    """A backend whose options are fixed."""

    ragged_paged_attention: Callable[..., Attended]
    write_kv: Callable[..., KVPages]
    gather_pages: Callable[..., jax.Array]
    scatter_pages: Callable[..., jax.Array]


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides which backends can run.

    Attributes:
        platform: cpu, gpu or tpu.
        compute_capability: of an NVIDIA GPU, such as "9.0".
        native_cpu: the kernels of `pallas_kernels.cpu` are loaded, and the step runs on them.
    """

    platform: str
    compute_capability: str | None = None
    native_cpu: bool = False

    @property
    def backends(self) -> tuple[str, ...]:
        """Names of what can run here, the fastest first."""
        if self.platform == "gpu":
            # wgmma, which mosaic_gpu is made of, exists on Hopper and nowhere else.
            is_hopper = self.compute_capability == "9.0"
            return (*(("mosaic_gpu",) if is_hopper else ()), "triton", "reference")
        if self.platform == "tpu":
            return ("tpu", "reference")
        if self.platform == "cpu" and self.native_cpu:
            return ("cpu_native", "reference")
        return ("reference",)


def this_machine(*, native_cpu: bool = False) -> Machine:
    """The machine that JAX runs on."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    return Machine(device.platform, capability, native_cpu)


def get_backend(
    name: str, machine: Machine, load: "Callable[[str], Backend] | None" = None
) -> "Chain":
    """The chain that begins with the backend of that name; "auto" begins with the best one.

    Args:
        load: gives the module of a name; raises ImportError.

    Raises:
        ValueError: no such backend on this machine.
    """
    names = machine.backends
    if name != "auto":
        if name not in names:
            raise ValueError(
                f"attention backend {name!r} is not available here ({machine}); expected auto or "
                f"one of {list(names)}"
            )
        names = names[names.index(name) :]
    return Chain(names, load or module_of("jaxserve.pallas_kernels.paged_attention"))


class Chain:
    """Backends in the order in which they are asked. Itself a `Backend`.

    Args:
        names: of the backends.
        load: gives the module of a name; raises ImportError.
    """

    def __init__(self, names: tuple[str, ...], load: "Callable[[str], Backend]"):
        self.names = names
        self._backends = Fallback("attention", names, load)

    def ragged_paged_attention(
        self,
        q_tqh: jax.Array,
        pages: KVPages,
        rows: RaggedRows,
        spec: AttentionSpec,
        *,
        sinks_q: jax.Array | None = None,
    ) -> Attended:
        check_arguments(q_tqh, pages, rows, spec, sinks_q)
        ask = self._backends.ask
        return ask("ragged_paged_attention", q_tqh, pages, rows, spec, sinks_q=sinks_q)

    def write_kv(self, *args: Any) -> KVPages:
        return self._backends.ask("write_kv", *args)

    def gather_pages(self, *args: jax.Array) -> jax.Array:
        return self._backends.ask("gather_pages", *args)

    def scatter_pages(self, *args: jax.Array) -> jax.Array:
        return self._backends.ask("scatter_pages", *args)


def bind(backend: Backend, **options: Any) -> Bound:
    """A backend with options such as `interpret` fixed, for those operations that take them."""
    bound = {}
    for operation in Bound._fields:
        function = getattr(backend, operation)
        known = inspect.signature(function).parameters
        taken = {name: value for name, value in options.items() if name in known}
        bound[operation] = functools.partial(function, **taken) if taken else function
    return Bound(**bound)
