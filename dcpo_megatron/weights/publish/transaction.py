"""New weights to all rollout servers as one transaction; every training rank takes part, rank 0 speaks to the servers.

              rank 0                                              the other ranks
    answer    who answers?
    quiesce   pause, connect, tag "unverified", take memory back, empty the prefix cache
    stream    bucket after bucket ........... gathered .......... walk the same tensors to their end
    verify    checksums; resume; log-probs
    commit    tag = run and version; the fleet admits the server
    resume    whatever happened, also on Ctrl-C
              outcome  -------------------------------------->    adopt the fleet's state, or raise the same error

(mode disk writes before it pauses.) A server that fails in any phase is evicted with the reason and takes no further
part; the others go on. It is admitted again by the next publication, which gives it all weights anew. Nothing but the
servers' own tags is remembered between runs, so a trainer killed at any moment leaves nothing that the next run's first
publication does not mend.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict

import torch
import torch.distributed as dist

from dcpo_megatron.distributed import all_gather_on_host
from dcpo_megatron.rollout.fleet import Fleet
from dcpo_megatron.rollout.protocol import RolloutError
from dcpo_megatron.rollout.server import Server, ServerError
from dcpo_megatron.weights.publish import server_session, weight_checks
from dcpo_megatron.weights.publish.buckets import Bucket, buckets
from dcpo_megatron.weights.publish.disk import DiskTransport
from dcpo_megatron.weights.publish.ipc import IpcTransport
from dcpo_megatron.weights.publish.options import Probe, PublishOptions, PublishResult
from dcpo_megatron.weights.publish.process_group import ProcessGroupTransport
from dcpo_megatron.weights.publish.transport import Transport
from dcpo_megatron.weights.transfer import WeightGatherer

Tensors = Iterable[tuple[str, torch.Tensor]]
# Token ids of each sequence, and the training model's log-probs of them.
_Logprobs = tuple[list[list[int]], list[list[float]]]
# How long a server may take to say that it is there, and to be let go after it failed.
_ANSWER_SECONDS, _FAREWELL_SECONDS = 5.0, 5.0


class WeightPublisher:
    """Publishes weights to the servers of ``fleet``.

    Args:
        fleet: one on every rank; all get rank 0's view after each publication.
        options: see :class:`PublishOptions`, the same on every rank.
        device: this rank's, on which the tensors are.
        probe: the training model's log-probs, for verification; the same on every rank. None: by checksum alone.
        make_room: called on every rank before servers take their memory back; collective.
    """

    def __init__(
        self,
        fleet: Fleet,
        options: PublishOptions,
        *,
        device: torch.device,
        probe: Probe | None = None,
        make_room: Callable[[], None] = lambda: None,
    ):
        self.fleet, self.options, self.device, self.probe, self.make_room = fleet, options, device, probe, make_room
        self.transport = self._make_transport()
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    def _make_transport(self) -> Transport:
        options = self.options
        if options.mode == "disk":
            assert options.folder is not None  # PublishOptions refuses mode disk without
            return DiskTransport(options.folder)
        if options.mode == "ipc":
            return IpcTransport([server.url for server in self.fleet.servers], self.device)
        return ProcessGroupTransport(options.backend, self.device, options.address, options.bucket_timeout)

    def publish(self, tensors: Tensors | WeightGatherer, version: int) -> PublishResult:
        """Gives the weights ``tensors`` to every server that answers, as ``version``. Collective over the training
        ranks.

        Args:
            tensors: (Hugging Face name, full tensor), the same walk on every rank; tied weights once. Of a
                :class:`~dcpo_megatron.weights.transfer.WeightGatherer` each rank sends and receives no more than the
                mode wants.

        Raises:
            RolloutError: fewer than ``options.min_servers`` servers hold the version; the same on every rank. Servers
                that failed are evicted.
        """
        probe = None
        if self.options.verify and self.probe is not None:
            probe = (self.probe.sequences(), self.probe.logprobs())
        self.make_room()  # not earlier: the probe is a forward pass
        if isinstance(tensors, WeightGatherer):
            tensors = tensors.on_first() if self.transport.one_sender else tensors.tensors()
        walk = self._walk(tensors)
        report, failure = None, None
        if self.rank == 0:
            try:
                report = _Publication(self, version, probe).run(walk)
            except Exception as error:  # shared with the ranks that wait for it, and raised on all
                failure = error
        self.transport.over()
        for _ in walk:  # what is left of it: the other ranks are in its collectives
            pass
        return self._share(report, failure)

    def release_memory(self) -> None:
        """Frees the GPU memory of idle servers on the same GPUs; the next :meth:`publish` takes it back. Collective.

        Raises:
            RolloutError: a server refused, the same on every rank.
        """
        failure = None
        if self.rank == 0:
            try:
                for server in self.fleet.serving():
                    server_session.release_memory(server, self.options.timeout)
            except RolloutError as error:
                failure = error
        self._share(PublishResult(self.fleet.version or 0), failure)

    def close(self) -> None:
        """Leaves the process groups."""
        self.transport.close()

    def _walk(self, tensors: Tensors) -> Iterator[tuple[Bucket, object]]:
        dtype = getattr(torch, self.options.dtype) if self.options.dtype else None
        for bucket in buckets(tensors, self.options.bucket_bytes, dtype):
            yield bucket, self.transport.prepare(bucket)

    def _share(self, report: PublishResult | None, failure: Exception | None) -> PublishResult:
        """Rank 0's outcome on every rank."""
        mine = b""
        if self.rank == 0:
            outcome = {
                "state": self.fleet.state(),
                "report": asdict(report) if report else None,
                "failure": failure and str(failure),
            }
            mine = json.dumps(outcome).encode()
        if dist.is_initialized():
            mine, *_ = all_gather_on_host(mine)
        if failure is not None:
            raise failure
        outcome = json.loads(mine)
        self.fleet.adopt(outcome["state"])
        if outcome["failure"] is not None:
            raise RolloutError(outcome["failure"])
        return PublishResult(**outcome["report"])


