"""Compiles grammars, within limits, in threads of its own, and remembers the recent ones.

One for each model; safe to use from any thread. A front end compiles to refuse what is wrong
before it is queued; the engine compiles the same text to follow it.
"""

import concurrent.futures
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING

from jaxserve.errors import RequestError
from jaxserve.structured.blame import find_bad_part
from jaxserve.structured.constraint import Constraint
from jaxserve.structured.grammar import Body, complete
from jaxserve.structured.vocabulary import build_vocabulary
from jaxserve.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

COMPILE_S = 1.0
"""Longest time for compiling the grammar of one request."""

MAX_REMEMBERED = 64
NUM_THREADS = 2

LIMITS = {"max_lexer_states": 100_000, "verbose_errors": False}
"""Beside llguidance's own limits: 100,000 states are at most 200 MB."""


class GrammarError(Exception):
    """The grammar cannot be compiled."""


class GrammarCompiler:
    """Grammars over one model's tokens.

    Args:
        vocab_size: columns of the logits.
        eos_token_ids: what ends an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._lock = threading.Lock()
        self._ready: OrderedDict[str, Future[LLMatcher]] = OrderedDict()

    @cached_property
    def executor(self) -> "LLExecutor | None":
        """Threads that compute masks; None where there are too few cores for more than one.

        A single thread beside the caller only costs the hand-over: with the cores of a CPU device
        busy, eight masks took 2.3 ms through it and 0.5 ms without.
        """
        from llguidance import LLExecutor

        num_threads = min(16, (os.cpu_count() or 1) // 2)
        return LLExecutor(num_threads) if num_threads > 1 else None

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")

    @cached_property
    def _vocabulary(self) -> "LLTokenizer":
        return build_vocabulary(self._tokenizer, self._vocab_size, self._eos_token_ids)

    def warm_up(self) -> None:
        """Build the token table in the background, so that the first request need not wait.

        Does nothing the second time, or for a model that can follow no grammar.
        """
        if self._tokenizer.has_text and self._eos_token_ids:
            self.start('start: "x"\n')

    def check(self, body: Body, before: str = "") -> str:
        """The complete grammar of a body, which has been compiled; waits up to COMPILE_S.

        Raises:
            RequestError: it cannot be compiled, or not in time; says which part of a schema.
        """
        grammar = complete(body, before)
        try:
            self._result(self.start(grammar))
        except GrammarError as error:
            param, reason = body.param, str(error)
            if body.schema is not None:
                path, reason = find_bad_part(body.schema, self._error_of, reason)
                param = ".".join((param, *path))
            raise RequestError(
                f"{param} cannot be enforced: {reason[:400]}", param=param, code="invalid_grammar"
            ) from error
        except concurrent.futures.TimeoutError as error:
            raise RequestError(
                f"{body.param} took longer than {COMPILE_S:g} s to compile; make it simpler",
                param=body.param,
                code="invalid_grammar",
            ) from error
        return grammar

    def start(self, grammar: str) -> "Future[LLMatcher]":
        """Begin to compile a grammar, unless it is remembered.

        Raises:
            RequestError: the model has no tokenizer.
        """
        self._check_tokenizer()
        with self._lock:
            future = self._ready.get(grammar)
            if future is None:
                future = self._ready[grammar] = self._pool.submit(self._compile, grammar)
                while len(self._ready) > MAX_REMEMBERED:
                    self._ready.popitem(last=False)
            self._ready.move_to_end(grammar)
        return future

    def constraint(self, compiled: "Future[LLMatcher]") -> Constraint:
        """A constraint at the start of a grammar that has been compiled.

        Raises:
            GrammarError: it could not be.
        """
        return Constraint(compiled.result(timeout=0).deep_copy())

    def close(self) -> None:
        """Stop the threads."""
        if "_pool" in self.__dict__:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _check_tokenizer(self) -> None:
        if not self._tokenizer.has_text:
            raise RequestError(
                "structured output needs a tokenizer, and the checkpoint has no tokenizer.json",
                param="structured_outputs",
            )
        if not self._eos_token_ids:
            raise RequestError(
                "structured output needs an end-of-sequence token, and the checkpoint names none",
                param="structured_outputs",
            )

    def _result(self, future: "Future[LLMatcher]") -> "LLMatcher":
        with self._lock:
            has_table = "_vocabulary" in self.__dict__
        # The first grammar of a process also waits for the token table.
        return future.result(timeout=COMPILE_S if has_table else 30 + COMPILE_S)

    def _error_of(self, body: Body) -> str:
        """Why a body cannot be compiled; empty if it can."""
        try:
            self._pool.submit(self._compile, complete(body)).result(timeout=COMPILE_S)
        except GrammarError as error:
            return str(error)
        except concurrent.futures.TimeoutError:
            pass
        return ""

    def _compile(self, grammar: str) -> "LLMatcher":
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(**LIMITS)
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError(_first_lines(matcher.get_error()))
        return matcher


def _first_lines(message: str) -> str:
    """Without the excerpt of the grammar, which holds rules that the client did not write."""
    message = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", message)
    lines = [line for line in message.splitlines() if " | " not in line and line.strip(" ^")]
    return " ".join(line.strip() for line in lines)
