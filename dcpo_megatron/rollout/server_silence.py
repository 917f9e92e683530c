"""How long a server may be silent before those who wait for its responses give it up. The deadline counts from its last
sign of work, not from when it was asked.

    an event of any response              -> the deadline of all that are under way there moves
    none for ``seconds``: it is asked        GET /health_generate: does it sample, for anybody?
                                             GET /v1/loads: does it still hold requests?
        yes                               -> the same
        no, for up to a minute            -> TimeoutError in all that are under way there

How long a response waits in the server's queue depends on what all ranks together have asked for, and between its first
token and its last it sends nothing: neither says that a server hangs. SGLang answers /health_generate after any step of
its scheduler; a busy server samples nothing for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx

from dcpo_megatron.rollout.server import Server, headers

# A publication may pause a server for so long; it samples for nobody then.
_PAUSED_SECONDS = 60.0
_AGAIN_SECONDS = 1.0


class Silence:
    """The silence of ``server``, in one event loop.

    Args:
        seconds: of silence until it is asked.
        asks: False for a router, which cannot speak for its servers: the silence itself is the end.
    """

    def __init__(self, http: httpx.AsyncClient, server: Server, seconds: float, asks: bool):
        self._http, self._server, self._seconds, self._asks = http, server, seconds, asks
        self._heard = 0.0
        self._under_way: set[asyncio.Timeout] = set()
        self._task: asyncio.Task[None]  # by the first that waits
        # Why the last deadline was over.
        self.reason = ""

    def broken(self) -> None:
        """The server has just shown that it works."""
        self._heard = asyncio.get_running_loop().time()

    @contextlib.asynccontextmanager
    async def deadline(self) -> AsyncIterator[None]:
        """Around waiting for the server; raises TimeoutError out of it when the server has stopped working."""
        async with asyncio.timeout(None) as timeout:
            if not self._under_way:
                self.broken()
                self._task = asyncio.create_task(self._watch())
            self._under_way.add(timeout)
            try:
                yield
            finally:
                self._under_way.discard(timeout)
                if not self._under_way:
                    self._task.cancel()

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._heard + self._seconds - loop.time())
            if loop.time() < self._heard + self._seconds:
                continue
            self.reason = f"it sampled nothing for request_timeout={self._seconds:g} s"
            if not self._asks or not await self._works():
                for timeout in self._under_way:
                    timeout.reschedule(loop.time())
                self._under_way.clear()
                return
            self.broken()

    async def _works(self) -> bool:
        loop, silent_since = asyncio.get_running_loop(), self._heard
        until = loop.time() + min(self._seconds, _PAUSED_SECONDS)
        idle = 0
        while loop.time() < until:
            with contextlib.suppress(TimeoutError, httpx.HTTPError):
                async with asyncio.timeout_at(until):
                    if (await self._get("/health_generate")).status_code == 200:
                        idle = 0 if self._holds_requests(await self._get("/v1/loads")) else idle + 1
                        if not idle:
                            return True
            if self._heard > silent_since:
                return True
            if idle == 2:
                self.reason += " and holds none of the responses that it was asked for"
                return False
            await asyncio.sleep(min(_AGAIN_SECONDS, max(0.0, until - loop.time())))
        self.reason += ", nor a token when it was asked for one: it hangs"
        return False

    async def _get(self, path: str) -> httpx.Response:
        return await self._http.get(f"{self._server.url}{path}", headers=headers(self._server.api_key))

    @staticmethod
    def _holds_requests(answer: httpx.Response) -> bool:
        """True also where the server's version does not say."""
        try:
            return any(load["num_running_reqs"] + load["num_waiting_reqs"] for load in answer.json()["loads"])
        except (ValueError, KeyError, TypeError):
            return True
