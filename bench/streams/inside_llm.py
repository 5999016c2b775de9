"""The same load without HTTP: `LLM.generate` in this process. Prints one JSON line.

python -m bench.streams.inside_llm ENGINE STREAMS STEP_MS TOKENS
"""

import json
import sys
import time
from typing import Any

from bench.streams.client import PROMPT
from bench.streams.engines import make_config, make_engine
from jaxserve.llm import LLM
from jaxserve.types import SamplingParams, TokenEvent


def main(name: str, num_streams: int, step_ms: float, num_tokens: int) -> dict[str, Any]:
    engine = make_engine(name, make_config(name, num_streams), step_ms)
    full_s: list[float] = []  # when steps ended that gave each stream a token
    step = engine.step

    def timed() -> list[TokenEvent]:
        events = step()
        if len(events) == num_streams:
            full_s.append(time.perf_counter())
        return events

    engine.step = timed
    conversations = [[{"role": "user", "content": PROMPT.format(i)}] for i in range(num_streams)]
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    with LLM(engine=engine) as llm:
        started = time.process_time()
        llm.chat(conversations, params, use_tqdm=False)  # pyright: ignore[reportArgumentType]
        used_s = time.process_time() - started
    window_s = full_s[-1] - full_s[0]
    return {
        "steps_per_s": round((len(full_s) - 1) / window_s, 2),
        "engine_cpu_us_per_token": round(1e6 * used_s / num_streams / num_tokens, 1),
        "steps": len(full_s) - 1,
        "window_s": round(window_s, 3),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))))
