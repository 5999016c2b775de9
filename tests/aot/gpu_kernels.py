"""Registers, spills, shared memory and occupancy of the GPU kernels in a compiled program.

Three sources: XLA's list of launches (grid, threads, shared memory), ptxas run again with -v on the
PTX that XLA dumped (registers, spills), and, for Mosaic kernels, which XLA only calls, their own
module and what ptxas said when Mosaic ran it. Knows nothing of what the kernels compute.
"""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jax._src.interpreters import mlir
from jax._src.lib import mosaic_gpu_dialect
from jax._src.lib.mlir import ir

# Compute capability 9.0 (CUDA programming guide, technical specifications; register allocation unit
# as in NVIDIA's occupancy calculator).
MAX_SMEM_BYTES = 232_448  # of one block
_SMEM_BYTES_PER_SM = 233_472
_SMEM_BYTES_RESERVED = 1024  # of each block
_REGISTERS_PER_SM = 65_536
_REGISTER_UNIT = 256  # a warp's registers are rounded up to this
_WARPS_PER_SM = 64
_BLOCKS_PER_SM = 32

# Not what a warning says of spills: it comes before the function that it is about.
_SPILLS = re.compile(r"stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")

_TRITON = "__gpu$xla.gpu.triton"
_MOSAIC = "mosaic_gpu_v2"


@dataclass(frozen=True, order=True)
class PtxasReport:
    """What ptxas says of one entry function; registers and bytes are those of a thread."""

    spill_bytes: int  # stored and loaded
    stack_bytes: int
    registers: int


