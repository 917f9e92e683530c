"""How weights are published, and what a publication reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

Mode = Literal["distributed", "disk", "ipc"]
Pause = Literal["abort", "retract", "in_place"]


@dataclass(frozen=True)
class PublishOptions:
    """Attributes:
        mode: ``distributed`` (a process group), ``disk`` (safetensors that both sides see) or ``ipc`` (shared memory on
            one host, CUDA IPC on a GPU).
        backend: of the process group, "nccl" or "gloo".
        bucket_bytes: weights on their way at a time, at most (or one tensor).
        timeout: deadline of a phase, in seconds.
        bucket_timeout: deadline of one bucket at one server, in seconds: so long a hung server holds up the others.
        address: how servers reach this host (default: loopback for servers on it, else the address this host has on the
            way to the server).
        folder: mode disk: where servers read the weights.
        verify: weights are checked before they are committed.
        tolerance: mean |log-prob of the training model - log-prob of the server| that the check allows.
        min_servers: how many servers must hold the new weights.
        pause: what becomes of requests under way: ``abort`` ends them, ``retract`` lets them go on with their cache
            computed anew, ``in_place`` with the old cache.
        scrub: before a server takes its first weights, its own are overwritten with noise, so that a tensor which does
            not arrive cannot go unnoticed.
        dtype: what the weights are sent as ("bfloat16" for servers that run in it); None: as the training model has
            them.

    Raises:
        ValueError: a value out of range, or mode disk without a folder.
    """

    mode: Mode = "distributed"
    backend: str = "gloo"
    bucket_bytes: int = 512 * 1024**2
    timeout: float = 600.0
    bucket_timeout: float = 120.0
    address: str | None = None
    folder: str | Path | None = None
    verify: bool = True
    tolerance: float = 1e-3
    min_servers: int = 1
    pause: Pause = "abort"
    scrub: bool = True
    dtype: str | None = None

    def __post_init__(self):
        if self.mode not in ("distributed", "disk", "ipc"):
            raise ValueError(f"publish mode {self.mode!r} is not known: use distributed, disk or ipc")
        if self.pause not in ("abort", "retract", "in_place"):
            raise ValueError(f"pause={self.pause!r} is not known: use abort, retract or in_place")
        if self.mode == "disk" and not self.folder:
            raise ValueError("publish mode disk needs a folder that trainer and servers both see")
        for name in ("bucket_bytes", "timeout", "bucket_timeout", "tolerance", "min_servers"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")


class Probe(Protocol):
    """The training model's answer to fixed token sequences, at temperature 1."""

    def sequences(self) -> list[list[int]]:
        """Token ids, at least two a sequence."""

    def logprobs(self) -> list[list[float]]:
        """Of each sequence, the log-probs of its tokens from the second on. Collective over the training ranks."""


@dataclass
class PublishResult:
    """Attributes:
    version: of the weights.
    seconds: phase -> seconds.
    bytes: sent to each server.
    buckets: in which they were sent.
    servers: addresses that hold the version now.
    evicted: address -> why it does not.
    difference: worst mean |log-prob difference| of a server; None where log-probs were not compared.
    """

    version: int
    seconds: dict[str, float] = field(default_factory=dict)
    bytes: int = 0
    buckets: int = 0
    servers: list[str] = field(default_factory=list)
    evicted: dict[str, str] = field(default_factory=dict)
    difference: float | None = None
