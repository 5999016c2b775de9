"""Routes below /admin/kv: what `jaxserve kv` asks of a running server.

The guard lets only the admin key through to here. Fields that are not known are refused: a typing
mistake must not clear more than was meant. Operations run beside the event loop, where the
engine is (see `engine_calls`).
"""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from jaxserve.server.context import Context
from jaxserve.server.streaming import to_json

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

    async def ask(request: Request, name: str, **arguments: Any) -> Response:
        result = await context_of(request).bridge.call(name, **arguments)
        return Response(to_json(result), media_type="application/json")

    @app.get("/admin/kv/stat")
    async def stat(request: Request) -> Response:
        return await ask(request, "kv_stat")

    @app.get("/admin/kv/blocks")
    async def blocks(request: Request, limit: int = 100, prefix: str = "") -> Response:
        return await ask(request, "kv_ls", limit=limit, prefix=prefix)

    @app.post("/admin/kv/verify")
    async def verify(request: Request, body: VerifyBody) -> Response:
        return await ask(request, "kv_verify", **body.model_dump())

    @app.post("/admin/kv/clear")
    async def clear(request: Request, body: ClearBody) -> Response:
        tiers = None if ALL in body.tiers else body.tiers
        return await ask(request, "kv_clear", tiers=tiers, stale=body.stale)

    @app.post("/admin/kv/pin")
    async def pin(request: Request, body: PinBody) -> Response:
        return await ask(request, "kv_pin", **body.model_dump())

    @app.post("/admin/kv/erase")
    async def erase(request: Request, body: EraseBody) -> Response:
        return await ask(request, "kv_erase", cache_salt=body.cache_salt)
