"""`make lm-eval`: EleutherAI's lm_eval measures the embedded model through the server's endpoints.

    python -m tests.lm_eval.run [--prompts N] [--out FILE]

Two tasks of our own over the held-out retrieval prompts: choosing the right answer among four by
log-likelihood (local-completions, token ids, echo), and writing it (local-completions and
local-chat-completions). lm_eval lives in an environment of its own, `.venv-lm-eval`, made here on
the first run; LM_EVAL_PYTHON names another interpreter that has it. Exits with 1 if a task does not
reach what the model can do.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import jaxserve
from jaxserve.demo import running_server
from jaxserve.embedded import EMBEDDED_MODEL_NAME, checkpoint_path
from jaxserve.embedded.retrieval import heldout_prompts
from jaxserve.tokenizer import Tokenizer
from tests.own_environment import python_with

PACKAGES = ("lm_eval[api]==0.4.13", "torch==2.13.0", "transformers==5.23.0")
LEAST = 0.9
"""Share of right answers that every task must reach; the model's own is 96.6 %."""

SERVER = ("--max-num-seqs", "8", "--max-num-batched-tokens", "512")
"""Few compiled steps: lm_eval asks four requests at a time."""

EXACT = "exact_match,none"
CHOICE = "jaxserve_choice"
WRITE = "jaxserve_write"
TASKS = {
    CHOICE: """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}]
""",
    WRITE: """
output_type: generate_until
doc_to_target: reply
generation_kwargs: {until: ["<|end|>"], max_gen_toks: 32, temperature: 0}
metric_list: [{metric: exact_match}]
""",
}
COMMON = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: {text}
target_delimiter: ""
"""


def documents(num_prompts: int) -> Iterator[dict[str, Any]]:
    """Prompts with their reply; wrong choices have an answer of the same kind instead."""
    tokenizer = Tokenizer.from_folder(checkpoint_path())

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    prompts = list(heldout_prompts(count_tokens, num_prompts))
    for i, prompt in enumerate(prompts):
        answers = {other.answer for other in prompts if other.kind == prompt.kind}
        wrong = sorted(answers - {prompt.answer})[:3]
        choices = [prompt.reply.replace(prompt.answer, text) for text in (prompt.answer, *wrong)]
        label = i % len(choices)
        choices[0], choices[label] = choices[label], choices[0]
        question = prompt.messages[-1]["content"]
        yield {
            "question": question,
            "prompt": tokenizer.render_chat(prompt.messages),
            "choices": choices,
            "label": label,
            "reply": prompt.reply,
        }


def write_tasks(folder: Path, num_prompts: int) -> None:
    """The tasks as lm_eval reads them: for raw prompts, and for chats."""
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in documents(num_prompts)))
    for task, text in TASKS.items():
        for name, field in ((task, "prompt"), (f"{task}_chat", "question")):
            common = COMMON.format(name=name, data=data, text=field)
            (folder / f"{name}.yaml").write_text(common + text)


@dataclass(frozen=True, slots=True)
class Server:
    """How lm_eval reaches the server.

    Attributes:
        url: of the server.
        model: lm_eval's name for the kind of endpoint.
        path: below /v1.
        tokenizer: whose tokenizer makes token ids: "remote" is the server's; None: nobody's.
    """

    url: str
    model: str
    path: str
    tokenizer: str | None

    def arguments(self) -> str:
        """For lm_eval's --model_args."""
        given = {"model": EMBEDDED_MODEL_NAME, "base_url": f"{self.url}/v1/{self.path}"}
        given |= {"num_concurrent": "4", "max_retries": "1", "max_length": "2048"}
        given["tokenizer_backend"] = str(self.tokenizer)
        if self.tokenizer == "huggingface":
            given["tokenizer"] = str(checkpoint_path())
        return ",".join(f"{name}={value}" for name, value in given.items())


def evaluate(server: Server, folder: Path, tasks: str, *more: str) -> Any:
    """Run lm_eval's command; returns its results."""
    out = folder / f"results-{server.model}-{server.tokenizer}"
    command = [python_with(PACKAGES, "lm-eval"), "-m", "lm_eval", "--model", server.model]
    command += ["--model_args", server.arguments(), "--tasks", tasks]
    command += ["--include_path", str(folder), "--output_path", str(out), *more]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OPENAI_API_KEY": "none"}
    subprocess.run(command, check=True, env=os.environ | offline)
    (results,) = out.rglob("results_*.json")
    return json.loads(results.read_text())["results"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=100, help="held-out prompts to use")
    parser.add_argument("--out", type=Path, help="JSON lines file to add the results to")
    options = parser.parse_args()
    shares: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name, running_server(SERVER) as url:
        folder = Path(name)
        write_tasks(folder, options.prompts)
        for backend in ("remote", "huggingface"):
            server = Server(url, "local-completions", "completions", backend)
            found = evaluate(server, folder, f"{CHOICE},{WRITE}")
            shares[f"choose, local-completions, {backend} tokenizer"] = found[CHOICE]["acc,none"]
            shares[f"write, local-completions, {backend} tokenizer"] = found[WRITE][EXACT]
        server = Server(url, "local-chat-completions", "chat/completions", None)
        found = evaluate(server, folder, f"{WRITE}_chat", "--apply_chat_template")
        shares["write, local-chat-completions"] = found[f"{WRITE}_chat"][EXACT]
    for what, share in shares.items():
        print(f"{what}: {share:.1%} of {options.prompts}")
    if options.out is not None:
        line = {"bench": "lm_eval", "date": date.today().isoformat(), "prompts": options.prompts}
        line |= {"version": jaxserve.__version__, "lm_eval": PACKAGES[0], "right": shares}
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
    missed = {what: share for what, share in shares.items() if share < LEAST}
    if missed:
        print(f"below {LEAST:.0%}: {', '.join(missed)}")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
