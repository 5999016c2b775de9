"""The parts of the GPU suite in the order of their worth: module, function, time limit.

A part that is added here runs with all others, has a time limit, and is run tiny by the tests.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """One process of the suite.

    Attributes:
        name: for `--only`, and in every result line.
        module: below `bench.gpu`; "" runs the GPU tests instead.
        function: called with the `Context`.
        limit_s: it is killed after this.
        needs: packages without which it is left out.
        is_default: runs without being asked for by name.
        xla_flags: for this part only.
    """

    name: str
    module: str
    limit_s: float
    what: str
    function: str = "run"
    needs: tuple[str, ...] = ()
    is_default: bool = True
    xla_flags: str = ""


PARTS = (
    Part("limits", "limits", 60, "bandwidths, matrix products, the link to the host"),
    Part("quick-tests", "", 100, "each backend against float64, a few cases"),
    Part("kernels", "kernels", 170, "attention, writes and page moves, beside their limits"),
    Part("steps", "steps", 150, "the engine on the shape of Llama-3.1-8B"),
    Part(
        "steps-graphs",
        "steps",
        100,
        "the same with conditionals and loops, too, in CUDA graphs: the host waits for none",
        function="run_one",
        xla_flags="--xla_gpu_enable_command_buffer=+CONDITIONAL,+WHILE,+CUSTOM_CALL "
        "--xla_gpu_graph_min_graph_size=1",
    ),
    Part("tiers", "tiers", 75, "pages between device and host, and beside a running step"),
    Part(
        "torch-attention",
        "torch_attention",
        60,
        "torch's SDPA and flex attention",
        needs=("torch",),
    ),
    Part(
        "flashinfer",
        "flashinfer_peer",
        60,
        "FlashInfer's paged decode and prefill",
        needs=("torch", "flashinfer"),
    ),
    Part("tests", "", 200, "all GPU tests"),
    Part("layers", "layers", 90, "a scan over layers against the unrolled loop"),
    Part("steps-qwen3", "steps", 120, "the engine on the shape of Qwen3-8B", function="run_qwen3"),
    Part(
        "generate",
        "torch_generate",
        150,
        "transformers: static cache, continuous batching",
        needs=("torch", "transformers"),
    ),
    Part("tune", "tune", 280, "tile sizes of the attention launches", is_default=False),
)

BACKGROUND = Part(
    "flashinfer-build",
    "flashinfer_peer",
    420,
    "compiles FlashInfer's kernels beside the first parts",
    function="build",
    needs=("torch", "flashinfer"),
)
"""Runs on the host's processors while other parts use the GPU, and ends before `flashinfer`."""
