"""GET /v1/status for a program without an axon: what container health checks and curious people ask."""

from __future__ import annotations

import ssl
from collections.abc import Callable

from aiohttp import web

from pilot.common.limits import Limits
from pilot.interfaces import Refused
from pilot.transport.server.listener import Listener
from protocol import Health

READING = ("GET", "HEAD")  # methods of an open path; aiohttp leaves the body out of the answer to HEAD


def health_response(health: Health) -> web.Response:
    status = 200 if health.healthy else 503
    return web.Response(text=health.model_dump_json(), status=status, content_type="application/json")


class HealthServer:
    """Answers with `health()`, unsigned, and nothing else."""

    def __init__(
        self, health: Callable[[], Health], host: str, port: int, limits: Limits, tls: ssl.SSLContext | None = None
    ) -> None:
        self._health = health
        self._listener = Listener(self._answer, host, port, limits, flag="serve", tls=tls)

    async def start(self) -> int:
        """The bound port. Raises ValueError where it cannot be bound."""
        return await self._listener.start()

    async def close(self) -> None:
        await self._listener.close()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path != "/v1/status":
            raise Refused(404, "only /v1/status is here")
        if request.method not in READING:
            raise Refused(405, "GET /v1/status")
        await self._listener.pace_open(request)
        return health_response(self._health())
