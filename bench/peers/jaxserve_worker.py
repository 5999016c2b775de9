"""jaxserve in a process of its own, through `LLM.generate`, with the time of every token.

The times are taken where the engine hands its tokens over, so that a batch can be told apart; what
`LLM` does with them (text, stop conditions) is inside the measured time all the same.
"""

import time
from typing import Any

from bench.peers.protocol import Command, serve


class Stopwatch:
    """Stands before an engine and notes when the tokens of each request come."""

    def __init__(self, engine: Any):
        self._engine = engine
        self.times_s: dict[str, list[float]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def add(self, request: Any) -> None:
        self.times_s[request.request_id] = []
        self._engine.add(request)

    def step(self) -> "list[Any]":
        events = self._engine.step()
        now_s = time.perf_counter()
        for event in events:
            if event.token_id is not None:
                self.times_s[event.request_id].append(now_s)
        return events


def start(settings: "dict[str, Any]") -> "dict[str, Command]":
    """Load and compile; see `jaxserve.config` for the settings."""
    import jax
    import jaxlib

    import jaxserve
    from jaxserve import LLM, SamplingParams
    from jaxserve.engine import build_engine
    from jaxserve.settings import config_from_keywords

    engine = build_engine(config_from_keywords(settings))
    watch = Stopwatch(engine)
    llm = LLM(engine=watch)  # pyright: ignore[reportArgumentType]

    def run(
        prompts: "list[list[int]]", answer_lens: "list[int]", way: str = ""
    ) -> "dict[str, Any]":
        watch.times_s.clear()
        sampling = [
            SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
            for length in answer_lens
        ]
        start_s = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return {
            "times_s": [[at_s - start_s for at_s in times] for times in watch.times_s.values()],
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        }

    def describe() -> "dict[str, Any]":
        versions = {"jaxserve": jaxserve.__version__, "jax": jax.__version__}
        report, config = engine.report, engine.config
        return {
            "versions": {**versions, "jaxlib": jaxlib.__version__},
            "kv_bytes": report.kv_bytes,
            "num_graphs": report.num_graphs,
            "compile_s": round(report.compile_s, 2),
            "load_s": round(report.load_s, 2),
            "max_num_seqs": config.scheduler.max_num_seqs,
            "max_num_batched_tokens": config.scheduler.max_num_batched_tokens,
        }

    return {"run": run, "describe": describe}


if __name__ == "__main__":
    serve(start)
