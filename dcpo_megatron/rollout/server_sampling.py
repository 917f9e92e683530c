"""One batch of requests on its way through the servers: who gets what, what comes back, and what is asked again elsewhere. asyncio, in one thread.

    waiting  --least loaded server-->  posted  --an event a sample-->  finished
       ^                                  |
       +---- the unfinished samples ------+   connection lost, 5xx, deadline: the server is evicted
                                              foreign weights: thrown away, the server is evicted
                                              aborted by a pause: asked again

A batch of samples is asked for a bounded number of times. What is finished stays finished.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace

import httpx

from dcpo_megatron.rollout.fleet import Fleet
from dcpo_megatron.rollout.protocol import GenerateRequest, Generation, RolloutError, SamplingParams
from dcpo_megatron.rollout.server import Server, ServerError, headers
from dcpo_megatron.rollout.server_answers import (
    BadAnswer,
    Batch,
    Failed,
    ForeignWeights,
    Refused,
    Unsure,
    batches_of,
    body,
    event_of,
    read,
    refusal_or_failure,
)

_CONNECT_SECONDS = 10.0
_ABORT_SECONDS = 2.0
# Between two requests through a router, which gets its servers back by itself.
_ROUTER_PAUSE_SECONDS = 1.0


class GaveUp(RolloutError):
    """Some responses cannot be sampled. ``finished``: those that were, by place in the requests."""

    def __init__(self, message: str, finished: dict[int, Generation]):
        super().__init__(message)
        self.finished = finished


class NoServersLeft(GaveUp):
    """No server with current weights is left."""


class Sampling:
    """Samples ``requests``. ``deliver(place, generation)`` takes each response when it is finished.

    Args:
        router: requests go there; None: straight to the servers of ``fleet``.
        first: index of the server that is asked first among equally loaded ones.
        oldest: the oldest weight version that tokens may be from.
        seconds: deadline of one posted request.
        attempts: how often a sample may be asked for.
        outstanding: samples posted to one server at a time, at most; the others wait for whichever server has room.
    """

    def __init__(
        self,
        fleet: Fleet,
        requests: Sequence[GenerateRequest],
        sampling: SamplingParams,
        deliver: Callable[[int, Generation], None],
        *,
        router: Server | None,
        first: int,
        oldest: int,
        seconds: float,
        attempts: int,
        outstanding: int,
    ):
        self.fleet, self.requests, self.sampling, self.deliver = fleet, requests, sampling, deliver
        self.router, self.first, self.oldest = router, first, oldest
        self.seconds, self.attempts, self.outstanding = seconds, attempts, outstanding
        self._load = {server.url: 0 for server in self._all()}
        # Servers that this batch evicted although their weights are what their tags say: what they still finish counts.
        self._slow: set[str] = set()
        self._reasons: dict[int, str] = {}

    async def run(self) -> None:
        """Returns when every response is delivered.

        Raises:
            NoServersLeft, GaveUp: some cannot be sampled (``finished`` is empty here: the caller has what was delivered).
            ServerError: a server refused a request as wrong.
            RolloutError: a server cannot sample what is asked (a response cut short).
        """
        waiting = batches_of(self.requests)
        posted: set[asyncio.Task] = set()
        # No connection is kept: a server closes idle ones, and a request sent into a closing one would look like a dying server.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        timeout = httpx.Timeout(None, connect=_CONNECT_SECONDS)
        async with httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False) as http:
            try:
                while waiting or posted:
                    while waiting and (server := self._choose(len(waiting[0].places))) is not None:
                        batch = waiting.pop(0)
                        self._load[server.url] += len(batch.places)
                        posted.add(asyncio.create_task(self._ask(http, server, batch)))
                    if not posted:
                        raise NoServersLeft(self._nobody(waiting), {})
                    done, posted = await asyncio.wait(posted, return_when=asyncio.FIRST_COMPLETED)
                    for rest in (task.result() for task in done):
                        if rest is not None:
                            self._bounded(rest)
                            waiting.insert(0, rest)
            finally:
                for task in posted:
                    task.cancel()
                await asyncio.gather(*posted, return_exceptions=True)

    def _all(self) -> Sequence[Server]:
        return self.fleet.servers if self.router is None else (self.router,)

    def _choose(self, samples: int) -> Server | None:
        """The least loaded server that has room for ``samples`` more; None where there is none, or all are busy."""
        usable = self.fleet.serving() if self.router is None else [self.router]
        order = {server.url: place for place, server in enumerate(self._all())}
        count = len(order)
        free = [
            server
            for server in usable
            if not self._load[server.url] or self._load[server.url] + samples <= self.outstanding
        ]
        return min(
            free, key=lambda server: (self._load[server.url], (order[server.url] - self.first) % count), default=None
        )

    async def _ask(self, http: httpx.AsyncClient, server: Server, batch: Batch) -> Batch | None:
        """Posts ``batch`` and delivers what it finishes. Returns what is left of it."""
        open_places = dict(enumerate(batch.places))
        try:
            reason, evict = await self._stream(http, server, batch, open_places)
        finally:
            self._load[server.url] -= len(open_places)
        if not open_places:
            return None
        rest = replace(batch, places=tuple(open_places.values()), attempts=batch.attempts + 1)
        self._reasons |= dict.fromkeys(rest.places, f"{server.url}: {reason}")
        if self.router is not None:
            await asyncio.sleep(_ROUTER_PAUSE_SECONDS)
        elif evict:
            self.fleet.evict(server, reason)
        return rest

    async def _stream(self, http, server: Server, batch: Batch, open_places: dict[int, int]) -> tuple[str, bool]:
        """Delivers what comes and takes it out of ``open_places``. Returns why the rest did not come, and whether the server is to be evicted for it."""
        rids = {index: uuid.uuid4().hex for index in open_places}
        version = self.fleet.version
        reason, evict = "it ended the answer before all responses were finished", False
        complete = False
        try:
            async with (
                asyncio.timeout(self.seconds),
                http.stream(
                    "POST",
                    f"{server.url}/generate",
                    json=body(batch, self.requests, self.sampling, list(rids.values())),
                    headers=headers(server.api_key),
                ) as answer,
            ):
                if answer.status_code >= 400:
                    content = (await answer.aread()).decode("utf-8", errors="replace")
                    raise refusal_or_failure(content, answer.status_code)
                async for line in answer.aiter_lines():
                    event = event_of(line)
                    if event is None:
                        continue
                    constant = self.fleet.version == version
                    index, generation = read(event, self.sampling, self.fleet.version_of, self.oldest, constant)
                    if generation is None or index not in open_places:
                        continue
                    if not self._trusted(server):
                        raise ForeignWeights(f"it lost our trust meanwhile ({self.fleet.evicted()[server.url]})")
                    self.deliver(open_places.pop(index), generation)
                    self._load[server.url] -= 1
            complete = True
        except Refused as error:
            raise ServerError(
                f"POST {server.url}/generate was refused: {error}; a prompt of {len(batch.prompt_token_ids)} tokens, "
                f"max_new_tokens={self.sampling.max_new_tokens}",
                server.url,
                "/generate",
                error.status,
            ) from None
        except TimeoutError:
            reason = f"responses were not finished within request_timeout={self.seconds:g} s: it hangs, or is too busy for that deadline"
            evict = True
            self._slow.add(server.url)
        except httpx.HTTPError as error:
            reason, evict = f"the connection was lost ({type(error).__name__}: {error})", True
            self._slow.add(server.url)
        except Failed as error:
            reason, evict = f"it failed: {error}", True
            self._slow.add(server.url)
        except (ForeignWeights, BadAnswer) as error:
            reason, evict = str(error), True
        except Unsure as error:
            reason = str(error)
        finally:
            if not complete and open_places:
                await self._abort(http, server, [rids[index] for index in open_places])
        return reason, evict

    def _trusted(self, server: Server) -> bool:
        if self.router is not None or server.url in self._slow:
            return True
        return server.url not in self.fleet.evicted()

    async def _abort(self, http: httpx.AsyncClient, server: Server, rids: Sequence[str]) -> None:
        """Tells the server that nobody waits for these. A server that does not take it will notice the closed connection."""

        async def one(rid: str) -> None:
            await http.post(f"{server.url}/abort_request", json={"rid": rid}, headers=headers(server.api_key))

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ABORT_SECONDS):
                await asyncio.gather(*(one(rid) for rid in rids), return_exceptions=True)

    def _bounded(self, rest: Batch) -> None:
        if rest.attempts < self.attempts:
            return
        message = f"{len(rest.places)} responses to one prompt were asked for {rest.attempts} times in vain, last at {self._reasons[rest.places[0]]}"
        if self.router is not None:
            raise NoServersLeft(f"{message}: look at the router's workers", {})
        raise GaveUp(f"{message}: look at the servers' logs; the prompt may be what they fail at", {})

    def _nobody(self, waiting: Sequence[Batch]) -> str:
        reasons = "; ".join(f"{url}: {reason}" for url, reason in self.fleet.evicted().items())
        count = sum(len(batch.places) for batch in waiting)
        return f"no server is left for {count} responses ({reasons or 'none holds the current weights'}): restart the servers; each is used again when it has taken new weights"
