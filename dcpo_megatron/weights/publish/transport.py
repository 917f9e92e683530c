"""All that a publication asks of a way to bring weights to a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dcpo_megatron.rollout.server import Server
from dcpo_megatron.weights.publish.buckets import Bucket


class Transport:
    """Base of the modes. Calls come in the order of the methods; the publication gives each the seconds it may take.

    ``staged``: buckets are written once, before any server is touched (``begin``, ``write``, ``seal``, then ``load`` a
    server); otherwise each goes to each server (``send``). ``one_sender``: rank 0 alone has need of the tensors.

    Raises:
        RolloutError, ServerError: the server cannot be given the weights this way; the message says why.
    """

    staged = False
    one_sender = True

    def prepare(self, bucket: Bucket) -> object:
        """What :meth:`send` wants beside the bucket; called on every rank that walks the tensors."""
        return None

    def begin(self, version: int) -> None:
        """Staged: makes room for ``version``."""

    def write(self, bucket: Bucket) -> None:
        """Staged: takes one bucket."""

    def seal(self) -> None:
        """Staged: all buckets were written."""

    @contextmanager
    def connecting(self) -> Iterator[None]:
        """Around the :meth:`connect` of all servers."""
        yield

    def connect(self, server: Server, known: bool, seconds: float) -> None:
        """The server is paused. ``known``: it still holds what the last publication gave it."""

    def load(self, server: Server, seconds: float) -> None:
        """Staged: the server loads what was written."""
        raise NotImplementedError

    def send(self, server: Server, bucket: Bucket, payload, seconds: float) -> None:
        """One bucket to one server; ``payload`` of :meth:`prepare`."""
        raise NotImplementedError

    def drop(self, server: Server) -> None:
        """The server takes no further part in this publication."""

    def over(self) -> None:
        """On every rank: no server takes what is left of the walk."""

    def committed(self) -> None:
        """All that serve hold the version."""

    def close(self) -> None:
        """Frees what is held."""
