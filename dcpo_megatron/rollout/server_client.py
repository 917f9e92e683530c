"""Samples on a fleet of SGLang servers: what the training loop calls.

    generations = client.generate(requests, sampling)          waits
    pending = client.start(requests, sampling); ...; generations = pending.finish()

The samples of a prompt go to one server, prompts to whichever server has the least to do. HTTP in a thread of its own,
one a call: no collectives, no device. Seeds are sent along; a server started with ``--enable-deterministic-inference``
follows them, any other draws as it likes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from dcpo_megatron.rollout.fleet import Fleet
from dcpo_megatron.rollout.protocol import GenerateRequest, Generation, RolloutError, SamplingParams
from dcpo_megatron.rollout.server import Server
from dcpo_megatron.rollout.server_sampling import GaveUp, NoServersLeft, Sampling

__all__ = ["GaveUp", "NoServersLeft", "PendingGeneration", "ServerClient"]

_LOOK_SECONDS = 0.5
_CANCEL_SECONDS = 10.0


class ServerClient:
    """This rank's way to the servers.

    Args:
        fleet: who serves which weights. Servers that fail are evicted from it; only :meth:`Fleet.admit` brings them
            back.
        rank, world: of the ranks that sample at the same time: each begins at another server.
        request_timeout: seconds without a sign of work from a server until it is asked whether it still samples; one
            that does not is evicted.
        attempts: how often a response is asked for before the batch fails.
        outstanding: responses that are under way at one server, at most.
        router: address of an sglang-router that spreads the requests instead; weights still go to each server, and its
            answers are checked all the same.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        rank: int = 0,
        world: int = 1,
        request_timeout: float = 600.0,
        attempts: int = 3,
        outstanding: int = 1024,
        router: str | None = None,
    ):
        self.fleet = fleet
        self.router = Server(router, api_key=fleet.servers[0].api_key) if router else None
        servers = len(fleet.servers)
        self.first = rank * max(1, servers // world) % servers
        self.request_timeout, self.attempts, self.outstanding = request_timeout, attempts, outstanding

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        sampling: SamplingParams,
        progress: Callable[[int, int], None] | None = None,
        *,
        oldest: int | None = None,
    ) -> list[Generation]:
        """See :class:`~dcpo_megatron.rollout.RolloutEngine`.

        Args:
            oldest: the oldest weight version that a token may be from (default: the version served now).

        Raises:
            NoServersLeft: with everything finished so far.
            GaveUp: the same, where servers are left and still some response cannot be had.
            ServerError: a server refuses a request as wrong.
            RolloutError: no server has weights yet, or a server ends responses too early.
        """
        return self.start(requests, sampling, oldest=oldest).finish(progress)

    def start(
        self, requests: Sequence[GenerateRequest], sampling: SamplingParams, *, oldest: int | None = None
    ) -> PendingGeneration:
        """Begins to sample in the background; arguments as for :meth:`generate`. Weights may be published meanwhile:
        responses then continue under the new ones."""
        version = self.fleet.version
        if version is None:
            raise RolloutError("no rollout server has weights of this run yet: publish them first")
        pending = PendingGeneration(len(requests))
        pending._begin(
            Sampling(
                self.fleet,
                requests,
                sampling,
                pending._deliver,
                router=self.router,
                first=self.first,
                oldest=version if oldest is None else oldest,
                seconds=self.request_timeout,
                attempts=self.attempts,
                outstanding=self.outstanding,
            )
        )
        return pending

    def probe_evicted(self, timeout: float = 30.0) -> list[Server]:
        """The evicted servers that sample a token within ``timeout`` seconds: they are fit for new weights."""
        reasons = self.fleet.evicted()
        servers = [server for server in self.fleet.servers if server.url in reasons]
        if not servers:
            return []
        with ThreadPoolExecutor(len(servers)) as pool:
            fit = pool.map(lambda server: server.generates(timeout), servers)
            return [server for server, good in zip(servers, fit, strict=True) if good]

    def close(self) -> None:
        """Closes the way to the router; the fleet's servers are their owner's."""
        if self.router is not None:
            self.router.close()


class PendingGeneration:
    """Responses that are being sampled. From any thread."""

    def __init__(self, total: int):
        self.total = total
        self._done: dict[int, Generation] = {}
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task | None = None
        self._cancelled = self._ended = False
        self._thread: threading.Thread  # by _begin()

    def finish(self, progress: Callable[[int, int], None] | None = None) -> list[Generation]:
        """Waits for all; ``progress(finished, total)`` is called in this thread, whenever some more are finished.
        Raises as :meth:`ServerClient.generate`, and RolloutError after :meth:`cancel`. An interrupt (Ctrl-C)
        cancels."""
        told = -1
        try:
            while True:
                with self._changed:
                    running = not self._ended
                    if running and len(self._done) == told:
                        self._changed.wait(_LOOK_SECONDS)
                    finished = len(self._done)
                if progress is not None and finished != told:
                    progress(finished, self.total)
                told = finished
                if not running:
                    break
        except BaseException:
            self.cancel()
            raise
        self._thread.join(_CANCEL_SECONDS)
        if self._cancelled:
            raise RolloutError("sampling was cancelled")
        if isinstance(self._error, GaveUp):
            self._error.finished = self.done_so_far()
        if self._error is not None:
            raise self._error
        return [self._done[place] for place in range(self.total)]

    def done_so_far(self) -> dict[int, Generation]:
        """The finished responses, by place in the requests."""
        with self._changed:
            return dict(self._done)

    def cancel(self) -> None:
        """Gives up what is not finished, at the servers too. Returns when nothing runs any more."""
        with self._changed:
            self._cancelled = self._cancelled or not self._ended
            if self._task is not None and self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(_CANCEL_SECONDS)

    def _begin(self, sampling: Sampling) -> None:
        self._thread = threading.Thread(target=self._work, args=(sampling,), name="rollout", daemon=True)
        self._thread.start()

    def _work(self, sampling: Sampling) -> None:
        async def run() -> None:
            with self._changed:
                self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
                if self._cancelled:
                    return
            await sampling.run()

        try:
            asyncio.run(run())
        except asyncio.CancelledError:
            pass  # by cancel(), which says so to whoever waits
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                # Not the thread's own end: whoever is woken here would find it alive, and wait again with nobody left
                # to wake it.
                self._ended = True
                self._changed.notify_all()

    def _deliver(self, place: int, generation: Generation) -> None:
        with self._changed:
            self._done[place] = generation
            self._changed.notify_all()