class _Publication:
    """One publication as rank 0 sees it: the servers still in it, and why the others are not."""

    def __init__(self, publisher: WeightPublisher, version: int, probe: _Logprobs | None):
        self.fleet, self.options, self.transport = publisher.fleet, publisher.options, publisher.transport
        self.version, self.probe = version, probe
        self.report = PublishResult(version)
        self.servers: list[Server] = list(self.fleet.servers)
        self.paused: list[Server] = []
        self.touched: list[Server] = []  # their weights are not those of a version we know
        self.noise: dict[str, weight_checks.Checksums] = {}
        self.phase, self._began = "answer", time.monotonic()

    def run(self, walk: Iterator[tuple[Bucket, object]]) -> PublishResult:
        self.pool = ThreadPoolExecutor(max(1, len(self.servers)), thread_name_prefix="publish")
        try:
            with self._in("answer", _ANSWER_SECONDS):
                self._each(self._answers)
            # A disk that is full is found out before any server is touched.
            staged = self.transport.staged
            with self._in("stream", self.options.timeout) if staged else nullcontext():
                if staged:
                    self._write(walk)
            with self._in("quiesce", self.options.timeout):
                with self.transport.connecting():
                    self._each(self._quiesce)
            with self._in("stream", self.options.timeout):
                self._each(self._start)
                if staged:
                    self._each(lambda server: self.transport.load(server, self._left()))
                else:
                    self._stream(walk)
                self._each(self._finish)
            with self._in("verify", self.options.timeout):
                if self.options.verify:
                    self._verify()
            with self._in("commit", self.options.timeout):
                self._commit()
        except BaseException as error:
            for server in self.touched:
                self.fleet.evict(server, f"publication of version {self.version} was broken off: {error!r}"[:500])
            raise
        finally:
            self.pool.shutdown()  # what is under way has a deadline
            with self._in("resume", _FAREWELL_SECONDS):
                self._resume()
        return self.report

    @contextmanager
    def _in(self, phase: str, seconds: float):
        """The phase that messages name, with a deadline. Nothing left to publish to ends the publication."""
        self.phase, self._began, self._until = phase, time.monotonic(), time.monotonic() + seconds
        try:
            yield
        finally:
            spent = time.monotonic() - self._began
            self.report.seconds[phase] = self.report.seconds.get(phase, 0.0) + spent
        if phase != "resume" and len(self.servers) < self.options.min_servers:
            reasons = "; ".join(f"{url}: {why}" for url, why in self.report.evicted.items())
            raise RolloutError(
                f"version {self.version} of the weights reached {len(self.servers)} of {len(self.fleet.servers)}"
                f" rollout servers, {self.options.min_servers} must have it ({reasons}): look at the servers' logs,"
                " start them again (dcpo serve), then start the same command again to resume"
            )

    def _left(self, most: float | None = None) -> float:
        """Seconds until the phase's deadline."""
        left = max(0.1, self._until - time.monotonic())
        return left if most is None else min(left, most)

    def _each(self, action: Callable[[Server], object]) -> None:
        """``action`` on every server still in it, side by side; those on which it fails are out."""
        running = [(server, self.pool.submit(action, server)) for server in self.servers]
        for server, future in running:
            try:
                future.result()
            except (RuntimeError, OSError) as error:  # RolloutError is one of the first
                self._out(server, error)

    def _out(self, server: Server, error: Exception) -> None:
        spent = time.monotonic() - self._began
        reason = f"phase {self.phase}, after {spent:.1f} s: {error}"
        self.servers.remove(server)
        self.report.evicted[server.url] = reason
        self.fleet.evict(server, reason)
        self.transport.drop(server)

    def _answers(self, server: Server) -> None:
        try:
            server.model(self._left())
        except ServerError as error:
            if error.status is None and not error.final:
                raise RolloutError(f"{server.url} does not answer ({error}): start it again") from error
            raise

    def _write(self, walk: Iterator[tuple[Bucket, object]]) -> None:
        self.transport.begin(self.version)
        for bucket, _ in walk:
            self.transport.write(bucket)
            self._count(bucket)
        self.transport.seal()

    def _count(self, bucket: Bucket) -> None:
        self.report.bytes += bucket.bytes
        self.report.buckets += 1

    def _quiesce(self, server: Server) -> None:
        tag = server.weight_version()
        # Still the process that we gave its weights: a restarted one has another tag.
        held = tag.removesuffix(server_session.RELEASED)
        known = (
            self.fleet.version is not None
            and held == self.fleet.tag(self.fleet.version)
            and server in self.fleet.serving()
        )
        self.paused.append(server)
        server.pause(self.options.pause, self._left())
        if not self.transport.staged:
            self.transport.connect(server, known, self._left())
        self.touched.append(server)
        server_session.tag_weights(server, f"{self.fleet.tag(self.version)}{server_session.UNVERIFIED}", self._left())
        if tag.endswith(server_session.RELEASED):
            server_session.resume_memory(server, self._left())
        # Not before the memory is back. While the server is paused nothing enters the cache again.
        server_session.flush_cache(server, self.options.pause, self._left())
        if self.options.scrub and not known:
            noise = weight_checks.scrub(server, self._left())
            if noise is not None:
                self.noise[server.url] = noise

    def _start(self, server: Server) -> None:
        if not self.transport.staged:
            server_session.begin_session(server, self._left())

    def _finish(self, server: Server) -> None:
        if not self.transport.staged:
            server_session.end_session(server, self._left())

    def _stream(self, walk: Iterator[tuple[Bucket, object]]) -> None:
        for bucket, payload in walk:

            def send(server: Server, bucket: Bucket = bucket, payload: object = payload) -> None:
                self.transport.send(server, bucket, payload, self._left(self.options.bucket_timeout))

            self._each(send)
            self._count(bucket)
            if len(self.servers) < self.options.min_servers:
                return

    def _verify(self) -> None:
        found: dict[str, weight_checks.Checksums] = {}

        def by_checksum(server: Server) -> None:
            sums = weight_checks.checksums(server, self._left())
            if sums is None and self.probe is None:
                raise RolloutError(
                    "it computes no checksums and the training model's log-probs were not given: nothing can be"
                    " verified"
                )
            if sums is not None:
                found[server.url] = sums
                if server.url in self.noise:
                    weight_checks.check_arrived(self.noise[server.url], sums)

        self._each(by_checksum)
        for url, what in weight_checks.odd_ones({s.url: found[s.url] for s in self.servers if s.url in found}).items():
            self._out(next(server for server in self.servers if server.url == url), RolloutError(what))
        probe = self.probe
        if probe is None:
            return
        differences: dict[str, float] = {}

        def by_logprobs(server: Server) -> None:
            server.resume(self._left())
            differences[server.url] = weight_checks.logprob_difference(server, *probe, self._left())
            weight_checks.check_logprobs(differences[server.url], self.options.tolerance)

        self._each(by_logprobs)
        if self.servers:
            self.report.difference = max(differences[server.url] for server in self.servers)

    def _commit(self) -> None:
        self._each(lambda server: server_session.tag_weights(server, self.fleet.tag(self.version), self._left()))
        if len(self.servers) >= self.options.min_servers:
            for server in self.servers:
                self.touched.remove(server)
                self.fleet.admit(server, self.version)
            self.report.servers = [server.url for server in self.servers]
            self.transport.committed()

    def _resume(self) -> None:
        """Undoes the pauses. What still runs on a server with weights that we do not know is ended first; one that does
        not answer here was evicted before."""

        def let_go(server: Server) -> None:
            if server in self.touched:
                server.pause("abort", self._left())
            server.resume(self._left())

        with ThreadPoolExecutor(max(1, len(self.paused))) as pool:
            running = [(server, pool.submit(let_go, server)) for server in self.paused]
        for server, future in running:
            error = future.exception()
            if isinstance(error, ServerError) and server in self.servers:
                self._out(server, error)
            elif error is not None and not isinstance(error, ServerError):
                raise error
