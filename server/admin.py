"""Routes below /admin/kv: what `jaxserve kv` asks of a running server.

The guard lets only the admin key through to here. Fields that are not known are refused: a typing
mistake must not clear more than was meant. Operations that take long run beside the event loop.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from jaxserve.errors import RequestError
from jaxserve.server.context import Context, beside
from jaxserve.server.streaming import to_json

if TYPE_CHECKING:
    from jaxserve.engine.kv_admin import KVAdmin

MAX_HASHES = 100_000
MAX_PROMPTS = 10_000
ALL = "all"


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class VerifyBody(_Body):
    """`prompts` are texts, lists of token ids, or objects with these and a `cache_salt`."""

    recompute: int = 0
    prompts: list[Any] | None = Field(default=None, max_length=MAX_PROMPTS)
    seed: int | None = None


class ClearBody(_Body):
    """`tiers` must be named; ["all"] means every one."""

    tiers: list[str] = Field(max_length=100)
    stale: bool = False


class PinBody(_Body):
    """`prompt` is a text or a list of token ids."""

    hashes: list[str] = Field(default_factory=list, max_length=MAX_HASHES)
    prompt: Any = None
    cache_salt: str = ""
    pinned: bool = True


class EraseBody(_Body):
    cache_salt: str


def add_admin_routes(app: FastAPI, context_of: Callable[[Request], Context]) -> None:
    """Add the routes to an app."""

    def kv_of(request: Request) -> "KVAdmin":
        kv = context_of(request).kv
        if kv is None:
            raise RequestError("this engine has no KV tiers", code="unsupported_engine")
        return kv

    async def answer(operation: Callable[[], Any]) -> Response:
        result = await beside(operation)
        return Response(to_json(result.as_json()), media_type="application/json")

    @app.get("/admin/kv/stat")
    async def stat(request: Request) -> Response:
        return await answer(kv_of(request).stat)

    @app.get("/admin/kv/blocks")
    async def blocks(request: Request, limit: int = 100, prefix: str = "") -> Response:
        kv = kv_of(request)
        return await answer(lambda: kv.ls(limit, prefix))

    @app.post("/admin/kv/verify")
    async def verify(request: Request, body: VerifyBody) -> Response:
        kv = kv_of(request)
        return await answer(lambda: kv.verify(body.recompute, body.prompts, body.seed))

    @app.post("/admin/kv/clear")
    async def clear(request: Request, body: ClearBody) -> Response:
        kv = kv_of(request)
        tiers = None if body.tiers == [ALL] else body.tiers
        return await answer(lambda: kv.clear(tiers, body.stale))

    @app.post("/admin/kv/pin")
    async def pin(request: Request, body: PinBody) -> Response:
        kv = kv_of(request)
        return await answer(lambda: kv.pin(body.hashes, body.prompt, body.cache_salt, body.pinned))

    @app.post("/admin/kv/erase")
    async def erase(request: Request, body: EraseBody) -> Response:
        kv = kv_of(request)
        return await answer(lambda: kv.erase(body.cache_salt))
