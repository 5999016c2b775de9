"""A language model in process: prompts in, answers out, with vLLM's names.

    with LLM("path/to/checkpoint") as llm:
        for output in llm.generate(["Once upon a time"], SamplingParams(max_tokens=40)):
            print(output.outputs[0].text)

`generate`, `chat`, `embed` and `stream` are synchronous and work in a notebook whose event loop is
running; `agenerate`, `achat` and `astream` let that loop go on. Threads, coroutines and streams may
use one LLM at the same time: whoever waits for a token drives all (see `driver`).
"""

import uuid
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

from jaxserve.chat_template import Message
from jaxserve.config import Config
from jaxserve.conversation import template_options
from jaxserve.driver import END, Driver, EngineLike, beside_the_loop
from jaxserve.errors import RequestError
from jaxserve.jobs import Job, outputs_of, serving, streaming
from jaxserve.outputs import OutputDelta
from jaxserve.progress import Progress
from jaxserve.requests import (
    DrawSeed,
    check_dimensions,
    default_sampling,
    make_pooling_request,
    make_requests,
    without_bad_words,
)
from jaxserve.results import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    RequestOutput,
    embedding_of,
    embedding_output,
)
from jaxserve.sampling_bounds import Limits, check_token_ids
from jaxserve.settings import config_from_keywords
from jaxserve.structured import GrammarCompiler, body_of
from jaxserve.tokenizer import Tokenizer
from jaxserve.types import SamplingParams

