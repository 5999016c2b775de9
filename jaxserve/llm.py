"""A language model in process: prompts in, answers out, with vLLM's names.

    with LLM("path/to/checkpoint") as llm:
        for output in llm.generate(["Once upon a time"], SamplingParams(max_tokens=40)):
            print(output.outputs[0].text)

Synchronous, so it works in a notebook whose event loop is running. Not thread-safe: one thread
uses an LLM at a time. Several streams may be open at once; whoever asks for a token drives all.
"""

import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypeVar, cast

from tqdm import tqdm

from jaxserve.chat_template import Message
from jaxserve.config import Config
from jaxserve.errors import EngineDeadError, RequestError
from jaxserve.interrupts import interrupts_held
from jaxserve.outputs import OutputDelta, OutputProcessor, merge_deltas
from jaxserve.progress import Progress
from jaxserve.requests import (
    DrawSeed,
    Limits,
    check_dimensions,
    check_token_ids,
    default_sampling,
    make_pooling_request,
    make_requests,
)
from jaxserve.results import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    RequestOutput,
    embedding_of,
    embedding_output,
    request_output,
)
from jaxserve.settings import config_from_keywords
from jaxserve.tokenizer import Tokenizer
from jaxserve.types import Request, SamplingParams, TokenEvent

if TYPE_CHECKING:
    from jaxserve.engine.kv_admin import KVAdmin

T = TypeVar("T")