@dataclass(frozen=True)
class GpuKernel:
    """One kernel as it is launched; `smem_bytes` is a block's static and dynamic shared memory."""

    name: str
    grid: tuple[int, int, int]
    threads: int
    smem_bytes: int
    ptxas: PtxasReport

    @property
    def blocks_per_sm(self) -> int:
        """How many blocks fit on an SM at once; 0: it cannot be launched."""
        if self.smem_bytes > MAX_SMEM_BYTES:
            return 0
        warps = -(-self.threads // 32)
        registers = -(-self.ptxas.registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT * warps
        return min(
            _BLOCKS_PER_SM,
            _WARPS_PER_SM // warps,
            _REGISTERS_PER_SM // registers,
            _SMEM_BYTES_PER_SM // (self.smem_bytes + _SMEM_BYTES_RESERVED),
        )

    @property
    def occupancy(self) -> float:
        """Warps on an SM over the most it holds."""
        return self.blocks_per_sm * -(-self.threads // 32) / _WARPS_PER_SM


def parse_ptxas(text: str) -> dict[str, PtxasReport]:
    """Reports by entry function, from `ptxas -v`; of several with one name, the worst."""
    reports: dict[str, PtxasReport] = {}
    for part in text.split("Compiling entry function '")[1:]:
        name, _, facts = part.partition("'")
        report = PtxasReport(
            spill_bytes=max(
                (int(stores) + int(loads) for stores, loads in _SPILLS.findall(facts)), default=0
            ),
            stack_bytes=max(map(int, re.findall(r"(\d+) bytes stack frame", facts)), default=0),
            registers=max(map(int, re.findall(r"Used (\d+) registers", facts)), default=0),
        )
        reports[name] = max(report, reports.get(name, report))
    return reports


def count_launches(dump: Path) -> int:
    """Kernels, copies and calls in XLA's list; the body of a loop counts once."""
    kinds = r": k(CustomKernel|CustomCall|Kernel|Copy|Memset\w*|Gemm\w*|CublasLt\w*|Cudnn\w*)\b"
    return sum(bool(re.search(kinds, line)) for line in _launch_list(dump))


def _launch_list(dump: Path) -> list[str]:
    (path,) = dump.glob("*.thunk_sequence.txt")
    return path.read_text().splitlines()


def read_triton(dump: Path, hlo: str) -> list[GpuKernel]:
    """The Pallas-Triton kernels, in the order of their first launch."""
    calls = _custom_calls(hlo, _TRITON)
    names = {name for call in calls for name in re.findall(r'\bname = "(\w+)"', call)}
    found: dict[str, GpuKernel] = {}
    for line in _launch_list(dump):
        launch = re.search(
            r" (\w+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), 1, 1\] +shared_memory: (\d+)",
            line,
        )
        # XLA numbers the variants of a name: attend, attend_1, ...
        if launch and {launch[1], re.sub(r"_\d+$", "", launch[1])} & names:
            x, y, z, threads, smem_bytes = map(int, launch.groups()[1:])
            if launch[1] not in found:
                report = _assemble(dump, launch[1])
                found[launch[1]] = GpuKernel(launch[1], (x, y, z), threads, smem_bytes, report)
    return list(found.values())


def _assemble(dump: Path, name: str) -> PtxasReport:
    """What ptxas says to the PTX of the kernel of that name."""
    for path in dump.glob("*.ptx"):
        if re.search(rf"\.entry {name}\(", path.read_text()):
            command = ["ptxas", "-v", "-arch=sm_90a", str(path), "-o", "/dev/null"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            return parse_ptxas(done.stderr + done.stdout)[name]
    raise LookupError(f"XLA's dump holds no PTX of the kernel {name}")


class MosaicKernels:
    """Mosaic GPU kernels; remembers ptxas's reports, for Mosaic compiles equal kernels once."""

    def __init__(self) -> None:
        self._reports: dict[bytes, PtxasReport] = {}

    def read(self, hlo: str, ptxas_output: str) -> list[GpuKernel]:
        """Each distinct kernel of a program once.

        Args:
            hlo: optimised HLO, whose custom calls hold the kernels' modules.
            ptxas_output: what Mosaic printed while the program was compiled.
        """
        new = parse_ptxas(ptxas_output)
        calls = _custom_calls(hlo, _MOSAIC)
        modules = dict.fromkeys(_unescape(_MODULE.findall(call)[0]) for call in calls)
        return [self._read_module(module, new) for module in modules]

    def _read_module(self, bytecode: bytes, new: dict[str, PtxasReport]) -> GpuKernel:
        """The operands of the module's `gpu.launch` are constants, and after the first these:
        the grid (3), the block (3), the cluster (3, if any), dynamic shared memory."""
        context = mlir.make_ir_context()
        context.allow_unregistered_dialects = True
        mosaic_gpu_dialect.register_dialect(context)
        context.load_all_available_dialects()
        with context:
            module = ir.Module.parse(bytecode)
            name = ir.StringAttr(module.operation.attributes["sym_name"]).value
            (launch,) = (x for x in _walk(module.operation) if x.name.endswith("gpu.launch"))
            x, y, z, *threads = (_constant(value) for value in list(launch.operands)[1:7])
            smem_bytes = _constant(launch.operands[-1])
        if bytecode not in self._reports:
            self._reports[bytecode] = new[f"{name}_mosaic_gpu_kernel"]
        count = threads[0] * threads[1] * threads[2]
        return GpuKernel(name, (x, y, z), count, smem_bytes, self._reports[bytecode])


def _walk(operation: ir.Operation) -> Iterator[ir.Operation]:
    for region in operation.regions:
        for block in region.blocks:
            for view in block.operations:
                yield view.operation
                yield from _walk(view.operation)


def _constant(value: ir.Value) -> int:
    return ir.IntegerAttr(value.owner.attributes["value"]).value  # pyright: ignore


def _custom_calls(hlo: str, target: str) -> list[str]:
    wanted = f'custom_call_target="{target}"'
    return [line for line in hlo.splitlines() if wanted in line]


_MODULE = re.compile(r'\bmodule = "((?:[^"\\]|\\.)*)"')


def _unescape(text: str) -> bytes:
    r"""The bytes of an MLIR string: \5C or \\ for what is not printable."""
    parts = re.split(r"\\([0-9A-F]{2}|\\)", text)
    plain = (part.encode() for part in parts)
    return b"".join(
        part if index % 2 == 0 else (b"\\" if part == b"\\" else bytes.fromhex(part.decode()))
        for index, part in enumerate(plain)
    )
