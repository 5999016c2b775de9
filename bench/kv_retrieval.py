"""Whether KV that came back from a lower tier finds facts as well as KV that never left the device.

    python -m bench.kv_retrieval [--num 1000] [--folder FOLDER]

Asks the embedded model its held-out retrieval prompts (`jaxserve eval retrieval`) five times: with
no lower tiers; filling the host tier and then served from it; filling a disk store and then, in a
new engine, served from it. The device has room for a few prompts only; whatever a lower tier has is
loaded, whether that pays for so small a model or not. Prints one JSON line per
pass: accuracy, answers that differ from the first pass, and where the prompt tokens came from.
"""

import argparse
import json
import platform
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from typing import Any

import jax

from jaxserve.embedded.retrieval import RetrievalPrompt, heldout_prompts, score
from jaxserve.evals.retrieval import MAX_ANSWER_TOKENS, counter
from jaxserve.llm import LLM
from jaxserve.types import SamplingParams

HOST_BYTES = 3 << 29
NUM_PAGES = 640  # ten prompts of 1,024 tokens


def new_llm(**settings: Any) -> LLM:
    return LLM(num_pages=NUM_PAGES, max_num_seqs=8, max_num_batched_tokens=512, **settings)


def ask(llm: LLM, prompts: list[RetrievalPrompt]) -> tuple[list[str], Counter[str], int]:
    """Answers, where the prompt tokens came from, and how many prompt tokens there were."""
    sampling = SamplingParams(temperature=0, max_tokens=MAX_ANSWER_TOKENS)
    outputs = llm.chat([prompt.messages for prompt in prompts], sampling)
    sources: Counter[str] = Counter()
    for output in outputs:
        sources.update(output.cached_tokens_by_source)
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return [output.outputs[0].text for output in outputs], sources, num_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num", type=int, default=1000, metavar="PROMPTS")
    parser.add_argument("--folder", help="where the disk store is kept meanwhile")
    args = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="kv-retrieval-", dir=args.folder)
    disk = {
        "kv_store": f"file://{folder}/kv?max_bytes=4GiB",
        "kv_host_bytes": 64 << 20,
        "kv_load": "load",
    }
    host = {"kv_host_bytes": HOST_BYTES, "kv_offload": "eager", "kv_load": "load"}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    first: list[str] = []
    try:
        for settings, passes in (
            ({}, ("device",)),
            (host, ("fill host", "from host")),
            (disk, ("fill disk",)),
            (disk, ("from disk",)),
        ):
            with new_llm(**settings) as llm:
                prompts = list(heldout_prompts(counter(llm.tokenizer), args.num))
                for name in passes:
                    start = time.perf_counter()
                    answers, sources, num_tokens = ask(llm, prompts)
                    seconds = time.perf_counter() - start
                    first = first or answers
                    pairs = list(zip(prompts, answers, strict=True))
                    right = sum(score(prompt.answer, answer) for prompt, answer in pairs)
                    differ = sum(a != b for a, b in zip(answers, first, strict=True))
                    line = {
                        "bench": "kv_retrieval",
                        "pass": name,
                        "accuracy": round(right / len(prompts), 4),
                        "num_prompts": len(prompts),
                        "answers_that_differ": differ,
                        "prompt_tokens": num_tokens,
                        "cached_tokens_by_source": dict(sources),
                        "seconds": round(seconds, 1),
                        "commit": commit,
                        "device": jax.devices()[0].device_kind,
                        "machine": platform.machine(),
                        "jax": jax.__version__,
                        "python": platform.python_version(),
                    }
                    print(json.dumps(line), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
