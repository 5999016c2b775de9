"""A program that ends without closing its `LLM`."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from jaxserve import LLM, SamplingParams
llm = LLM(kv_host_bytes="8MiB", kv_store=f"file://{sys.argv[1]}", kv_load="load")
(answer,) = llm.generate(["once upon a time " * 20], SamplingParams(max_tokens=2, temperature=0))
print(answer.num_cached_tokens)
"""


def test_it_ends_and_what_it_computed_is_in_the_store(tmp_path: Path):
    """It hung: closing a store starts a thread, and the interpreter starts none while it ends."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "kv")]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, timeout=300) for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    assert int(first.stdout) == 0 and int(second.stdout) > 0
