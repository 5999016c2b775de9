"""What the handlers of one server share: the bridge, the tokenizer, limits, the model's name."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from jaxserve.chat_format_choice import ChatFormats
from jaxserve.config import Config
from jaxserve.conversation import ChatPlan, ToolUse, plan_chat
from jaxserve.errors import RequestError
from jaxserve.llm import EngineLike, grammars_of, limits_of
from jaxserve.requests import DrawSeed, make_requests, without_bad_words
from jaxserve.sampling_bounds import Limits
from jaxserve.server.answers import Answers
from jaxserve.server.bridge import EngineBridge, Link
from jaxserve.server.live import LiveFeed, Picture, picture
from jaxserve.server.metrics import render
from jaxserve.server.openai import SamplingFields, truncated
from jaxserve.server.response_store import ResponseStore
from jaxserve.structured import Body, GrammarCompiler
from jaxserve.tokenizer import Tokenizer
from jaxserve.types import Request, SamplingParams

if TYPE_CHECKING:
    from jaxserve.server.remote import RemoteEngine

T = TypeVar("T")

Connect: TypeAlias = Callable[[EngineBridge], Link]

WARMUP_MESSAGES = ({"role": "user", "content": "Hello"},)
"""Rendered once at start: the first client need not wait until the template is compiled."""

LONG_TEXT_CHARS = 8192
"""Longer texts are tokenised in a thread, so that other streams go on."""


@dataclass
class Context:
    """Made when the server starts, on its event loop."""

    tokenizer: Tokenizer
    limits: Limits
    model_name: str
    draw_seed: DrawSeed
    bridge: EngineBridge
    config: Config
    grammars: GrammarCompiler
    chat_formats: ChatFormats
    responses: ResponseStore = field(default_factory=lambda: ResponseStore(0))
    unknown_fields: set[str] = field(default_factory=set)
    created_s: int = field(default_factory=lambda: int(time.time()))
    live: LiveFeed = field(init=False)

    def __post_init__(self) -> None:
        self.live = LiveFeed(self.picture)

    @classmethod
    def of_engine(
        cls, engine: "EngineLike | RemoteEngine", connect: "Connect | None" = None
    ) -> "Context":
        """Take over an engine; needs a running event loop.

        Args:
            connect: the way to an engine in another process.
        """
        if engine.tokenizer.has_chat_template:
            with contextlib.suppress(RequestError):  # some templates refuse this message
                engine.tokenizer.encode_chat(WARMUP_MESSAGES)
        config = engine.config.model
        formats = ChatFormats.of(engine.tokenizer, config.tool_call_parser, config.reasoning_parser)
        grammars = grammars_of(engine)  # pyright: ignore[reportArgumentType]
        grammars.warm_up()
        bridge = EngineBridge(engine, connect)
        return cls(
            tokenizer=engine.tokenizer,
            limits=limits_of(engine),  # pyright: ignore[reportArgumentType]
            model_name=engine.model_name,
            draw_seed=DrawSeed(engine.config.runtime.seed),
            bridge=bridge,
            config=engine.config,
            responses=ResponseStore(engine.config.server.max_stored_responses),
            grammars=grammars,
            chat_formats=formats,
        )

    async def metrics(self) -> bytes:
        """What the engine counts, as Prometheus text."""
        bridge = self.bridge
        stats = await bridge.stats()
        return render(stats.scheduler, stats.kv, bridge.num_live, bridge.watch, self.model_name)

    async def picture(self) -> Picture:
        """What the engine counts, for people who watch it; raises EngineDeadError."""
        stats = await self.bridge.stats()
        num_live = self.bridge.num_live
        return picture(self.config, stats.scheduler, stats.kv, num_live, time.time())

    def check_model(self, name: str | None) -> None:
        """Raises RequestError if a request names another model."""
        if name is not None and name != self.model_name:
            raise RequestError(
                f"the model {name[:200]!r} does not exist; this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) < LONG_TEXT_CHARS:
            return self.tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)

    async def encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool,
        kwargs: dict[str, Any],
        *,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Token ids of a conversation; most templates write the special tokens themselves."""
        text = self.tokenizer.render_chat(messages, add_generation_prompt, **kwargs)
        return await self.encode(text, add_special_tokens=add_special_tokens)

    def truncated(self, token_ids: list[int], limit: int | None) -> list[int]:
        return truncated(token_ids, limit, self.limits.max_model_len)

    async def compile(self, form: Body | None, before: str = "") -> str:
        """The compiled grammar of an answer of this form, and what may precede it.

        Raises:
            RequestError: it cannot be enforced, or not be compiled within a second.
        """
        if form is None:
            return ""
        return await beside(lambda: self.grammars.check(form, before))

    async def plan_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        use: ToolUse | None = None,
        form: Body | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: dict[str, Any] | None = None,
        add_special_tokens: bool = False,
    ) -> tuple[ChatPlan, list[int]]:
        """How to serve a conversation, and the tokens of its prompt.

        Raises:
            RequestError: anything about it that cannot be served.
        """
        plan = plan_chat(
            self.chat_formats,
            messages,
            use=use,
            body=form,
            add_generation_prompt=add_generation_prompt,
            template_kwargs=template_kwargs,
        )
        # Most templates write the special tokens themselves.
        return plan, await self.encode(plan.prompt, add_special_tokens=add_special_tokens)

    async def grammar_of(self, plan: ChatPlan) -> str:
        """The compiled grammar of a conversation's answer; "": it may be anything.

        Raises:
            RequestError: it cannot be enforced, or not be compiled within a second.
        """
        return "" if plan.body is None else await beside(lambda: plan.check(self.grammars))

    def without_words(self, sampling: SamplingParams) -> SamplingParams:
        """Sampling parameters whose bad words are token ids."""
        return without_bad_words(
            sampling, lambda text: self.tokenizer.encode(text, add_special_tokens=False)
        )

    def requests(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        body: SamplingFields,
        param: str,
        grammar: str = "",
    ) -> list[Request]:
        return make_requests(
            request_id,
            prompt_ids,
            self.without_words(sampling),
            self.limits,
            draw_seed=self.draw_seed,
            priority=body.priority or 0,
            cache_salt=body.cache_salt or "",
            no_store=bool(body.cache_no_store),
            grammar=grammar,
            param=param,
        )

    async def submit(self, requests: Sequence[Request]) -> Answers:
        """Admit requests, all or none, before anything of the response is sent."""
        return await Answers.submit(self.bridge, requests, self.tokenizer)


async def beside(function: Callable[[], T]) -> T:
    """Run what may take long in a thread of its own, which nothing waits for at the end."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if outcome.done():
            return
        if error is None:
            outcome.set_result(result)  # pyright: ignore[reportArgumentType]
        else:
            outcome.set_exception(error)

    def work() -> None:
        result, failure = None, None
        try:
            result = function()
        except Exception as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has gone: nobody is left to tell
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=work, name="jaxserve-beside", daemon=True).start()
    return await outcome
