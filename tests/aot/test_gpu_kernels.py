"""What is read from the compilers' output, and the occupancy that follows from it."""

import pytest

from tests.aot.gpu_kernels import GpuKernel, PtxasReport, parse_ptxas

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'attend' for 'sm_90a'
ptxas info    : Function properties for attend
    48 bytes stack frame, 40 bytes spill stores, 44 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes smem
ptxas info    : Compiling entry function 'merge' for 'sm_90a'
ptxas info    : Function properties for merge
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""


def test_ptxas_report_is_read_for_each_function():
    assert parse_ptxas(PTXAS) == {
        "attend": PtxasReport(spill_bytes=84, stack_bytes=48, registers=255),
        "merge": PtxasReport(spill_bytes=0, stack_bytes=0, registers=32),
    }


def test_a_warning_of_spills_is_not_laid_to_the_function_before():
    warned = PTXAS.replace(
        "ptxas info    : Compiling entry function 'merge'",
        "ptxas warning : Registers are spilled to local memory in function 'merge', "
        "8 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Compiling entry function 'merge'",
    )
    assert parse_ptxas(warned) == parse_ptxas(PTXAS)


def test_worst_of_two_variants_is_kept():
    better = PTXAS.replace("40 bytes spill", "0 bytes spill").replace("44 bytes", "0 bytes")
    assert parse_ptxas(PTXAS + better) == parse_ptxas(better + PTXAS) == parse_ptxas(PTXAS)


@pytest.mark.parametrize(
    ("registers", "threads", "smem_bytes", "blocks"),
    [
        (32, 1024, 0, 2),  # threads: 2048 an SM
        (128, 128, 0, 4),  # registers: 65,536
        (168, 384, 0, 1),
        (255, 256, 0, 1),
        (64, 128, 100_000, 2),  # shared memory: 228 KiB, 1 KiB of each block lost
        (16, 32, 0, 32),  # blocks
        (64, 128, 232_448, 1),
        (64, 128, 232_449, 0),
        (255, 1024, 0, 0),
    ],
)
def test_blocks_per_sm_are_limited_by(registers, threads, smem_bytes, blocks):
    kernel = GpuKernel("x", (1, 1, 1), threads, smem_bytes, PtxasReport(0, 0, registers))
    assert kernel.blocks_per_sm == blocks
    assert kernel.occupancy == blocks * (threads // 32) / 64
