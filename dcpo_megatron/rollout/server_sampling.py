"""One batch of requests on its way through the servers: who gets what, what comes back, and what is asked again
elsewhere. asyncio, in one thread.

    waiting  --least loaded server-->  posted  --an event a sample-->  finished
       ^                                  |
       +---- the unfinished samples ------+   connection lost, 5xx, silent: the server is evicted
                                              foreign weights: thrown away, the server is evicted
                                              ended by a pause for new weights: goes on, here or elsewhere, from its
                                                  last token

A batch of samples is asked for in vain a bounded number of times. What is finished stays finished.
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
from dcpo_megatron.rollout.server import Server, ServerError, advice, headers
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
    joined,
    read,
    refusal_or_failure,
    tags,
)
from dcpo_megatron.rollout.server_silence import Silence

_CONNECT_SECONDS = 10.0
_ABORT_SECONDS = 2.0
_LOOK_SECONDS = 0.05
# Statuses that are no fault of the request: the server has another key now, or another service is in its place.
_WHOEVER_ASKS = (401, 403, 404, 405, 407)
# Before a request is repeated that came to nothing at a server (or router) which is not given up.
_PAUSE_SECONDS = 1.0


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
        seconds: of a server's silence until it is asked whether it still works
            (:class:`~dcpo_megatron.rollout.server_silence.Silence`).
        attempts: how often a sample may be asked for in vain.
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
        self._begun: dict[int, Generation] = {}

    async def run(self) -> None:
        """Returns when every response is delivered.

        Raises:
            NoServersLeft, GaveUp: some cannot be sampled (``finished`` is empty here: the caller has what was
                delivered).
            ServerError: a server refused a request as wrong.
            RolloutError: a server cannot sample what is asked (a response cut short).
        """
        waiting = batches_of(self.requests, together=self.router is None)
        posted: set[asyncio.Task] = set()
        done: set[asyncio.Task] = set()
        # No connection is kept: a server closes idle ones, and a request sent into a closing one would look like a
        # dying server.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        timeout = httpx.Timeout(None, connect=_CONNECT_SECONDS)
        async with httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False) as http:
            self._silence = {
                server.url: Silence(http, server, self.seconds, asks=self.router is None) for server in self._all()
            }
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
                await asyncio.gather(*posted, *done, return_exceptions=True)

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
        waiting = dict(enumerate(batch.places))
        known = self._tokens_begun(batch.places)
        try:
            reason, evict = await self._stream(http, server, batch, waiting)
        finally:
            self._load[server.url] -= len(waiting)
        if not waiting:
            return None
        left = tuple(waiting.values())
        in_vain = len(left) == len(batch.places) and self._tokens_begun(left) == known
        self._reasons |= dict.fromkeys(left, f"{server.url}: {reason}")
        if evict and self.router is None:
            self.fleet.evict(server, reason)
        elif in_vain:
            await asyncio.sleep(_PAUSE_SECONDS)
        return replace(batch, places=left, attempts=batch.attempts + in_vain)

    def _tokens_begun(self, places: Sequence[int]) -> int:
        return sum(len(self._begun[place].token_ids) for place in places if place in self._begun)

    async def _stream(
        self, http: httpx.AsyncClient, server: Server, batch: Batch, waiting: dict[int, int]
    ) -> tuple[str, bool]:
        """Delivers what comes and takes it out of ``waiting`` (index in the batch -> place). Returns why the rest did
        not come, and whether the server is to be evicted for it."""
        rids = {index: uuid.uuid4().hex for index in waiting}
        posted = body(
            batch, self.requests, self.sampling, self._begun, list(rids.values()), together=self.router is None
        )
        version, silence = self.fleet.version, self._silence[server.url]
        whole = False
        try:
            async with (
                silence.deadline(),
                http.stream("POST", f"{server.url}/generate", json=posted, headers=headers(server.api_key)) as answer,
            ):
                if answer.status_code >= 300:
                    content = (await answer.aread()).decode("utf-8", errors="replace")
                    raise refusal_or_failure(content, answer.status_code)
                async for line in answer.aiter_lines():
                    if (event := event_of(line)) is not None:
                        silence.broken()
                        await self._verified(server, event)
                        self._take(event, server, waiting, self.fleet.version == version)
            whole = True
        except Refused as error:
            if error.status in _WHOEVER_ASKS and self.router is None:
                return f"it refused with status {error.status}: {error}{advice(error.status)}", True
            raise ServerError(
                f"POST {server.url}/generate was refused with status {error.status}: {error}{advice(error.status)} "
                f"(a prompt of {len(batch.prompt_token_ids)} tokens, max_new_tokens={self.sampling.max_new_tokens})",
                server.url,
                "/generate",
                error.status,
            ) from None
        except (TimeoutError, httpx.HTTPError, Failed) as error:
            self._slow.add(server.url)
            return self._failure(error, silence), True
        except (ForeignWeights, BadAnswer) as error:
            return str(error), True
        except Unsure as error:
            return str(error), False
        finally:
            if not whole and waiting:
                await self._abort(http, server, [rids[index] for index in waiting])
        return "it ended the responses before their time", False

    def _take(self, event: dict, server: Server, waiting: dict[int, int], constant: bool) -> None:
        index, part = read(event, self._version_of, self.oldest, constant)
        if part is None or index not in waiting:
            return
        if not self._trusted(server):
            raise ForeignWeights(f"it was evicted meanwhile: {self.fleet.evicted()[server.url]}")
        place = waiting[index]
        generation = joined(self._begun.get(place), part)
        if part.finish_reason == "abort":
            if len(part.token_ids):
                self._begun[place] = generation
            return
        tokens = len(generation.token_ids)
        if generation.finish_reason == "length" and tokens < self.sampling.max_new_tokens:
            raise RolloutError(
                f"server {server.url} ended a response after {tokens} of max_new_tokens={self.sampling.max_new_tokens}:"
                " start it with a larger --max-total-tokens or --context-length"
            )
        self.deliver(place, generation)
        del waiting[index]
        self._load[server.url] -= 1

    def _version_of(self, tag: str) -> int | None:
        unverified = self.fleet.unverified_version_of(tag)
        if unverified is not None and self.router is None and unverified <= (self.fleet.version or 0):
            return unverified
        return self.fleet.version_of(tag)

    async def _verified(self, server: Server, event: dict) -> None:
        """Waits, where tokens were sampled from new weights before their check was over, until it is."""
        versions = [version for tag in tags(event) if (version := self.fleet.unverified_version_of(tag)) is not None]
        while self.router is None and versions and max(versions) > (self.fleet.version or 0) and self._trusted(server):
            await asyncio.sleep(_LOOK_SECONDS)
            self._silence[server.url].broken()  # the wait is ours

    def _failure(self, error: Exception, silence: Silence) -> str:
        if isinstance(error, TimeoutError):
            return silence.reason
        if isinstance(error, httpx.HTTPError):
            return f"the connection was lost ({type(error).__name__}: {error})"
        return f"it failed: {error}"

    def _trusted(self, server: Server) -> bool:
        if self.router is not None or server.url in self._slow:
            return True
        return server.url not in self.fleet.evicted()

    async def _abort(self, http: httpx.AsyncClient, server: Server, rids: Sequence[str]) -> None:
        """Tells the server that nobody waits for these. A server that does not take it will notice the closed
        connection."""

        async def one(rid: str) -> None:
            await http.post(f"{server.url}/abort_request", json={"rid": rid}, headers=headers(server.api_key))

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ABORT_SECONDS):
                await asyncio.gather(*(one(rid) for rid in rids), return_exceptions=True)

    def _bounded(self, rest: Batch) -> None:
        if rest.attempts < self.attempts:
            return
        message = (
            f"{len(rest.places)} responses to one prompt were asked for {rest.attempts} times in vain, last at"
            f" {self._reasons[rest.places[0]]}"
        )
        if self.router is not None:
            raise NoServersLeft(f"{message}: look at the router's workers", {})
        raise GaveUp(f"{message}: look at the servers' logs; the prompt may be what they fail at", {})

    def _nobody(self, waiting: Sequence[Batch]) -> str:
        reasons = "; ".join(f"{url}: {reason}" for url, reason in self.fleet.evicted().items())
        count = sum(len(batch.places) for batch in waiting)
        return (
            f"no server is left for {count} responses ({reasons or 'none holds the current weights'}): restart the"
            " servers; each is used again when it has taken new weights"
        )
