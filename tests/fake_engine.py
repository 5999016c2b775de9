"""An engine without a model, and a tokenizer made on the spot, to test everything above them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxserve.config import Config
from jaxserve.errors import RequestError
from jaxserve.tokenizer import Tokenizer
from jaxserve.types import (
    FinishReason,
    PromptReuse,
    Request,
    StartupReport,
    States,
    TokenEvent,
    TokenLogprobs,
)

SPECIAL_TOKENS = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TRAINING_TEXT = [
    "Hello world, this is a story about the owl and the fox. Hello again!",
    "Ünïcödé tëxt, 日本語テキスト, 😀😃 and the end of the story.",
]


def byte_level_backend(vocab_size: int = 400) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TRAINING_TEXT, trainer)
    return backend


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    return Tokenizer(
        byte_level_backend(),
        special_tokens={"bos_token": "<|begin|>", "eos_token": "<|end|>"},
        chat_templates={} if chat_template is None else {"default": chat_template},
    )


def report_of_nothing() -> StartupReport:
    """What a start-up that did nothing says."""
    return StartupReport(
        num_params=1_234_567,
        load_s=0.1,
        num_pages=(1024, 64),
        num_cache_tokens=16_384,
        kv_bytes=1 << 20,
        num_graphs=7,
        compile_s=1.5,
        num_kept_graphs=3,
    )


EOS_ID = 1
HIDDEN_SIZE = 8
REPLY = "Hello world, a story with 日本語 and 😀 in it. The end of the story."


@dataclass
class _Live:
    request: Request
    reply: list[int]
    num_given: int = 0


@dataclass
class FakeEngine:
    """Answers every request with `reply(request)`, one token a step, then end-of-sequence."""

    tokenizer: Tokenizer = field(default_factory=make_tokenizer)
    config: Config = field(default_factory=Config)
    max_model_len: int = 256
    model_name: str = "fake"
    eos_token_ids: tuple[int, ...] = (EOS_ID,)
    reply: Callable[[Request], Sequence[int]] | None = None
    step_s: float = 0.0
    fail_at_step: int | None = None
    reuse: PromptReuse | None = None
    num_steps: int = 0
    closed: bool = False
    added: list[Request] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    _live: dict[str, _Live] = field(default_factory=dict)
    _seen_prompts: set[tuple[int, ...]] = field(default_factory=set)

    @property
    def model(self) -> Any:
        """What the command line and the limits look at."""
        vocab = SimpleNamespace(vocab_size=self.tokenizer.vocab_size, hidden_size=HIDDEN_SIZE)
        return SimpleNamespace(dtype="float32", config=vocab)

    @property
    def report(self) -> StartupReport:
        return report_of_nothing()

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def live_ids(self) -> list[str]:
        return list(self._live)

    def add(self, request: Request) -> None:
        limit = self.config.scheduler.max_num_waiting + self.config.scheduler.max_num_seqs
        if len(self._live) >= limit:
            raise RequestError("too many requests wait; try again later", code="queue_full")
        assert request.sampling.n == 1 and request.sampling.seed is not None
        reply = self.reply(request) if self.reply else self.tokenizer.encode(REPLY)
        self.added.append(request)
        self._live[request.request_id] = _Live(request, list(reply))

    def abort(self, request_id: str) -> None:
        if self._live.pop(request_id, None):
            self.aborted.append(request_id)

    def step(self) -> list[TokenEvent]:
        self.num_steps += 1
        if self.fail_at_step is not None and self.num_steps >= self.fail_at_step:
            raise RuntimeError("the device at 10.0.0.7 fell over")
        if self.step_s:
            time.sleep(self.step_s)
        running = list(self._live.values())[: self.config.scheduler.max_num_seqs]
        return [self._next_token(live) for live in running]

    def close(self) -> None:
        self.closed = True

    def _next_token(self, live: _Live) -> TokenEvent:
        request, sampling = live.request, live.request.sampling
        if request.pooling is not None:
            del self._live[request.request_id]
            states = States(hidden=pooled(request.prompt_ids, request.pooling))
            return TokenEvent(request.request_id, None, FinishReason.STOP, states=states)
        ends = live.num_given >= len(live.reply)
        token_id = EOS_ID if ends else live.reply[live.num_given]
        live.num_given += 1
        finish, stop_id = None, None
        can_stop = live.num_given > sampling.min_tokens
        if can_stop and token_id in sampling.stop_token_ids:
            finish, stop_id = FinishReason.STOP, token_id
        elif can_stop and token_id in request.eos_token_ids and not sampling.ignore_eos:
            finish, stop_id = FinishReason.STOP, token_id
        elif live.num_given >= (sampling.max_tokens or 0):
            finish = FinishReason.LENGTH
        first = live.num_given == 1
        cached = 0
        if first:
            cached = len(request.prompt_ids) - 1 if request.prompt_ids in self._seen_prompts else 0
            self._seen_prompts.add(request.prompt_ids)
        if finish:
            del self._live[request.request_id]
        return TokenEvent(
            request.request_id,
            token_id,
            finish_reason=finish,
            stop_token_id=stop_id,
            num_cached_tokens=cached,
            logprobs=_logprobs(token_id, sampling.logprobs),
            prompt_logprobs=self._prompt_logprobs(request) if first else None,
            reuse=self.reuse if first else None,
        )

    def _prompt_logprobs(self, request: Request) -> tuple[TokenLogprobs | None, ...] | None:
        num_top = request.sampling.prompt_logprobs
        if num_top is None:
            return None
        return (None, *(_logprobs(token_id, num_top) for token_id in request.prompt_ids[1:]))


def pooled(token_ids: Sequence[int], pooling: str) -> np.ndarray:
    """The embedding of a prompt that the fake engine gives, before it is scaled."""
    used = token_ids if pooling == "mean" else token_ids[-1:]
    angles = np.outer(np.array(used, np.float32), np.arange(1, HIDDEN_SIZE + 1))
    return np.cos(angles).mean(axis=0).astype(np.float32)


def _logprobs(token_id: int, num_top: int | None) -> TokenLogprobs | None:
    if num_top is None:
        return None
    top = tuple((token_id + i, -0.5 - i) for i in range(num_top))
    return TokenLogprobs(token_id, -0.5, top)
