"""A fleet of SGLang servers as the rollout engine of a run: each rank samples through its own client, all ranks publish
together.

generate        every rank: its own requests -> where servers died and none is left: recover together, ask again for
                the rest
start, finish   the same beside the training of another batch
load_weights    every rank walks the tensors; rank 0 speaks to the servers (a transaction, see
                dcpo_megatron.weights.publish)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dcpo_megatron.distributed import all_gather_on_host, all_reduce_on_host
from dcpo_megatron.launch.signals import Stopped
from dcpo_megatron.monitor.server_health import ServerHealth
from dcpo_megatron.rollout import GenerateRequest, Generation, RolloutError, SamplingParams, StartedBatch
from dcpo_megatron.rollout.fleet import Fleet
from dcpo_megatron.rollout.server import Server, ServerError
from dcpo_megatron.rollout.server_client import NoServersLeft, PendingGeneration, ServerClient
from dcpo_megatron.training.shared_gpus import SharedGpu
from dcpo_megatron.weights.publish import WeightPublisher

# How often in one batch all servers may be lost before the run ends.
RECOVERIES = 3
_LOOK_SECONDS = 2.0
_OUT_OF_TIME = "\0"
_GO_ON, _STOP = b".", b"s"
# Before a look's text: the wait is over, and in vain.
_IN_VAIN = "!"


@dataclass
class ServerBatch:
    """A batch under way; what :meth:`ServerEngine.finish` takes."""

    requests: Sequence[GenerateRequest]
    sampling: SamplingParams
    handle: PendingGeneration

    def done_so_far(self) -> dict[int, Generation]:
        return self.handle.done_so_far()

    def cancel(self) -> None:
        self.handle.cancel()


class ServerEngine:
    """See :class:`~dcpo_megatron.rollout.RolloutEngine`. Every method but :meth:`start` is collective over all ranks.

    Args:
        weights: the trained model's weights, walked anew each time it is iterated
            (:class:`~dcpo_megatron.weights.transfer.WeightGatherer`): given to servers that come back.
        start_timeout: seconds to wait for a server where none is left.
        announce: says what happened, on the rank that writes.
        tick: called while waiting, which has a deadline of its own.
        stop: whether this rank has been asked to stop; looked at while waiting.
        health: is told of every change; None on ranks that do not write.
        shared: this rank's half of a GPU that servers are on too; None: they are on others.
    """

    def __init__(
        self,
        client: ServerClient,
        publisher: WeightPublisher,
        fleet: Fleet,
        weights: Iterable[tuple[str, torch.Tensor]],
        *,
        start_timeout: float,
        announce: Callable[[str], None] = print,
        tick: Callable[[], None] = lambda: None,
        stop: Callable[[], bool] = lambda: False,
        health: ServerHealth | None = None,
        shared: SharedGpu | None = None,
    ):
        self.client, self.publisher, self.fleet, self.weights = client, publisher, fleet, weights
        self.start_timeout, self.announce, self.tick, self.stop = start_timeout, announce, tick, stop
        self.health, self.shared = health, shared

    @property
    def version(self) -> int | None:
        """The version that the servers serve."""
        return self.fleet.version

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        sampling: SamplingParams,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Generation]:
        """See :class:`RolloutEngine`. Raises RolloutError where servers are lost again and again, or none comes back in
        time; Stopped where the run is asked to stop while it waits for them."""
        return self._complete(requests, sampling, progress, lambda: self.client.generate(requests, sampling, progress))

    def start(self, requests: Sequence[GenerateRequest], sampling: SamplingParams) -> ServerBatch:
        """Begins to sample beside whatever the caller does next. Not collective."""
        return ServerBatch(requests, sampling, self.client.start(requests, sampling))

    def finish(self, started: StartedBatch, progress: Callable[[int, int], None] | None = None) -> list[Generation]:
        """Waits for a started batch, as :meth:`generate` does."""
        assert isinstance(started, ServerBatch)  # of this engine's start()
        return self._complete(started.requests, started.sampling, progress, lambda: started.handle.finish(progress))

    def _complete(self, requests, sampling, progress, attempt: Callable[[], list[Generation]]) -> list[Generation]:
        finished: dict[int, Generation] = {}
        for _ in range(RECOVERIES + 1):
            missing = [place for place in range(len(requests)) if place not in finished]
            try:
                finished |= dict(zip(missing, attempt(), strict=True))
            except NoServersLeft as error:
                finished |= {missing[place]: generation for place, generation in error.finished.items()}
            lacking = int(all_reduce_on_host(torch.tensor(len(requests) - len(finished))))
            self._note()
            if not lacking:
                return [finished[place] for place in range(len(requests))]
            try:
                self._recover(lacking)
            except Stopped:
                raise Stopped(finished) from None
            rest = [requests[place] for place in range(len(requests)) if place not in finished]

            def attempt(rest=rest) -> list[Generation]:
                return self.client.generate(rest, sampling, progress) if rest else []

        raise RolloutError(
            f"all rollout servers were lost {RECOVERIES + 1} times within one batch ({self._reasons()}): look at their"
            " logs; start the same command again to resume"
        )

    def _recover(self, lacking: int) -> None:
        """Waits for a server that answers and gives it the weights of now. Raises RolloutError, Stopped."""
        self.announce(
            f"no rollout server is left ({self._reasons()}): {lacking} responses wait for one to come back, at most"
            f" {self.start_timeout:.0f} s"
        )
        said: set[str] = set()

        def look() -> str | None:
            found = look_at(self.fleet.servers, _LOOK_SECONDS)
            errors = [error for error in found.values() if error is not None]
            if len(errors) < len(found):
                return "back"
            say_refusals(found, said, self.announce)
            if all(error.final for error in errors):
                return _IN_VAIN + "; ".join(map(str, errors))
            return None

        back = wait_together(look, self.start_timeout, self.tick, self.stop)
        if back is not None and back.startswith(_IN_VAIN):
            raise RolloutError(f"every rollout server refuses: {back[1:]}")
        if back is None:
            raise RolloutError(
                f"no rollout server answered within servers.start_timeout_seconds={self.start_timeout:.0f}"
                f" ({self._reasons()}): start them again (dcpo serve), then start the same command again to resume"
            )
        self.load_weights(self.weights, self.fleet.version or 0)

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Publishes ``tensors`` (walked anew where servers fail midway) as ``version``. Raises RolloutError, the same
        on every rank."""
        try:
            report = self.publisher.publish(tensors, version)
        finally:
            self._note()
        for url, reason in report.evicted.items():
            self.announce(f"rollout server {url} is not used until it has taken new weights: {reason}")

    def release_memory(self) -> None:
        """Idle servers on the trainer's GPUs free them, and the optimizer comes back; the next publication turns it
        round. Raises RolloutError, the same on every rank."""
        self.publisher.release_memory()
        if self.shared is not None:
            self.shared.take_back()

    def _note(self) -> None:
        if self.health is not None:
            self.health.note()

    def _reasons(self) -> str:
        return "; ".join(f"{url}: {reason}" for url, reason in self.fleet.evicted().items()) or "none is listed as lost"

    def close(self) -> None:
        """Closes client and publisher; the servers stay."""
        self.client.close()
        self.publisher.close()


