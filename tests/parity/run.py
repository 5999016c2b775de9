"""`make parity`: makes tiny checkpoints of every family that runs and holds the engine to them.

    python -m tests.parity.run [--families a,b] [--variants 0,1,2,3,4,5] [--seed N]

The oracle (torch and transformers) lives in an environment of its own, `.venv-parity`, made here on
the first run; PARITY_PYTHON names another interpreter that has both. Each checkpoint gets engine
settings drawn by the seed. Prints a line per checkpoint and exits with 1 if any is off.
"""

import argparse
import os
import random
import subprocess
import sys
from pathlib import Path

# As in the tests: several devices, and half the time of compiling.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
)

from tests.own_environment import python_with
from tests.parity.harness import TOLERANCE, Settings, check

ROOT = Path(__file__).parents[2]
FAMILIES = (
    "arcee,cohere,cohere2,cwm,ernie45,exaone4,gemma,gemma2,gemma3,glm,glm4,granite,helium,"
    "hunyuan_dense,hyperclovax,internlm3,jais2,llama2,llama31,ministral,ministral3,mistral,nemotron,"
    "olmo,olmo2,olmo3,phi2,phi3,qwen2,qwen3,seed_oss,smollm3,starcoder2,"
    "mixtral,qwen2_moe,qwen3_moe,olmoe,glm4_moe,dots1,minimax_m2,"
    "deepseek_v2,deepseek_v3,glm4_moe_lite,mistral4,youtu,minicpm3"
)
ORACLE = ("torch==2.13.0", "transformers==5.23.0", "safetensors", "numpy")


def make_checkpoints(families: str, variant: int) -> Path:
    """Write the checkpoints of one variant, unless they are there; returns their folder."""
    out = ROOT / ".parity" / f"v{variant}"
    missing = [name for name in families.split(",") if not (out / name / "expected.npz").exists()]
    if missing:
        script = Path(__file__).parent / "make_tiny_checkpoints.py"
        names = ",".join(missing)
        command = [
            python_with(ORACLE, "parity"),
            script,
            out,
            "--families",
            names,
            "--variant",
            str(variant),
        ]
        subprocess.run(command, check=True)
    return out


def random_settings(rng: random.Random) -> Settings:
    """An engine set-up that parity must not depend on."""
    page_size = rng.choice([1, 2, 4, 8, 16, 32])
    least = 128 // page_size
    return Settings(
        page_size=page_size,
        max_num_seqs=rng.choice([2, 3, 4]),
        max_num_batched_tokens=rng.choice([16, 24, 48, 64]),
        num_pages=rng.choice([None, least, least + 3]),
        tensor_parallel_size=rng.choice([1, 1, 2, 4]),
        enable_prefix_caching=rng.random() < 0.8,
        native_cpu=rng.random() < 0.7,
        few_shapes=rng.random() < 0.7,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Hold the engine to transformers")
    parser.add_argument("--families", default=FAMILIES)
    parser.add_argument("--variants", default="0,1,2,3,4,5")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    num_off = 0
    for variant in map(int, args.variants.split(",")):
        folder = make_checkpoints(args.families, variant)
        for family in args.families.split(","):
            settings = random_settings(rng)
            try:
                difference = check(folder / family, settings)
                verdict = "ok" if difference <= TOLERANCE else "TOO FAR"
                line = f"{difference:.1e} {verdict}"
            except AssertionError as error:
                verdict = line = f"DIFFERS: {str(error).splitlines()[0]}"
            num_off += verdict != "ok"
            print(f"{family} v{variant}: {line}  {settings if verdict != 'ok' else ''}", flush=True)
    print(f"{num_off} of the checkpoints are off")
    return 1 if num_off else 0


if __name__ == "__main__":
    sys.exit(main())