__all__ = [
    "LLM",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineLike",
    "Logprob",
    "RequestOutput",
    "limits_of",
]

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, {"prompt": text} or {"prompt_token_ids": ids}."""


class EngineLike(Protocol):
    """What `LLM` and the server need of an engine; one thread owns it."""

    config: Config
    tokenizer: Tokenizer
    model_name: str
    max_model_len: int
    eos_token_ids: tuple[int, ...]

    @property
    def has_work(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> list[TokenEvent]: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class _Job:
    """One prompt on its way; `processors` has one entry for each answer."""

    request_id: str
    prompt: str | None
    requests: list[Request]
    processors: list[OutputProcessor] = field(default_factory=list)


class _Encoded(NamedTuple):
    text: str | None
    token_ids: Sequence[int]


class LLM:
    """A model with its engine.

    Args:
        model: checkpoint folder or hub name; None is the model that ships with jaxserve.
        engine: an engine that is already built, instead of a model and settings.
        progress: show bars while loading and compiling.
        settings: any field of `jaxserve.config.Config` by name: dtype, max_model_len, page_size,
            max_num_seqs, tensor_parallel_size, seed, ...

    Raises:
        ConfigError: an unknown setting, or settings that cannot work together.
        WeightsError: a checkpoint that is broken or not supported.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        engine: EngineLike | None = None,
        progress: bool = True,
        **settings: Any,
    ):
        if engine is None:
            given = settings if model is None else {"model": str(model), **settings}
            engine = _build_engine(config_from_keywords(given), progress)
        elif model is not None or settings:
            raise TypeError("LLM takes either an engine, or a model and settings")
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self._limits = limits_of(engine)
        self._draw_seed = DrawSeed(engine.config.runtime.seed)
        self._sinks: dict[str, Callable[[TokenEvent], None]] = {}
        self._closed_because: str | None = None
        self._kv: KVAdmin | None = None

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        cache_salt: str = "",
        no_store: bool = False,
    ) -> list[RequestOutput]:
        """Continue prompts; the results are in the order of the prompts.

        Args:
            sampling_params: for all prompts, or one for each; None takes the checkpoint's own
                recommendation, and 16 tokens.
            cache_salt: share cached blocks only with requests of the same salt.
            no_store: keep nothing of these prompts and answers for later requests, in no tier.

        Raises:
            RequestError: a prompt or parameter that cannot be served; nothing was computed then.
        """
        prompt_list = _as_prompts(prompts)
        params = self._params_for(sampling_params, len(prompt_list), max_tokens=16)
        jobs = []
        for prompt, sampling in zip(prompt_list, params, strict=True):
            text, token_ids = self._encode(prompt)
            jobs.append(self._job(text, token_ids, sampling, cache_salt, no_store))
        return self._run(jobs, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        cache_salt: str = "",
        no_store: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several; always returns a list.

        Args:
            sampling_params: as for `generate`, but None generates until the model ends its answer.
        """
        conversations = cast(
            Sequence[Sequence[Message]],
            [messages] if messages and isinstance(messages[0], Mapping) else messages,
        )
        params = self._params_for(sampling_params, len(conversations), max_tokens=None)
        jobs = []
        for conversation, sampling in zip(conversations, params, strict=True):
            text = self.tokenizer.render_chat(
                conversation, add_generation_prompt, **(chat_template_kwargs or {})
            )
            token_ids = self.tokenizer.encode(text, add_special_tokens=False)
            jobs.append(self._job(text, token_ids, sampling, cache_salt, no_store))
        return self._run(jobs, use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: str = "last",
        normalize: bool = True,
        dimensions: int | None = None,
        use_tqdm: bool = True,
        cache_salt: str = "",
    ) -> list[EmbeddingRequestOutput]:
        """Embed prompts: the hidden states after the model's final norm, pooled.

        Args:
            pooling: "last" takes the last token's, which has seen all others; "mean" averages over
                all tokens, whose KV is then computed, not taken from the cache.
            normalize: scale each embedding to length 1.
            dimensions: keep only the first so many numbers.

        Raises:
            RequestError: a prompt or option that cannot be served; nothing was computed then.
        """
        dimensions = check_dimensions(dimensions, self._limits)
        jobs = []
        for prompt in _as_prompts(prompts):
            text, token_ids = self._encode(prompt)
            request_id = uuid.uuid4().hex
            request = make_pooling_request(
                request_id, token_ids, self._limits, pooling=pooling, cache_salt=cache_salt
            )
            jobs.append(_Job(request_id, text, [request]))
        self._serve(jobs, use_tqdm)
        outputs = []
        for job in jobs:
            (processor,) = job.processors
            vector = embedding_of(processor, normalize=normalize, dimensions=dimensions)
            outputs.append(embedding_output(job.request_id, job.prompt, processor, vector))
        return outputs

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        cache_salt: str = "",
        no_store: bool = False,
    ) -> Iterator[OutputDelta]:
        """Yield pieces of one answer as they come; `print(piece, end="")` prints the text.

        Closing the iterator early stops the work on the answer.

        Args:
            prompt: a prompt as for `generate`, or the messages of a conversation.
            sampling_params: as for `chat`.
        """
        (sampling,) = self._params_for(sampling_params, 1, max_tokens=None)
        if sampling.n != 1:
            raise RequestError(f"n is {sampling.n}; a stream has one answer", param="n")
        if _is_conversation(prompt):
            text = self.tokenizer.render_chat(
                cast(Sequence[Message], prompt), **(chat_template_kwargs or {})
            )
            token_ids = self.tokenizer.encode(text, add_special_tokens=False)
        else:
            text, token_ids = self._encode(cast(Prompt, prompt))
        return self._stream(self._job(text, token_ids, sampling, cache_salt, no_store))

    @property
    def kv(self) -> "KVAdmin":
        """The tiers of the KV cache: `stat`, `ls`, `verify`, `clear`, `pin`, `erase`, `plot`.

        Raises:
            TypeError: the engine is not jaxserve's own.
        """
        if self._kv is None:
            from jaxserve.engine import Engine
            from jaxserve.engine.kv_admin import KVAdmin

            if not isinstance(self.engine, Engine):
                raise TypeError("this engine has no KV tiers to look at")
            self._kv = KVAdmin(self.engine, self._call, self._wait_for, self._token_ids)
        return self._kv

    def _call(self, function: Callable[[], T]) -> T:
        """Run something on the engine's thread, which is this one."""
        self._check_open()
        return function()

    def _wait_for(self, event: threading.Event) -> None:
        """Work until an event is set."""
        while not event.is_set():
            if self.engine.has_work:
                self._step()
            else:
                event.wait(0.01)

    def _token_ids(self, prompt: Prompt) -> Sequence[int]:
        token_ids = self._encode(prompt).token_ids
        return check_token_ids(token_ids, "prompt", self._limits.vocab_size)

    def get_tokenizer(self) -> Tokenizer:
        return self.tokenizer

    def close(self) -> None:
        """Stop all work and free the device memory; the object is of no use afterwards."""
        if self._closed_because is None:
            self._closed_because = "the LLM was closed"
            self.engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _params_for(
        self,
        given: SamplingParams | Sequence[SamplingParams] | None,
        num_prompts: int,
        *,
        max_tokens: int | None,
    ) -> list[SamplingParams]:
        if given is None:
            given = default_sampling(self.tokenizer.generation_config, max_tokens=max_tokens)
        if isinstance(given, Sequence):
            if len(given) != num_prompts:
                raise RequestError(
                    f"{len(given)} sampling_params for {num_prompts} prompts; expected one each",
                    param="sampling_params",
                )
            return list(given)
        return [given] * num_prompts

    def _encode(self, prompt: Prompt) -> "_Encoded":
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return _Encoded(prompt.get("prompt"), prompt["prompt_token_ids"])
            if "prompt" not in prompt:
                raise RequestError(
                    "a prompt given as a mapping needs 'prompt' or 'prompt_token_ids'",
                    param="prompt",
                )
            prompt = cast("str", prompt["prompt"])
        if isinstance(prompt, str):
            return _Encoded(prompt, self.tokenizer.encode(prompt))
        return _Encoded(None, prompt)

    def _job(
        self,
        text: str | None,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        salt: str,
        no_store: bool,
    ) -> _Job:
        request_id = uuid.uuid4().hex
        requests = make_requests(
            request_id,
            token_ids,
            sampling,
            self._limits,
            draw_seed=self._draw_seed,
            cache_salt=salt,
            no_store=no_store,
        )
        return _Job(request_id, text, requests)

    def _run(self, jobs: list[_Job], use_tqdm: bool) -> list[RequestOutput]:
        self._serve(jobs, use_tqdm)
        return [request_output(job.request_id, job.prompt, job.processors) for job in jobs]

    def _serve(self, jobs: list[_Job], use_tqdm: bool) -> None:
        """Serve all jobs to their end; feeds the engine's queue no faster than it may grow."""
        waiting = deque((job, request) for job in jobs for request in job.requests)
        scheduler = self.engine.config.scheduler
        most_live = scheduler.max_num_seqs + scheduler.max_num_waiting
        live: set[str] = set()
        num_tokens = 0
        left = {job.request_id: len(job.requests) for job in jobs}
        bar = tqdm(total=len(jobs), desc="prompts", disable=not use_tqdm, leave=True)

        def admit(job: _Job, request: Request) -> None:
            processor = OutputProcessor(request, self.tokenizer)
            job.processors.append(processor)

            def sink(event: TokenEvent) -> None:
                nonlocal num_tokens
                delta = processor.process(event)
                num_tokens += len(delta.token_ids)
                if delta.finish_reason is not None:
                    self._retire(request.request_id, abort=delta.must_abort)
                    live.discard(request.request_id)
                    left[job.request_id] -= 1
                    if left[job.request_id] == 0:
                        bar.set_postfix_str(f"{num_tokens} tokens", refresh=False)
                        bar.update()

            self._admit(request, sink)
            live.add(request.request_id)

        try:
            while waiting or live:
                while waiting and len(live) < most_live:
                    admit(*waiting.popleft())
                self._step()
        finally:
            bar.close()
            for request_id in live:
                self._retire(request_id, abort=True)

    def _stream(self, job: _Job) -> Iterator[OutputDelta]:
        (request,) = job.requests
        processor = OutputProcessor(request, self.tokenizer)
        arrived: deque[TokenEvent] = deque()
        pending: list[OutputDelta] = []
        self._admit(request, arrived.append)
        try:
            while not processor.finished:
                while not arrived:
                    self._step()
                pending.append(processor.process(arrived.popleft()))
                if processor.finished:
                    self._retire(request.request_id, abort=pending[-1].must_abort)
                if pending[-1].text or processor.finished:
                    delta, pending = merge_deltas(pending), []
                    yield delta
        finally:
            if not processor.finished:
                self._retire(request.request_id, abort=True)

    def _admit(self, request: Request, sink: Callable[[TokenEvent], None]) -> None:
        self._check_open()
        self.engine.add(request)
        self._sinks[request.request_id] = sink

    def _retire(self, request_id: str, *, abort: bool) -> None:
        """Stop listening to a request, and stop the engine's work on it if there is any."""
        if self._sinks.pop(request_id, None) and abort and self._closed_because is None:
            self.engine.abort(request_id)

    def _step(self) -> None:
        self._check_open()
        if not self.engine.has_work:
            raise EngineDeadError("the engine has nothing to do, but requests are unanswered")
        with interrupts_held():
            try:
                events = self.engine.step()
            except Exception as error:
                self._closed_because = f"the engine failed: {error}"
                raise
            for event in events:
                if sink := self._sinks.get(event.request_id):
                    sink(event)

    def _check_open(self) -> None:
        if self._closed_because is not None:
            raise EngineDeadError(f"{self._closed_because}; make a new LLM")


def limits_of(engine: EngineLike) -> Limits:
    """What requests to this engine are checked against."""
    model = getattr(engine, "model", None)
    vocab_size = engine.tokenizer.vocab_size if model is None else model.config.vocab_size
    hidden_size = None if model is None else getattr(model.config, "hidden_size", None)
    return Limits(engine.max_model_len, vocab_size, tuple(engine.eos_token_ids), hidden_size)


def _build_engine(config: Config, progress: bool) -> EngineLike:
    from jaxserve.engine import build_engine

    if not progress:
        return build_engine(config)
    with Progress() as bars:
        return build_engine(config, bars)


def _as_prompts(prompts: Any) -> list[Prompt]:
    """One prompt or several, as a list of several."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise RequestError(
            f"expected a prompt or a list of prompts, not {type(prompts).__name__}", param="prompts"
        )
    prompts = list(prompts)
    if prompts and all(hasattr(type(item), "__index__") for item in prompts):
        return [prompts]
    return prompts


def _is_conversation(prompt: Any) -> bool:
    return (
        isinstance(prompt, Sequence)
        and bool(prompt)
        and not isinstance(prompt, str)
        and isinstance(prompt[0], Mapping)
    )