if TYPE_CHECKING:
    from jaxserve.engine.kv_admin import KVAdmin

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
        self._grammars = grammars_of(engine)
        self._draw_seed = DrawSeed(engine.config.runtime.seed)
        self._driver = Driver(engine)
        # Without `close`: when the last reference goes, and before the interpreter is taken apart,
        # while threads can still finish what they write.
        weakref.finalize(self, self._driver.close)
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
        jobs = self._generate_jobs(prompts, sampling_params, cache_salt, no_store)
        return self._run(jobs, use_tqdm)

    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        cache_salt: str = "",
        no_store: bool = False,
    ) -> list[RequestOutput]:
        """As `generate`, but the event loop goes on meanwhile; cancelling stops the work."""
        jobs = self._generate_jobs(prompts, sampling_params, cache_salt, no_store)
        return await self._arun(jobs, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        cache_salt: str = "",
        no_store: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several; always returns a list.

        Args:
            sampling_params: as for `generate`, but None generates until the model ends its answer.
            tools: functions in OpenAI's form, which the chat template shows to the model. Calls
                are part of the text, in the model's own form; the server reads them.

        Raises:
            RequestError: a message, option or tool that cannot be used.
        """
        jobs = self._chat_jobs(
            messages,
            sampling_params,
            template_options(add_generation_prompt, chat_template_kwargs, tools),
            cache_salt,
            no_store,
        )
        return self._run(jobs, use_tqdm)

    async def achat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        cache_salt: str = "",
        no_store: bool = False,
    ) -> list[RequestOutput]:
        """As `chat`, but the event loop goes on meanwhile; cancelling stops the work."""
        jobs = self._chat_jobs(
            messages,
            sampling_params,
            template_options(add_generation_prompt, chat_template_kwargs, tools),
            cache_salt,
            no_store,
        )
        return await self._arun(jobs, use_tqdm)

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
            jobs.append(Job(request_id, text, [request]))
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
        job = self._stream_job(prompt, sampling_params, chat_template_kwargs, cache_salt, no_store)
        return self._stream(job)

    def _stream(self, job: Job) -> Iterator[OutputDelta]:
        """The pieces of a job; holds the LLM, which closes its engine when nobody holds it."""
        yield from streaming(self._driver, self.tokenizer, job)

    async def astream(
        self,
        prompt: Prompt | Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        cache_salt: str = "",
        no_store: bool = False,
    ) -> AsyncIterator[OutputDelta]:
        """As `stream`, for `async for`: the event loop goes on while a token is computed."""
        job = self._stream_job(prompt, sampling_params, chat_template_kwargs, cache_salt, no_store)
        with closing(streaming(self._driver, self.tokenizer, job)) as pieces:
            while (piece := await beside_the_loop(pieces)) is not END:
                yield cast(OutputDelta, piece)

    def _stream_job(
        self,
        prompt: Prompt | Sequence[Message],
        sampling_params: SamplingParams | None,
        chat_template_kwargs: Mapping[str, Any] | None,
        cache_salt: str,
        no_store: bool,
    ) -> Job:
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
        return self._job(text, token_ids, sampling, cache_salt, no_store)

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
            self._kv = KVAdmin(
                self.engine, self._driver.call, self._driver.wait_for, self._token_ids
            )
        return self._kv

    def _token_ids(self, prompt: Prompt) -> Sequence[int]:
        token_ids = self._encode(prompt).token_ids
        return check_token_ids(token_ids, "prompt", self._limits.vocab_size)

    def get_tokenizer(self) -> Tokenizer:
        return self.tokenizer

    def close(self) -> None:
        """Stop all work and free the device memory; the object is of no use afterwards."""
        self._driver.close()

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
    ) -> Job:
        request_id = uuid.uuid4().hex
        grammar = ""
        if isinstance(sampling, SamplingParams) and sampling.structured_outputs is not None:
            grammar = self._grammars.check(body_of(sampling.structured_outputs))
        if isinstance(sampling, SamplingParams) and sampling.bad_words:
            sampling = without_bad_words(sampling, self._encode_bare)
        requests = make_requests(
            request_id,
            token_ids,
            sampling,
            self._limits,
            draw_seed=self._draw_seed,
            cache_salt=salt,
            no_store=no_store,
            grammar=grammar,
        )
        return Job(request_id, text, requests)

    def _encode_bare(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _generate_jobs(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        cache_salt: str,
        no_store: bool,
    ) -> list[Job]:
        prompt_list = _as_prompts(prompts)
        params = self._params_for(sampling_params, len(prompt_list), max_tokens=16)
        jobs = []
        for prompt, sampling in zip(prompt_list, params, strict=True):
            text, token_ids = self._encode(prompt)
            jobs.append(self._job(text, token_ids, sampling, cache_salt, no_store))
        return jobs

    def _chat_jobs(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        template: Mapping[str, Any],
        cache_salt: str,
        no_store: bool,
    ) -> list[Job]:
        conversations = cast(
            Sequence[Sequence[Message]],
            [messages] if messages and isinstance(messages[0], Mapping) else messages,
        )
        params = self._params_for(sampling_params, len(conversations), max_tokens=None)
        jobs = []
        for conversation, sampling in zip(conversations, params, strict=True):
            text = self.tokenizer.render_chat(conversation, **template)
            token_ids = self.tokenizer.encode(text, add_special_tokens=False)
            jobs.append(self._job(text, token_ids, sampling, cache_salt, no_store))
        return jobs

    def _run(self, jobs: list[Job], use_tqdm: bool) -> list[RequestOutput]:
        self._serve(jobs, use_tqdm)
        return outputs_of(jobs)

    async def _arun(self, jobs: list[Job], use_tqdm: bool) -> list[RequestOutput]:
        with closing(serving(self._driver, self.tokenizer, jobs, use_tqdm)) as steps:
            while await beside_the_loop(steps) is not END:
                pass
        return outputs_of(jobs)

    def _serve(self, jobs: list[Job], use_tqdm: bool) -> None:
        for _ in serving(self._driver, self.tokenizer, jobs, use_tqdm):
            pass


def limits_of(engine: EngineLike) -> Limits:
    """What requests to this engine are checked against."""
    model = getattr(engine, "model", None)
    vocab_size = engine.tokenizer.vocab_size if model is None else model.config.vocab_size
    hidden_size = None if model is None else getattr(model.config, "hidden_size", None)
    return Limits(engine.max_model_len, vocab_size, tuple(engine.eos_token_ids), hidden_size)


def grammars_of(engine: EngineLike) -> GrammarCompiler:
    """The engine's own compiler of grammars, or one like it."""
    own = getattr(engine, "grammars", None)
    if isinstance(own, GrammarCompiler):
        return own
    limits = limits_of(engine)
    return GrammarCompiler(engine.tokenizer, limits.vocab_size, limits.eos_token_ids)


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