def look_at(
    servers: Sequence[Server], seconds: float, question: Callable[[Server], object] | None = None
) -> dict[str, ServerError | None]:
    """Address -> why it is no server of ours now, None where it is. They are asked side by side, ``question`` (default:
    its model)."""

    def ask(server: Server) -> ServerError | None:
        try:
            question(server) if question else server.model(seconds)
        except ServerError as error:
            return error
        return None

    with ThreadPoolExecutor(max(1, min(64, len(servers)))) as pool:
        return dict(zip((server.url for server in servers), pool.map(ask, servers), strict=True))


def say_refusals(found: dict[str, ServerError | None], said: set[str], announce: Callable[[str], None]) -> None:
    """Announces, once a server and status, that somebody answers at an address and refuses. ``said`` remembers."""
    for url, error in found.items():
        if error is not None and (error.final or error.status is not None) and f"{url} {error.status}" not in said:
            said.add(f"{url} {error.status}")
            announce(f"rollout server {url} refuses: {error}")


def wait_together(
    look: Callable[[], str | None],
    seconds: float,
    tick: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
) -> str | None:
    """Collective: rank 0 calls ``look`` until it gives a text, for ``seconds`` at most. Every rank returns that text,
    or None where time ran out.

    The ranks meet every few seconds, so that a wait may be longer than the deadline of a collective.

    Raises:
        Stopped: ``stop`` is true on any rank.
    """
    until = time.monotonic() + seconds
    while True:
        found = ""
        if dist.get_rank() == 0:
            found = look() or ("" if time.monotonic() < until else _OUT_OF_TIME)
            if not found:
                time.sleep(_LOOK_SECONDS / 4)
        answers = all_gather_on_host((_STOP if stop() else _GO_ON) + found.encode())
        tick()
        if any(answer.startswith(_STOP) for answer in answers):
            raise Stopped
        if text := answers[0][1:].decode():
            return None if text == _OUT_OF_TIME else text
