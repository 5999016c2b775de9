"""Greedy answers of the embedded model to some retrieval prompts: `python -m tests.gpu.greedy`.

A process of its own, for a test compares the devices of two. Prints one JSON object: settings come
as `name=value` arguments.
"""

import json
import sys
from typing import Any

NUM_PROMPTS = 12
MAX_TOKENS = 12


def answers(num_prompts: int = NUM_PROMPTS, **settings: Any) -> dict[str, Any]:
    """Token ids of each answer, how many are right, and what attention ran on."""
    from jaxserve.embedded.retrieval import heldout_prompts, score
    from jaxserve.evals.retrieval import embedded_counter
    from jaxserve.llm import LLM
    from jaxserve.types import SamplingParams

    prompts = list(heldout_prompts(embedded_counter(), num_prompts, max_tokens=512))
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    # On the CPU, too, what XLA makes of the model: it is the GPU that is held to it.
    given = {"max_num_seqs": 4, "max_num_batched_tokens": 256, "warmup": False, **settings}
    given["native_cpu"] = False
    with LLM(progress=False, **given) as llm:
        found = llm.chat([prompt.messages for prompt in prompts], sampling, use_tqdm=False)
        again = llm.chat([prompt.messages for prompt in prompts], sampling, use_tqdm=False)
        attention = llm.engine.config.runtime.attention_backend
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in found],
        "again": [list(output.outputs[0].token_ids) for output in again],
        "sources": [dict(output.cached_tokens_by_source) for output in again],
        "right": sum(
            score(prompt.answer, output.outputs[0].text)
            for prompt, output in zip(prompts, found, strict=True)
        ),
        "attention": attention,
    }


if __name__ == "__main__":
    pairs = (argument.split("=", 1) for argument in sys.argv[1:])
    print(json.dumps(answers(**{name: json.loads(value) for name, value in pairs})))
